"""MADM's published configs, as they are written, take steps on fake data and a small random model."""

from pathlib import Path

import pytest
import torch

from scripts.count_classes import main as count_classes
from tests import fake_data
from tests.tiny_model import write_tiny_model
from train import main as train

CONF = Path(__file__).parent.parent / "conf"
WRITERS = {
    "madm_rgb2depth": ("deliver", fake_data.write_deliver),
    "madm_rgb2infrared": ("fmb", fake_data.write_fmb),
    "madm_rgb2event": ("dsec", fake_data.write_dsec),
}
# What a CPU, two images and a small model ask for; widths, rates, schedule, losses stay.
OVERRIDES = """
--model.network.diffusion.attention sdpa
--trainer.accelerator cpu --trainer.devices 1 --trainer.precision 32-true --trainer.max_steps 2
--data.source.transform.resize [64,128] --data.source.transform.crop_size [64,64]
--data.target.transform.resize [80,80] --data.target.transform.crop_size [64,64]
--data.target.eval_size [64,64] --data.num_workers 0 --wandb.mode disabled
--data.rare_class_sampling.min_pixels 0 --data.rare_class_sampling.min_crop_pixels 0
"""


@pytest.mark.slow
@pytest.mark.parametrize("experiment", WRITERS)
def test_a_published_experiment_takes_two_steps(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # below which the config expects its data
    config, run = str(CONF / f"{experiment}.yaml"), tmp_path / "run"
    target, write_target = WRITERS[experiment]
    fake_data.write_cityscapes(Path("data/cityscapes"))
    write_target(Path("data") / target)
    count_classes(["--config", config])
    places = {"--output": run, "--model.network.diffusion.path": write_tiny_model(tmp_path / "model")}
    words = [str(word) for item in places.items() for word in item]
    train(["--config", config, *words, *OVERRIDES.split()])

    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    assert checkpoint["global_step"] == 2
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.05]
    assert {group["initial_lr"] for group in groups} == {5e-6}
    classifier = checkpoint["state_dict"]["network.ema_adapter.head.classifier.weight"]
    assert classifier.shape == (9 if "infrared" in experiment else 11, 256, 1, 1)
    assert (run / "pictures/train-000000.png").is_file()
