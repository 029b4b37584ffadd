import csv
import json
import warnings

import pytest
import wandb

from callbacks.loggers import MetricsCSV, WandbRun, wandb_key_exists


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_numbers_of_one_step_share_a_row_and_names_may_come_later(tmp_path):
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"train/loss": 2.0, "epoch": 0}, step=0)
    logger.log_metrics({"train/loss": 1.0}, step=10)
    logger.log_metrics({"val/mIoU": 40.0}, step=10)
    logger.finalize("success")
    assert rows(tmp_path) == [
        {"step": "0", "train/loss": "2.0", "val/mIoU": ""},
        {"step": "10", "train/loss": "1.0", "val/mIoU": "40.0"},
    ]


def test_a_resumed_run_keeps_earlier_rows_and_replaces_those_it_computes_again(tmp_path):
    first = MetricsCSV(tmp_path)
    for step in (0, 10, 20, 30):
        first.log_metrics({"train/loss": 100.0 + step}, step=step)
    first.save()
    second = MetricsCSV(tmp_path)
    second.log_metrics({"train/loss": 1.0}, step=20)
    second.finalize("success")
    assert [(row["step"], row["train/loss"]) for row in rows(tmp_path)] == [
        ("0", "100.0"), ("10", "110.0"), ("20", "1.0"),
    ]  # fmt: skip


def test_rows_are_written_while_training_goes_on(tmp_path):
    logger = MetricsCSV(tmp_path, flush_every=2)
    logger.log_metrics({"a": 1}, step=0)
    assert not (tmp_path / "metrics.csv").exists()
    logger.log_metrics({"a": 1}, step=1)
    assert len(rows(tmp_path)) == 2


def test_the_mode_is_online_only_with_a_key(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    assert not wandb_key_exists() and WandbRun(tmp_path).mode == "offline"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password 0123456789\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert wandb_key_exists() and WandbRun(tmp_path).mode == "online"
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert WandbRun(tmp_path).mode == "online" and WandbRun(tmp_path, mode="offline").mode == "offline"


def test_a_wandb_that_cannot_start_gives_one_warning_and_takes_every_call(tmp_path, monkeypatch):
    def refuse(**options):
        raise ConnectionError("no network")

    monkeypatch.setattr("wandb.init", refuse)
    logger = WandbRun(tmp_path, mode="online")
    with pytest.warns(UserWarning, match="no network") as caught:
        logger.log_metrics({"a": 1}, step=0)
        logger.log_metrics({"a": 2}, step=1)
        logger.experiment.config.update({"x": 1})
        logger.finalize("success")
    assert len([w for w in caught if "training goes on" in str(w.message)]) == 1


def test_the_options_of_the_run_reach_wandb(tmp_path, monkeypatch):
    given = {}

    def start(**options):
        given.update(options)
        raise ConnectionError("seen enough")

    monkeypatch.setattr("wandb.init", start)
    options = {"mode": "offline", "project": "p", "entity": "e", "name": "n", "tags": ["t"]}
    with pytest.warns(UserWarning, match="seen enough"):
        WandbRun(tmp_path, **options).log_metrics({"a": 1}, step=0)
    assert {name: given[name] for name in options} == options


def test_a_wandb_that_fails_online_goes_on_offline(tmp_path, monkeypatch):
    modes = []

    class Run:
        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    def start(mode, **options):
        modes.append(mode)
        if mode == "online":
            raise ConnectionError("no network")
        return Run()

    monkeypatch.setattr("wandb.init", start)
    logger = WandbRun(tmp_path, mode="online")
    with pytest.warns(UserWarning, match="'online' failed"):
        logger.log_metrics({"a": 1}, step=0)
    assert modes == ["online", "offline"]


def test_a_wandb_that_fails_in_the_middle_does_not_end_the_run(tmp_path, monkeypatch):
    class Run:
        def define_metric(self, *args, **kwargs):
            pass

        def log(self, *args, **kwargs):
            raise OSError("disk full")

        def finish(self, code):
            pass

    monkeypatch.setattr("wandb.init", lambda **options: Run())
    logger = WandbRun(tmp_path, mode="offline")
    with pytest.warns(UserWarning, match="disk full"):
        logger.log_metrics({"a": 1}, step=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logger.log_metrics({"a": 1}, step=1)
    logger.finalize("failed")


def test_an_offline_run_keeps_its_id_and_holds_no_command_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--data.password", "hunter2-and-more"])
    logger = WandbRun(tmp_path, mode="offline", run_id="abc123", config={"lr": 1}, hide_command=True)
    logger.log_metrics({"a": 1}, step=3)
    assert logger.experiment.id == "abc123"
    logger.finalize("success")
    wandb.teardown()  # until then its own process may hold back what it writes
    written = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    assert not any(b"hunter2" in path.read_bytes() for path in written)


def test_the_command_is_shown_to_wandb_when_it_holds_no_secret(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--model.lr", "0.125"])
    logger = WandbRun(tmp_path, mode="offline")
    logger.log_metrics({"a": 1}, step=0)
    logger.finalize("success")
    wandb.teardown()
    metadata = [json.loads(path.read_text()) for path in (tmp_path / "wandb").rglob("wandb-metadata.json")]
    written = b"".join(path.read_bytes() for path in (tmp_path / "wandb").rglob("*.wandb"))
    assert any("0.125" in str(found.get("args")) for found in metadata) or b"0.125" in written
