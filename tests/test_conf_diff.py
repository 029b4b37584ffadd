"""DIFF's published configs hold the published settings; they take steps on fake data and a small model."""

import json
from pathlib import Path

import pytest
import torch

from cli import resolve
from scripts.count_classes import main as count_classes
from tests import fake_data
from tests.tiny_model import write_tiny_model
from train import main as train

CONF = Path(__file__).parent.parent / "conf"
# Source, box of its images, evaluation sets, subsets of classes.
EXPERIMENTS = {
    "diff_gta2cityscapes": ("gta5", [720, 1280], ["cityscapes", "bdd100k", "mapillary"], []),
    "diff_gta2acdc": ("gta5", [720, 1280], ["acdc"], []),
    "diff_gta2darkzurich": ("gta5", [720, 1280], ["dark_zurich"], []),
    "diff_synthia2cityscapes": ("synthia", [760, 1280], ["cityscapes"], ["synthia16", "synthia13"]),
    "diff_cityscapes2acdc": ("cityscapes", [512, 1024], ["acdc"], []),
}
MODEL = {
    "classes": "cityscapes19", "conditional": True, "consistency": 1.0, "lr": 6e-5, "weight_decay": 0.01,
    "lr_multipliers": {"head": 10}, "decay_norm_and_bias": True,
}  # fmt: skip
NETWORK = {"num_classes": 19, "embed_channels": 256, "channels": 256, "dropout": 0.1}
BACKBONE = {
    "classes": "cityscapes19", "steps": 37, "prompts": None, "prompt": "", "negative_prompt": "",
    "guidance": 5.0, "eta": 1.0, "prediction": "raw", "ca_reduce": "sum", "share_noise": False,
    "aggregation": "concatenation", "channels": [2048, 1024, 512, 256], "eval_seed": 0,
}  # fmt: skip
SCHEDULE = {"warmup_steps": 1500, "warmup_start": 1e-6, "power": 1.0}
DIFFUSION = {"path": "sd-2.1", "dtype": "float16", "vae_dtype": None, "attention": "xformers"}
SAMPLING = {"temperature": 0.01, "min_pixels": 3000, "min_crop_pixels": 1500, "skip_ignored_classes": False}
TRAINER = {
    "max_steps": 40000, "val_check_interval": 4000, "precision": "32-true", "devices": 1,
    "accumulate_grad_batches": 1, "gradient_clip_val": 5.0, "gradient_clip_algorithm": None,
}  # fmt: skip
DATA = {"batch_size": 1, "eval_batch_size": 1, "num_workers": 1, "seed": 0}
# What a CPU, two images and a small model ask for; rates, schedule, losses stay.
OVERRIDES = """
--model.network.backbone.diffusion.attention sdpa --model.network.backbone.diffusion.dtype float32
--model.network.backbone.channels [128,64,64,32] --trainer.accelerator cpu --trainer.max_steps 2
--data.num_workers 0 --data.rare_class_sampling.min_pixels 0 --data.rare_class_sampling.min_crop_pixels 0
--wandb.mode disabled
"""
SMALLER = {"[720, 1280]": "[64, 128]", "[760, 1280]": "[64, 128]", "[512, 1024]": "[24, 64]"}


def names_of(modules: list[dict]) -> list[str]:
    return [module["class_path"].split(".")[1] for module in modules]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_published_experiment_has_the_published_settings(experiment):
    config = resolve([CONF / f"{experiment}.yaml"])
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    network = model["network"]["init_args"]
    backbone, transform = network["backbone"]["init_args"], data["source"]["init_args"]["transform"]
    source, fit, targets, subsets = EXPERIMENTS[experiment]
    assert names_of([data["source"]]) == [source] and names_of(data["targets"]) == targets
    assert list(model["class_subsets"]) == subsets
    assert transform["class_path"] == "datamodules.transforms.FitCropFlipDistort"
    expected = {"fit": fit, "crop_size": [512, 512], "max_class_share": 0.75, "flip": 0.5, "distort": True}
    assert transform["init_args"] == expected
    assert data["source"]["init_args"]["classes"] in (None, "cityscapes19")
    for target in data["targets"]:
        assert target["init_args"]["eval_fit"] == [512, 1024]
    for expected, options in (
        (MODEL, model),
        (NETWORK, network),
        (BACKBONE, backbone),
        (DIFFUSION, backbone["diffusion"]["init_args"]),
        (SCHEDULE, model["schedule"]["init_args"]),
        (SAMPLING, data["rare_class_sampling"]),
        (DATA, data),
        (TRAINER, trainer),
    ):
        assert {key: options[key] for key in expected} == expected
    assert data["rare_class_sampling"]["statistics"] == f"data/{source}/class_counts.json"
    assert config["seed_everything"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_published_experiment_takes_two_steps(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # below which the config expects its data
    text, run = (CONF / f"{experiment}.yaml").read_text(), tmp_path / "run"
    for size, smaller in {**SMALLER, "[512, 512]": "[32, 32]"}.items():
        text = text.replace(size, smaller)
    Path("small.yaml").write_text(text)
    source, _, targets, subsets = EXPERIMENTS[experiment]
    for name in {source, *targets}:
        getattr(fake_data, f"write_{name}")(Path("data") / name)
    count_classes(["--config", "small.yaml"])
    places = {
        "--output": run,
        "--model.network.backbone.diffusion.path": write_tiny_model(tmp_path / "model", num_tokens=77),
    }
    words = [str(word) for item in places.items() for word in item]
    train(["--config", "small.yaml", *words, *OVERRIDES.split()])

    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    assert checkpoint["global_step"] == 2
    assert sorted(group["initial_lr"] for group in groups) == pytest.approx([6e-5, 6e-4])
    assert {group["weight_decay"] for group in groups} == {0.01}
    scores = json.loads((run / "metrics.json").read_text())["val"]
    conditions = [f"acdc-{condition}" for condition in ("fog", "night", "rain", "snow")]
    assert list(scores["sets"]) == (conditions if targets == ["acdc"] else targets)
    for found in (scores["mean"], *scores["sets"].values()):
        assert sorted(key for key in found if key.startswith("mIoU")) == (
            ["mIoU", "mIoU13", "mIoU16"] if subsets else ["mIoU"]
        )
