"""The mean of a run's latest checkpoints is a checkpoint that is scored like any other."""

import json

import pytest
import torch

from scripts.average_checkpoints import main
from test import main as score
from tests.tiny_run import tiny_config, write_config
from train import main as train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("average")
    config = tiny_config()
    config["trainer"] |= {"max_steps": 4, "val_check_interval": 4}
    config["checkpoints"] = {"every_n_steps": 1, "keep_last": 3}
    train(["--config", str(write_config(folder / "tiny.yaml", config)), "--output", str(folder / "run")])
    return folder / "run"


def load(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("last", [None, 2])
def test_weights_are_the_mean_of_the_latest_files(run, tmp_path, last):
    output = tmp_path / "mean.ckpt"
    main([str(run), "--output", str(output), *(["--last", str(last)] if last else [])])
    steps = [2, 3, 4][-(last or 3) :]
    files = [load(run / f"checkpoints/step-{step}.ckpt")["state_dict"] for step in steps]
    found = load(output)
    for name, weight in found["state_dict"].items():
        torch.testing.assert_close(weight, torch.stack([each[name] for each in files]).mean(0))
    assert found["averaged"] == [f"step-{step}.ckpt" for step in steps] and found["global_step"] == 4
    assert "optimizer_states" not in found


def test_the_mean_is_scored_like_any_checkpoint(run):
    main([str(run)])
    score([str(run), "--checkpoint", str(run / "checkpoints/average.ckpt"), "--pictures", "0"])
    assert json.loads((run / "test/own-average/metrics.json").read_text())["test"]["mean"]["mIoU"] >= 0


def test_training_does_not_go_on_from_a_mean(run, capsys):
    main([str(run), "--output", str(run / "checkpoints/last.ckpt")])
    with pytest.raises(SystemExit):
        train(["--config", str(run.parent / "tiny.yaml"), "--output", str(run), "--resume"])
    assert "weights only" in capsys.readouterr().err


@pytest.mark.parametrize("last", ["1", "9"])
def test_fewer_than_two_files_or_more_than_there_are_is_an_error(run, capsys, last):
    with pytest.raises(SystemExit):
        main([str(run), "--last", last])
    assert f"{last} asked for, found 3 files" in capsys.readouterr().err


def test_files_of_different_models_are_refused(run, tmp_path, capsys):
    checkpoint = load(run / "checkpoints/step-4.ckpt")
    checkpoint["state_dict"]["network.head.weight"] = torch.zeros(1)
    (tmp_path / "checkpoints").mkdir()
    torch.save(checkpoint, tmp_path / "checkpoints/step-1.ckpt")
    torch.save(load(run / "checkpoints/step-3.ckpt"), tmp_path / "checkpoints/step-3.ckpt")
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "not of the same model" in capsys.readouterr().err
