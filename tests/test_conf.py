"""Each experiment on the mini world trains, goes on, is scored and predicts: two steps, in this process."""

import json
from pathlib import Path

import pytest

from predict import main as predict
from scripts.demo_images import main as demo_images
from tests.test_test import script as test_script
from train import main as train

ROOT = Path(__file__).parent.parent
# What has no training, no single image or an earlier part has tests in a file of its own.
OWN_FILES = ("diffsegmenter", "difffss", "base_learner")
EXPERIMENTS = sorted(p for p in (ROOT / "conf/mini").glob("*.yaml") if not p.stem.startswith(OWN_FILES))
SHORT = "--data.batch_size 2 --data.num_workers 0 --wandb.mode disabled"
ONE_SET = "--data.train_length 4 --data.eval_length 1"
STREET = "datamodules.mini_world.datamodule.MiniStreetDataModule"
COMPOSED = {
    "datamodules.adaptation": "--data.source.train_length 4 --data.target.train_length 4 "
    "--data.target.eval_length 1 --data.rare_class_sampling null",
    "datamodules.generalization": "--data.source.train_length 4 --data.rare_class_sampling null "
    f'--data.targets [{{"class_path":"{STREET}","init_args":{{"eval_length":1}}}}]',
}


@pytest.mark.parametrize("config", EXPERIMENTS, ids=lambda path: path.stem)
def test_a_mini_experiment_trains_resumes_is_scored_and_predicts(config, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the configs name assets/mini-diffusion
    run, images, masks = (str(tmp_path / name) for name in ("run", "images", "masks"))
    text = config.read_text()
    sizes = next((sizes for room, sizes in COMPOSED.items() if room in text), ONE_SET)
    words = ["--config", str(config), "--output", run, *f"{SHORT} {sizes}".split(), "--trainer.max_steps"]
    train([*words, "1"])
    train([*words, "2", "--resume"])
    assert json.loads(Path(run, "run.json").read_text())["step"] == 2
    test_script.main([run, "--pictures", "1"])
    assert json.loads(Path(run, "test/own-best/metrics.json").read_text())["test"]["mean"]["mIoU"] >= 0
    demo_images(["--output", images, "--count", "2"])
    predict([run, "--input", images, "--output", masks])
    assert len(list(Path(masks).rglob("*.png"))) >= 4
