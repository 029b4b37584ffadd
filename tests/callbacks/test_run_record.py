import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch
import wandb
import yaml

from callbacks.provenance import device_state, list_hashes
from callbacks.run_record import (
    git_state,
    is_secret,
    metrics_table,
    nest_metrics,
    redact,
    redact_command,
    redact_text,
    secret_values,
    write_atomically,
)
from datamodules.adaptation import PairedSamples, UnlabelledSamples
from datamodules.base import EvaluationSamples, TrainingSamples
from datamodules.episode_lists import Episode
from datamodules.few_shot import EvaluationEpisodes, TrainingEpisodes
from datamodules.files import FileDataset, Pair
from datamodules.mini_world.dataset import MiniStreetDataset
from datamodules.mini_world.few_shot import MiniFewShotImages
from functional.fingerprint import weights_sha256
from tests.tiny_run import RandomImages, tiny_config, write_config
from train import main

SECRET = "s3cr3t-value-42"


@pytest.mark.parametrize(
    "name", ["api_key", "hfToken", "WANDB_API_KEY", "password", "client_secret", "--data.token"]
)
def test_names_of_secrets_are_recognised(name):
    assert is_secret(name)


@pytest.mark.parametrize("name", ["tokenizer", "keypoints", "keep", "lr", "classes", "tokenizer_path"])
def test_names_that_only_look_like_secrets_are_not(name):
    assert not is_secret(name)


def test_values_under_secret_keys_are_redacted_and_sizes_stay():
    config = {
        "api_key": SECRET,
        "num_tokens": 77,
        "password": 1234,
        "deep": [{"token": SECRET, "lr": 0.1}],
        "key": None,
    }
    expected = {
        "api_key": "REDACTED", "num_tokens": 77, "password": "REDACTED",
        "deep": [{"token": "REDACTED", "lr": 0.1}], "key": None,
    }  # fmt: skip
    assert redact(config) == expected


def test_credentials_in_urls_are_redacted():
    assert redact({"url": "https://me:pw@host/x"}) == {"url": "https://REDACTED@host/x"}
    assert redact_text("see https://ghp_abc@github.com/x and https://host/a@b") == (
        "see https://REDACTED@github.com/x and https://host/a@b"
    )


def test_a_secret_of_the_environment_is_redacted_wherever_it_occurs(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    assert redact({"note": f"use {SECRET} here"}) == {"note": "use REDACTED here"}


def test_text_of_a_config_is_redacted_in_block_and_flow_style_and_references_stay():
    text = "a: {api_key: abc, lr: 1}\npassword: 'two words'\ntoken: ${oc.env:X}\nnum_tokens: 77\nkeep: yes\n"
    assert redact_text(text) == (
        "a: {api_key: REDACTED, lr: 1}\npassword: REDACTED\ntoken: ${oc.env:X}\nnum_tokens: 77\nkeep: yes\n"
    )


def test_a_secret_on_the_command_line_is_redacted_in_both_spellings():
    words = ["train.py", "--data.password", "abc", "--data.token=xyz", "--model.lr", "1"]
    assert redact_command(words) == [
        "train.py",
        "--data.password",
        "REDACTED",
        "--data.token=REDACTED",
        "--model.lr",
        "1",
    ]


def test_secret_values_are_found_at_any_depth():
    assert secret_values({"a": [{"api_key": SECRET}], "b": "other", "token": {"x": "nested-one"}}) == {
        SECRET,
        "nested-one",
    }


def test_no_secret_lands_in_any_file_of_a_run_or_on_the_screen(tmp_path, monkeypatch, capfd):
    """F22."""
    monkeypatch.chdir(tmp_path)
    remote = "https://me:r3mote-passw0rd@host/x.git"
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run(["git", "remote", "add", "origin", remote], check=True)
    monkeypatch.setenv("WANDB_API_KEY", "local-" + "0f1e2d3c" * 5)
    monkeypatch.setenv("HIDDEN_API_KEY", "from-the-environment-1")
    config = tiny_config(api_key=SECRET, url="https://me:url-passw0rd@host/x", root="${oc.env:WHERE}")
    monkeypatch.setenv("WHERE", str(tmp_path))
    config["wandb"] = {"mode": "offline", "tags": ["${oc.env:HIDDEN_API_KEY}"]}
    path = write_config(tmp_path / "c.yaml", config)
    words = ["--config", str(path), "--output", "run", "--data.api_key", "typed-on-command-line"]
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    main(words)
    wandb.teardown()  # until then its own process may hold back what it writes
    files = [file for file in Path("run").rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in files) and any(file.suffix == ".ckpt" for file in files)
    hidden = (SECRET, "url-passw0rd", "from-the-environment-1", "typed-on-command-line")
    hidden += ("r3mote-passw0rd", "0f1e2d3c")
    written = {str(file): file.read_bytes() for file in files}
    written["screen"] = "".join(capfd.readouterr()).encode()
    assert [(file, s) for file, content in written.items() for s in hidden if s.encode() in content] == []


def test_the_record_holds_what_repeats_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_config(tmp_path / "c.yaml", tiny_config())
    main(["--config", str(path), "--model.lr", "0.5"])
    record = json.loads(Path("runs/c/run.json").read_text())
    assert record["command"] == ["python", "train.py", "--config", str(path), "--model.lr", "0.5"]
    assert record["versions"]["torch"] and record["git"].keys() == {"commit", "dirty"} and record["python"]
    assert record["started"] <= record["ended"]
    resolved = yaml.safe_load(Path("runs/c/config.yaml").read_text())
    assert (
        resolved["model"]["init_args"]["classes"] == "deliver11"
        and resolved["model"]["init_args"]["lr"] == 0.5
    )
    assert resolved["trainer"]["max_steps"] == 2 and "resume" not in resolved
    given = Path("runs/c/config_as_given.yaml").read_text()
    assert "${data.init_args.classes}" in given and "--model.lr 0.5" in given
    assert not list(Path("runs/c").glob(".*.tmp"))


def test_the_table_has_a_row_for_each_class_and_a_column_for_each_set_and_the_mean():
    flat = {
        "val/mIoU": 30.0, "val/day/mIoU": 40.0, "val/night/mIoU": 20.0, "train/loss": 1.0,
        "val/day/IoU/road": 80.0, "val/night/IoU/road": 40.0,
        "val/day/IoU/traffic sign": float("nan"), "val/night/IoU/traffic sign": 0.0,
    }  # fmt: skip
    nested = nest_metrics(flat, "val")
    assert nested["sets"]["day"] == {"mIoU": 40.0, "IoU": {"road": 80.0, "traffic sign": None}}
    assert nested["mean"] == {"mIoU": 30.0}
    assert metrics_table(nested).splitlines() == [
        "| IoU (%) | day | night | mean |",
        "|--|--:|--:|--:|",
        "| road | 80.00 | 40.00 | 60.00 |",
        "| traffic sign | - | 0.00 | 0.00 |",
        "| **mIoU** | 40.00 | 20.00 | 30.00 |",
    ]


def test_one_set_needs_no_mean():
    assert "mean" not in metrics_table(nest_metrics({"test/all/mIoU": 5.0, "test/mIoU": 5.0}, "test"))


def test_the_absence_of_git_is_no_error(tmp_path, monkeypatch):
    assert git_state(tmp_path) == {"commit": None, "dirty": None}
    monkeypatch.setenv("PATH", "")
    assert git_state(Path(__file__).parent) == {"commit": None, "dirty": None}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    write_atomically(path, "old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_a_failed_run_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_config(tmp_path / "c.yaml", tiny_config())

    def fail(self, batch, batch_idx):
        raise RuntimeError("out of luck")

    monkeypatch.setattr("lightning_modules.supervised.Supervised.training_step", fail)
    with pytest.raises(RuntimeError):
        main(["--config", str(path)])
    assert re.match(
        "failed: RuntimeError: out of luck", json.loads(Path("runs/c/run.json").read_text())["status"]
    )


@pytest.mark.parametrize("signal", ["SIGUSR1", "SIGTERM"])
def test_a_run_that_a_signal_stopped_names_the_signal(tmp_path, monkeypatch, signal):
    monkeypatch.chdir(tmp_path)
    path = write_config(tmp_path / "c.yaml", tiny_config())

    class Stopped(BaseException):
        signal_name = signal

    def stop(self, batch, batch_idx):
        raise Stopped

    monkeypatch.setattr("lightning_modules.supervised.Supervised.training_step", stop)
    with pytest.raises(BaseException):  # noqa: B017
        main(["--config", str(path)])
    assert json.loads(Path("runs/c/run.json").read_text())["status"] == f"stopped by {signal}"


# --- devices, switches and hashes


def test_the_record_holds_the_switches_of_the_run_and_no_gpu_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_config(tmp_path / "c.yaml", tiny_config())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    try:
        main(["--config", str(path), "--trainer.deterministic", "true", "--trainer.benchmark", "true"])
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
    try:
        torch.set_float32_matmul_precision("high")
        changed = device_state()["determinism"]
    finally:
        torch.set_float32_matmul_precision("highest")
    record = json.loads(Path("runs/c/run.json").read_text())
    assert record["gpu_driver"] is None and record["gpus"] is None
    switches = record["determinism"]
    assert switches["use_deterministic_algorithms"] and switches["cudnn.benchmark"]
    assert switches["float32_matmul_precision"] == "highest" and not switches["matmul.allow_tf32"]
    assert changed["float32_matmul_precision"] == "high" and changed["matmul.allow_tf32"]
    assert not changed["use_deterministic_algorithms"] and not changed["cudnn.benchmark"]


def test_driver_and_names_of_gpus_are_asked_for_where_there_are_any(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 570.86.15\necho 570.86.15\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")
    found = device_state()
    assert found["gpu_driver"] == "570.86.15" and found["gpus"] == ["GPU 0", "GPU 1"]
    tool.unlink()
    assert device_state()["gpu_driver"] is None


def test_weights_are_hashed_before_the_first_step_and_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = str(write_config(tmp_path / "c.yaml", tiny_config()))
    hashed = []

    def count(weights):
        hashed.append(sorted(weights))
        return weights_sha256(weights)

    monkeypatch.setattr("callbacks.run_record.weights_sha256", count)
    monkeypatch.setattr("lightning_modules.base.weights_sha256", count)
    main(["--config", path])
    stem, head = (
        sorted(f"network.{part}.{kind}" for kind in ("weight", "bias")) for part in ("stem", "head")
    )
    assert hashed == [head, stem]  # what learns at the start, what is frozen at the first checkpoint
    first = json.loads(Path("runs/c/run.json").read_text())["weights"]
    assert set(first) == {"initial", "frozen"} and set(first["frozen"]) == {"network.stem"}
    hashed.clear()
    main(["--config", path, "--resume", "--trainer.max_steps", "3"])
    assert json.loads(Path("runs/c/run.json").read_text())["weights"] == first and head not in hashed
    main(["--config", path, "--output", "other", "--seed_everything", "1"])
    other = json.loads(Path("other/run.json").read_text())["weights"]
    assert other["initial"] != first["initial"] and other["frozen"] == first["frozen"]


def files(names):
    return FileDataset(Path("/nowhere"), [Pair(f"{n}.png", f"{n}_label.png") for n in names], torch.arange(1))


def train_hash(dataset):
    return list_hashes({"train": TrainingSamples(dataset, None, 0)})["train"]


def test_the_hash_of_a_list_changes_with_names_and_order_and_with_nothing_else():
    assert train_hash(files("abc")) == train_hash(files("abc"))
    assert len({train_hash(files(names)) for names in ("abc", "acb", "ab", "abd")}) == 4
    moved = files("abc")
    moved.root = Path("/elsewhere")
    assert train_hash(moved) == train_hash(files("abc"))
    scenes = [MiniStreetDataset("train", 3, size=64, offset=offset) for offset in (0, 0, 5)]
    hashes = [train_hash(each) for each in scenes]
    assert hashes[0] == hashes[1] != hashes[2] and not scenes[0].kept


def test_the_lists_of_a_pair_of_an_evaluation_set_and_of_episodes_have_hashes():
    target = UnlabelledSamples(files("xy"), None, 0)
    images = MiniFewShotImages("val", 4)
    episodes = [Episode(0, 1, (1, 2)), Episode(3, 1, (2, 1))]
    shots = [EvaluationEpisodes(images, e, None, None, False, False) for e in (episodes, episodes[::-1])]
    training = TrainingEpisodes(images, [1], None, None, None, 0, [1], False)
    found = list_hashes(
        {
            "train": PairedSamples(TrainingSamples(files("abc"), None, 0), target),
            "val/day": torch.utils.data.Subset(EvaluationSamples(files("abc")), [0]),
            "val/1-shot": EvaluationSamples(shots[0]),
            "val/turned": EvaluationSamples(shots[1]),
            "val/drawn": training,
            "val/unnamed": EvaluationSamples(RandomImages(3, 8, 11, 0)),
        }
    )
    assert found["train/source"] == found["val/day"] == train_hash(files("abc"))  # whatever a process's share
    assert found["train/target"] == train_hash(files("xy"))
    assert len({found[f"val/{name}"] for name in ("1-shot", "turned", "drawn")} - {None}) == 3
    assert found["val/unnamed"] is None


def test_a_hundred_thousand_names_are_hashed_in_a_second():
    dataset = files([f"leftImg8bit/train/city/city_{i:06d}" for i in range(100_000)])
    start = time.process_time()
    train_hash(dataset)
    assert time.process_time() - start < 1
