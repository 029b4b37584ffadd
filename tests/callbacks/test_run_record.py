import json
import os
import re
from pathlib import Path

import pytest
import wandb
import yaml

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
from tests.tiny_run import tiny_config, write_config
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


def test_no_secret_lands_in_any_file_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
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
    leaks = [
        (str(file), secret) for file in files for secret in hidden if secret.encode() in file.read_bytes()
    ]
    assert leaks == []


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
