import csv
import json
import time
import warnings
from pathlib import Path

import pytest
import wandb

from callbacks.loggers import MetricsCSV, WandbRun, experiment_name, method_and_data, wandb_key_exists


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
        {"step": "1", "train/loss": "2.0", "val/mIoU": ""},
        {"step": "11", "train/loss": "1.0", "val/mIoU": "40.0"},
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
        ("1", "100.0"), ("11", "110.0"), ("21", "1.0"),
    ]  # fmt: skip


def test_rows_are_written_while_training_goes_on(tmp_path):
    logger = MetricsCSV(tmp_path)
    for step in range(3):
        logger.log_metrics({"a": 1}, step=step)
        logger.save()  # as Lightning does after each logged step
        logger.wait_until = time.monotonic() + 1000
        assert len(rows(tmp_path)) == 1  # where writing is slow, only now and then
    logger.after_save_checkpoint(None)  # but no row that belongs to a checkpoint is behind it
    assert len(rows(tmp_path)) == 3
    logger.log_metrics({"a": 1}, step=3)  # Lightning logs a step after it was saved
    logger.save()
    assert len(rows(tmp_path)) == 4


def test_rows_that_cannot_be_written_are_a_warning_and_come_later(tmp_path, monkeypatch):
    logger = MetricsCSV(tmp_path)
    with monkeypatch.context() as full, pytest.warns(UserWarning, match="No space.*The run goes on"):
        full.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        logger.log_metrics({"a": 1}, step=0)
        logger.save()
    logger.finalize("success")
    assert len(rows(tmp_path)) == 1


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
        logger.show({"x": 1})
        logger.summarize({"best/mIoU": 1.0})
        logger.mark_preempting()
        logger.finalize("success")
    assert len([w for w in caught if "training goes on" in str(w.message)]) == 1


def test_the_options_of_the_run_reach_wandb(tmp_path, monkeypatch):
    given = {}

    def start(**options):
        given.update(options)
        raise ConnectionError("seen enough")

    monkeypatch.setattr("wandb.init", start)
    options = {"mode": "offline", "project": "p", "entity": "e", "name": "n", "tags": ["t"]}
    options |= {"group": "g", "job_type": "j"}
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


def test_a_picture_that_cannot_be_written_for_wandb_does_not_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("wandb.init", lambda **options: None)
    with pytest.warns(UserWarning, match="drawing for wandb failed"):
        WandbRun(tmp_path, mode="offline").log_image("train/pictures", ["no such file.png"], step=0)


@pytest.mark.parametrize(
    ("folder", "seed", "name"),
    [
        ("runs/madm_rgb2depth", 0, "madm_rgb2depth"),
        ("runs/madm-seed3", 3, "madm"),
        ("runs/table/source-only-2", 2, "source-only"),
        ("runs/madm/seed1", 1, "madm"),
        ("runs/madm/1", 1, "madm"),
        ("runs/crop64", 0, "crop64"),
        ("runs/crop-64", 4, "crop-64"),
        ("runs/madm-seed3", 5, "madm-seed3"),
        ("7", 7, "7"),
    ],
)
def test_the_experiment_is_the_run_folder_without_the_runs_own_seed(folder, seed, name):
    assert experiment_name(Path(folder), seed) == name


def test_method_and_data_sets_become_tags_once_each():
    street = {"class_path": "datamodules.mini_world.datamodule.MiniStreetDataModule", "init_args": {}}
    data = {
        "class_path": "datamodules.generalization.GeneralizationDataModule",
        "init_args": {
            "source": street,
            "targets": [street, {"class_path": "datamodules.acdc.ACDCDataModule"}],
        },
    }
    config = {"model": {"class_path": "lightning_modules.diff.DIFF"}, "data": data}
    assert method_and_data(config) == ["DIFF", "Generalization", "MiniStreet", "ACDC"]
