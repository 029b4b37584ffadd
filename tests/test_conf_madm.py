"""MADM's published configs hold the published settings; they take steps on fake data and a small model."""

from pathlib import Path

import pytest
import torch

from cli import resolve
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

MODEL = {
    "lr": 5e-6, "weight_decay": 0.05, "decay_norm_and_bias": False, "lr_multipliers": None, "dplg": True,
    "threshold": 0.968, "max_alpha": 0.999, "max_gradient_norm": 0.01, "micro_batches": 1, "seed": 42,
}  # fmt: skip
NETWORK = {
    "lplr": True, "projection_channels": 512, "bottleneck_channels": 128, "embed_channels": 256,
    "channels": 256, "dropout": 0.1, "noise_seed": 42, "noise_size": [64, 64], "fresh_noise": False,
    "train_output_layers": False, "ema_unet": False, "teacher_dropout": True,
}  # fmt: skip
SCHEDULE = {
    "warmup_fraction": 500 / 184375, "warmup_start": 0.067, "boundaries": [0.88888, 0.96296], "factor": 0.1,
}  # fmt: skip
SAMPLING = {"temperature": 0.01, "min_pixels": 3000, "min_crop_pixels": 1500, "skip_ignored_classes": False}
# Classes, DPLG's start and end, weights of the regression on source and mixed image, size before the crop.
EXPERIMENTS = {
    "madm_rgb2depth": (11, [60, 61], 5000, 1.0, 1.0, [712, 712]),
    "madm_rgb2infrared": (9, [50, 51], 8000, 1.0, 1.0, [512, 683]),
    "madm_rgb2event": (11, [50, 51], 8000, 20.0, 0.0, [512, 768]),
}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_published_experiment_has_the_published_settings(experiment):
    config = resolve([CONF / f"{experiment}.yaml"])
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    network, source, target = (
        part["init_args"] for part in (model["network"], data["source"], data["target"])
    )
    num_classes, *own, resize = EXPERIMENTS[experiment]
    names = "dplg_start", "dplg_end_step", "source_regression", "mixed_regression"
    assert network["num_classes"] == num_classes and [model[name] for name in names] == own
    for part, size in ((source, [512, 1024]), (target, resize)):
        expected = {"crop_size": [512, 512], "resize": size, "flip": 0.5, "grey": False}
        assert part["transform"]["init_args"] == expected
    assert target["eval_size"] == [512, 512] and data["batch_size"] == 1
    for expected, options in (
        (MODEL, model),
        (NETWORK, network),
        (SCHEDULE, model["schedule"]["init_args"]),
        (SAMPLING, data["rare_class_sampling"]),
        ({"path": "sd-1.4", "vae_dtype": "float16", "dtype": "float32"}, network["diffusion"]["init_args"]),
        ({"max_steps": 10000, "precision": "16-mixed", "devices": 2}, trainer),
    ):
        assert {key: options[key] for key in expected} == expected


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
    assert (run / "pictures/train-000001.png").is_file()
