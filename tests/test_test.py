import csv
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from run_folder import checkpoint_path
from tests.tiny_run import tiny_config, write_config
from train import main as train

# The standard library has a package of this name, so the script is loaded by its path.
SPEC = importlib.util.spec_from_file_location("test_script", Path(__file__).parent.parent / "test.py")
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_config(tmp_path / "c.yaml", tiny_config())
    train(["--config", str(path), "--output", "run"])
    return "run"


def error_of(args, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        script.main(args)
    assert stop.value.code == 2
    return capsys.readouterr().err


def metrics(folder: str) -> dict:
    return json.loads((Path(folder) / "metrics.json").read_text())["test"]


def test_a_run_is_scored_on_its_own_test_sets_with_table_and_pictures(run, capsys):
    script.main([run])
    found = metrics("run/test/own-best")
    assert set(found["sets"]) == {"day", "night"} and len(found["sets"]["day"]["IoU"]) == 11
    assert found["mean"]["mIoU"] == pytest.approx(np.mean([s["mIoU"] for s in found["sets"].values()]))
    table = Path("run/test/own-best/metrics.md").read_text()
    assert "| traffic sign |" in table
    assert "| traffic sign |" in capsys.readouterr().out
    names = {path.name for path in Path("run/test/own-best/pictures").iterdir()}
    assert {"confusion-day.png", "confusion-night.png", "day-random-200.png", "night-random-212.png"} <= names


def test_the_number_of_pictures_is_an_option(run):
    script.main([run, "--pictures", "1"])
    names = {path.name for path in Path("run/test/own-best/pictures").iterdir()}
    expected = {"confusion-day.png", "confusion-night.png", "day-random-200.png", "night-random-210.png"}
    with open("run/test/own-best/images.csv") as file:
        rows = list(csv.DictReader(file))
    for name in ("day", "night"):  # the first of a set and the worst
        worst = min((row for row in rows if row["set"] == name), key=lambda row: float(row["mIoU"]))
        expected.add(f"{name}-{worst['name']}.png")
    assert names == expected
    script.main([run, "--pictures", "0", "--output", "none"])
    assert {path.name for path in Path("none/own-best/pictures").iterdir()} == {
        "confusion-day.png",
        "confusion-night.png",
    }


def test_other_data_is_scored_beside_the_runs_own(run, tmp_path):
    data = {"data": {"class_path": "tests.tiny_run.TinyData", "init_args": {"size": 12}}}
    first = write_config(tmp_path / "twelve.yaml", data)
    data["data"]["init_args"]["size"] = 20
    second = write_config(tmp_path / "twenty.yaml", data)
    script.main([run, "--data", str(first), str(second), "--output", "scores"])
    assert metrics("scores/twelve-best") != metrics("scores/twenty-best")
    pictures = [Path(f"scores/{name}-best/pictures/day-random-200.png") for name in ("twelve", "twenty")]
    assert Image.open(pictures[0]).size != Image.open(pictures[1]).size


def test_the_checkpoint_is_an_option(run):
    train(["--config", "c.yaml", "--output", "other", "--seed_everything", "5"])
    script.main([run, "--checkpoint", "last"])
    script.main([run, "--checkpoint", "other/checkpoints/last.ckpt", "--output", "x"])
    assert metrics("run/test/own-last") != metrics("x/own-last")


def test_scoring_twice_gives_the_same_numbers(run):
    script.main([run])
    first = metrics("run/test/own-best")
    script.main([run])
    assert metrics("run/test/own-best") == first


def test_a_method_without_training_is_scored_from_its_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script.main(["--config", str(write_config(tmp_path / "free.yaml", tiny_config()))])
    assert metrics("runs/free/test/own-config")["sets"].keys() == {"day", "night"}


def test_the_checkpoints_weights_are_what_is_scored(run):
    import torch

    path = Path("run/checkpoints/last.ckpt")
    checkpoint = torch.load(path)
    checkpoint["state_dict"]["network.head.weight"].zero_()
    checkpoint["state_dict"]["network.head.bias"].copy_(torch.eye(11)[5])
    torch.save(checkpoint, path)
    script.main([run, "--checkpoint", "last"])
    scores = metrics("run/test/own-last")["sets"]["day"]["IoU"]
    assert scores["road"] > 0 and sum(scores.values()) == scores["road"]


def test_another_protocol_has_scores_a_folder_and_a_record_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny_config()
    config["model"]["init_args"]["network"]["init_args"]["kernel"] = 3
    train(["--config", str(write_config(tmp_path / "c.yaml", config)), "--output", "run"])
    window = ["--window", "4", "6"]
    commands = {
        "": [],
        "-window4x6": window,
        "-window4x6-stride1x6": [*window, "--window-stride", "1", "6"],
        "-scales0.5-1.0": ["--scales", "0.5", "1"],
        "-flip": ["--flip"],
        "-window4x6-scales2.0-flip": [*window, "--scales", "2", "--flip"],
    }
    for command in commands.values():
        script.main(["run", "--pictures", "0", *command])
    assert {path.name for path in Path("run/test").iterdir()} == {f"own-best{name}" for name in commands}
    found = [metrics(f"run/test/own-best{name}") for name in commands]
    assert found[0]["protocol"] == {"window": None, "window_stride": None, "scales": [1.0], "flip": False}
    assert found[1]["protocol"] == {**found[0]["protocol"], "window": [4, 6], "window_stride": [2, 3]}
    expected = {"window": [4, 6], "window_stride": [2, 3], "scales": [2.0], "flip": True}
    assert found[5]["protocol"] == expected
    assert not any(a["sets"] == b["sets"] for i, a in enumerate(found) for b in found[:i])
    script.main(["run", "--pictures", "0", "--scales", "1", "--output", "again"])
    assert metrics("again/own-best") == found[0]


def test_a_wrong_protocol_is_named_in_short(capsys):
    run = ["run"]  # is not looked for
    assert "found window [0, 8] and stride [1, 4]" in error_of([*run, "--window", "0", "8"], capsys)
    words = ["--window", "8", "8", "--window-stride", "4", "9"]
    assert "found window [8, 8] and stride [4, 9]" in error_of([*run, *words], capsys)
    assert "give their size by --window" in error_of([*run, "--window-stride", "4", "4"], capsys)
    assert "found [1.0, 0.0]" in error_of([*run, "--scales", "1", "0"], capsys)
    assert "--scales" in error_of([*run, "--scales"], capsys)
    assert "--window" in error_of([*run, "--window", "8"], capsys)


def test_mistakes_are_named_in_short(run, capsys, tmp_path):
    assert "no run folder or checkpoint nowhere" in error_of(["nowhere"], capsys)
    assert "give the folder of a run" in error_of([], capsys)
    assert "holds: best.ckpt, last.ckpt" in error_of([run, "--checkpoint", "third.ckpt"], capsys)
    shutil.copy(Path(run, "checkpoints/last.ckpt"), Path(run, "checkpoints/average.ckpt"))
    assert checkpoint_path(Path(run), "average").samefile(Path(run, "checkpoints/average.ckpt"))
    no_data = write_config(tmp_path / "c2.yaml", {"model": {}})
    assert "has no section data" in error_of([run, "--data", str(no_data)], capsys)
    twice = [write_config(folder / "c3.yaml", {"data": {}}) for folder in (tmp_path, Path(run))]
    assert "several files c3" in error_of([run, "--data", *map(str, twice)], capsys)
    data = {"data": {"class_path": "tests.tiny_run.TinyData", "init_args": {"classes": "mini_objects"}}}
    path = write_config(tmp_path / "objects.yaml", data)
    assert "'mini_objects'" in error_of([run, "--data", str(path)], capsys)
    data["data"]["init_args"] = {"root": "/no/such/folder"}
    assert "TinyData has no folder" in error_of([run, "--data", str(write_config(path, data))], capsys)
    data["data"]["init_args"] = {"sise": 3}
    assert "Did you mean data.size?" in error_of([run, "--data", str(write_config(path, data))], capsys)
