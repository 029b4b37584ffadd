"""DiffSegmenter's configs: the published settings, and the mini ones through test.py and predict.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli import resolve
from functional.classes import class_table
from tests import fake_data
from tests.test_test import script as test_script
from tests.tiny_blip import write_tiny_blip
from tests.tiny_model import write_tiny_model
from train import main as train

CONF = Path(__file__).parent.parent / "conf"
PUBLISHED = {
    "diffsegmenter_voc": ("voc21", "a photograph of", "pascal_voc"),
    "diffsegmenter_context": ("context60", "a photography of", "pascal_context"),
    "diffsegmenter_coco": ("coco81", "a photography of", "coco"),
}


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_a_published_experiment_has_the_published_settings(experiment):
    classes, prefix, room = PUBLISHED[experiment]
    config = resolve([CONF / f"{experiment}.yaml"])
    model, data = config["model"]["init_args"], config["data"]
    network = model["network"]["init_args"]
    assert (model["classes"], model["absent"], model["threshold"]) == (classes, "zero", 0.5)
    assert data["class_path"].split(".")[1] == room and data["init_args"]["eval_batch_size"] == 1
    assert network["prompt"]["init_args"] == {
        "prefix": prefix, "emphasis": 1.21, "tokens": "last", "ing": True, "ing_offset": 0,
    }  # fmt: skip
    settings = {
        "size": [512, 512], "timesteps": [100], "noises": 1, "seed": 4307, "self_power": 1, "contrast": None,
    }  # fmt: skip
    assert {key: network[key] for key in settings} == settings
    assert network["level_weights"] == [0.1, 0.1, 0.5, 0.3] and network["normalize"] == "per_class"
    assert network["diffusion"]["init_args"]["path"] == "sd-1.5"
    assert model["candidates"]["init_args"]["branches"] == ["image_similarity", "text_similarity"]
    assert len(class_table(classes)) == int(classes[-2:])


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_a_published_experiment_is_scored(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # below which the config expects its data
    room = PUBLISHED[experiment][2]
    root = Path("data/coco" if room == "coco" else "data")
    getattr(fake_data, f"write_{room}")(root)
    images = [path.name for path in root.rglob("*.jpg")]
    published = {"image_similarity": {name: ["train"] for name in images}}
    published |= {"text_similarity": {name: [] for name in images}, "synonym_matching": {}}
    candidates = Path("data/candidates")
    candidates.mkdir()
    (candidates / f"{experiment.removeprefix('diffsegmenter_')}.json").write_text(json.dumps(published))
    diffusion = {"path": str(write_tiny_model(tmp_path / "model", num_tokens=77)), "dtype": "float32"}
    network = {"init_args": {"size": [64, 64], "diffusion": {"init_args": diffusion}}}
    captioner = {"init_args": {"path": str(write_tiny_blip(tmp_path / "blip"))}}
    overlay = {"model": {"init_args": {"network": network, "captioner": captioner}}}
    overlay["data"] = {"init_args": {"num_workers": 0}}
    Path("small.yaml").write_text(json.dumps(overlay))
    test_script.main(["--config", str(CONF / f"{experiment}.yaml"), "small.yaml", "--output", "out"])
    found = json.loads(Path("out/own-config/metrics.json").read_text())["test"]["sets"][room]
    assert 0 < found["mIoU"] <= found["mIoU_oracle"]
    assert any(candidates.glob("*_captions.json"))


@pytest.mark.parametrize("world", ["objects", "street"])
def test_a_mini_experiment_is_scored(world, tmp_path, monkeypatch):
    monkeypatch.chdir(CONF.parent)
    overlay = tmp_path / "small.yaml"
    overlay.write_text(
        "data: {init_args: {eval_length: 1}}\nmodel: {init_args: {network: {init_args: {max_rows: 4}}}}"
    )
    config = CONF / f"mini/diffsegmenter_{world}.yaml"
    test_script.main(["--config", str(config), str(overlay), "--output", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out/own-config/metrics.json").read_text())["test"]
    assert found["mean"]["mIoU"] > 0
    assert ("mIoU_oracle" in next(iter(found["sets"].values()))) == (world == "objects")
    with pytest.raises(SystemExit) as stop:
        test_script.main(["--config", str(config), str(overlay), "--output", str(tmp_path / "x"), "--flip"])
    assert stop.value.code == 2


def test_there_is_nothing_to_train(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(CONF.parent)
    with pytest.raises(SystemExit) as stop:
        train(["--config", "conf/mini/diffsegmenter_objects.yaml", "--output", str(tmp_path / "run")])
    assert stop.value.code == 2 and "nothing to train" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_candidates_that_are_not_there_are_a_short_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(CONF.parent)
    overlay = tmp_path / "file.yaml"
    candidates = {"class_path": "models.candidates.FileCandidates", "init_args": {"path": "nowhere.json"}}
    overlay.write_text(json.dumps({"model": {"init_args": {"candidates": candidates}}}))
    with pytest.raises(SystemExit) as stop:  # --config may be given once for each file
        test_script.main(["--config", "conf/mini/diffsegmenter_objects.yaml", "--config", str(overlay)])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and "nowhere.json" in told and len(told.splitlines()) <= 3


@pytest.mark.slow
def test_two_processes_score_a_set_to_the_same_numbers_as_one(tmp_path):
    overlay = tmp_path / "small.yaml"
    overlay.write_text("data: {init_args: {eval_length: 5}}")
    found = []
    for devices in ("1", "2"):
        words = ["--config", "conf/mini/diffsegmenter_objects.yaml", str(overlay), "--devices", devices]
        command = [sys.executable, "test.py", *words, "--output", str(tmp_path / devices)]
        subprocess.run(command, cwd=CONF.parent, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        found.append(json.loads((tmp_path / devices / "own-config/metrics.json").read_text()))
    assert found[0] == found[1]
