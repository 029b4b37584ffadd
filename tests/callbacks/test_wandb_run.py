"""What a training leaves for wandb, read from the file of an offline run; and trainings whose wandb fails."""

import json
import re
import shlex
import struct
import warnings
from collections import defaultdict
from pathlib import Path

import pytest
import wandb
import yaml
from wandb.proto import wandb_internal_pb2
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args
from wandb.sdk.wandb_run import Run

from callbacks.preemption import Preempted
from cli import SegmentationCLI
from tests.tiny_run import tiny_config, write_config
from train import main

ROOT = Path(__file__).parent.parent.parent
BLOCK = 32768


def records(path: Path):
    """The records of a .wandb file: 7 bytes of header, then LevelDB's log format."""
    content, position, record = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while position + 7 <= len(content):
        left = BLOCK - position % BLOCK
        if left < 7:  # the end of a block, too short for the head of a chunk
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last chunk
            found = wandb_internal_pb2.Record()
            found.ParseFromString(record)
            record = b""
            yield found


class Offline:
    """An offline run: `run` as it began, `config` and `summary` as they ended, `history` rows, `kinds`."""

    def __init__(self, folder: Path):
        (path,) = folder.glob("*.wandb")
        self.files, self.config, self.summary, self.history = folder / "files", {}, {}, []
        self.records = defaultdict(list)
        for record in records(path):
            kind = record.WhichOneof("record_type")
            self.records[kind].append(getattr(record, kind))
            if kind == "run":
                self.config |= read_items(record.run.config.update)
            elif kind == "config":
                self.config |= read_items(record.config.update)
            elif kind == "summary":
                self.summary |= read_items(record.summary.update)
            elif kind == "history":
                self.history.append(read_items(record.history.item))
        self.run = self.records["run"][0]


def read_items(items) -> dict:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def offline_runs(folder: Path) -> list[Offline]:
    wandb.teardown()  # until then its own process may hold back what it writes
    return [Offline(path) for path in sorted(folder.glob("wandb/offline-run-*"))]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of two steps, with its last validation the worse one, that went on for two more."""
    folder, patch = tmp_path_factory.mktemp("wandb"), pytest.MonkeyPatch()
    patch.chdir(folder)
    config = tiny_config(api_key="s3cr3t-value-42")
    config |= {"wandb": {"mode": "offline", "tags": ["mine"]}, "seed_everything": 3}
    config["model"]["init_args"]["lr"] = 0.5
    words = ["--config", str(write_config(folder / "tiny.yaml", config)), "--output", "runs/tiny-seed3"]
    with patch.context() as scope:
        scope.setattr("sys.argv", ["train.py", *words])
        main(words)
        main([*words, "--resume", "--trainer.max_steps", "4"])
    yield folder / "runs/tiny-seed3"
    patch.undo()


@pytest.fixture(scope="module")
def started(run):
    return offline_runs(run)


def test_a_run_carries_project_group_job_type_and_tags(started):
    found = started[0].run
    assert (found.project, found.run_group, found.job_type) == ("latentseg", "tiny", "train")
    assert found.display_name == "tiny-seed3" and list(found.tags) == ["mine", "Supervised"]


def test_a_run_carries_the_redacted_config(started):
    config = started[0].config
    assert config["model"]["init_args"]["lr"] == 0.5 and config["seed_everything"] == 3
    assert config["data"]["init_args"]["api_key"] == "REDACTED"


def test_a_run_carries_git_state_and_hashes_of_weights_and_data_as_the_record_holds_them(run, started):
    record, shown = json.loads((run / "run.json").read_text()), started[-1].config["record"]
    assert shown["git"].keys() == {"commit", "dirty"}
    assert shown == {key: record[key] for key in shown}
    assert set(shown["weights"]) == {"initial", "frozen"} and len(shown["weights"]["initial"]) == 64
    assert list(shown["weights"]["frozen"]) == ["network.stem"]
    assert set(shown["data_lists"]) == {"train", "val/day", "val/night"}


def test_the_summary_holds_the_best_and_the_last_validation(run, started):
    rows = {row["trainer/global_step"]: row for row in started[0].history if "val/mIoU" in row}
    best = max(rows, key=lambda step: rows[step]["val/mIoU"])
    summary = started[0].summary
    for which, step in (("best", best), ("last", 2)):
        assert summary[f"{which}/step"] == step
        for name in ("mIoU", "day/mIoU", "night/aAcc"):
            assert summary[f"{which}/{name}"] == pytest.approx(rows[step][f"val/{name}"])
    assert not any("/IoU/" in name for name in summary if name.startswith(("best", "last")))


def test_a_resumed_run_knows_the_best_validation_of_all_its_starts(started):
    rows = [row["val/mIoU"] for part in started for row in part.history if "val/mIoU" in row]
    assert len(rows) == 4 and started[1].summary["best/mIoU"] == pytest.approx(max(rows))


def test_a_resumed_run_goes_on_under_its_id_and_on_its_axis_of_steps(run, started):
    assert len(started) == 2 and started[0].run.run_id == started[1].run.run_id and started[1].run.resume
    assert json.loads((run / "run.json").read_text())["wandb_id"] == started[0].run.run_id
    steps = [{row["trainer/global_step"] for row in part.history} for part in started]
    assert steps == [{1, 2}, {3, 4}]
    axes = {metric.glob_name: metric.step_metric for metric in started[1].records["metric"]}
    assert axes["*"] == "trainer/global_step"


def test_a_run_holds_a_table_of_the_iou_of_each_class(started):
    tables = [row for row in started[0].history if row.get("val/IoU_table/_type") == "table-file"]
    assert len(tables) == 2
    table = json.loads((started[0].files / tables[-1]["val/IoU_table/path"]).read_text())
    assert table["columns"] == ["class", "day", "night"] and len(table["data"]) == 11
    last = [row for row in started[0].history if "val/mIoU" in row][-1]
    scores = {name: day for name, day, _ in table["data"]}
    assert scores["road"] == pytest.approx(last["val/day/IoU/road"], abs=1e-3)


def test_a_run_holds_confusion_matrices_and_pictures_with_masks(started):
    (row,) = [row for row in started[0].history if "val/IoU_table/_type" in row][-1:]
    for name in ("day", "night"):
        assert (started[0].files / row[f"val/{name}/confusion_matrix/path"]).is_file()
        (masks, *_) = row[f"val/{name}/pictures/all_masks"]
        assert set(masks) == {"prediction", "truth"}
        assert all((started[0].files / mask["path"]).is_file() for mask in masks.values())
        assert row[f"val/{name}/pictures/captions"][0].startswith("random-")


def test_group_and_job_type_can_be_given_and_a_sweep_gives_the_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_RUN_ID", "given123")
    config = write_config(tmp_path / "c.yaml", tiny_config() | {"wandb": {"mode": "offline"}})
    main(["--config", str(config), "--wandb.group", "ablation", "--wandb.job_type", "probe"])
    (found,) = offline_runs(tmp_path / "runs/c")
    assert (found.run.run_group, found.run.job_type, found.run.run_id) == ("ablation", "probe", "given123")
    assert json.loads(Path("runs/c/run.json").read_text())["wandb_id"] == "given123"


@pytest.mark.parametrize(("number", "preempting"), [(10, True), (15, False)])
def test_a_run_that_a_signal_stopped_is_closed_and_preempting_only_if_it_is_queued_again(
    tmp_path, monkeypatch, number, preempting
):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path / "c.yaml", tiny_config() | {"wandb": {"mode": "offline"}})

    def stop(self, batch, batch_idx):
        raise Preempted(number, 0)

    with monkeypatch.context() as scope:
        scope.setattr("lightning_modules.supervised.Supervised.training_step", stop)
        with pytest.raises((SystemExit, Preempted)):
            main(["--config", str(config)])
    assert json.loads(Path("runs/c/run.json").read_text())["status"] == (
        "stopped by SIGUSR1" if preempting else "stopped by SIGTERM"
    )
    (found,) = offline_runs(tmp_path / "runs/c")
    assert bool(found.records["preempting"]) == preempting
    assert [end.exit_code for end in found.records["exit"]] == [1]


def test_each_name_in_the_docs_is_where_they_say(started):
    table = re.findall(
        r"^\| (`.+?) \| (history|summary|config) \|", (ROOT / "docs/wandb.md").read_text(), re.M
    )
    assert len(table) >= 8
    found = {
        "history": {name for row in started[0].history for name in row},
        "summary": set(started[0].summary),
        "config": set(started[0].config),
    }
    for cell, place in table:
        for name in re.findall("`(.+?)`", cell):
            real = name.replace("<set>", "day").replace("<class>", "road")
            assert {real, f"{real}/_type"} & found[place], f"{name} is not in the {place}"


# --- F21: no fault of wandb ends a training


def no_key(patch):
    """wandb asks for a key, and there is none."""


def no_network(patch):
    start = wandb.init

    def impatient(mode, settings, **options):
        settings.init_timeout = 1 if mode == "online" else settings.init_timeout
        return start(mode=mode, settings=settings, **options)

    patch.setenv("WANDB_API_KEY", "0" * 40)
    patch.setattr("wandb.init", impatient)


def init_raises(patch):
    start = wandb.init

    def fail(mode, **options):
        if mode == "online":
            raise RuntimeError("out of order")
        return start(mode=mode, **options)

    patch.setattr("wandb.init", fail)


def log_raises(patch):
    log, start, calls = Run.log, wandb.init, []

    def fail(self, data, *args, **kwargs):
        calls.append(data)
        if len(calls) > 3:
            raise OSError("no space left")
        return log(self, data, *args, **kwargs)

    patch.setattr(Run, "log", fail)
    patch.setattr("wandb.init", lambda mode, **options: start(mode="offline", **options))


@pytest.mark.parametrize("fault", [no_key, no_network, init_raises, log_raises])
def test_training_goes_on_with_local_logs_and_one_warning_and_the_data_is_kept(tmp_path, monkeypatch, fault):
    """F21."""
    wandb.teardown()
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nobody listens
    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fault(patch)
        config = tiny_config() | {"wandb": {"mode": "online"}}
        main(["--config", str(write_config(tmp_path / "c.yaml", config))])
        found = [run for run in offline_runs(tmp_path / "runs/c") if run.history]
    told = [str(warning.message) for warning in caught if "training goes on" in str(warning.message)]
    assert len(told) == 1, told
    assert json.loads(Path("runs/c/run.json").read_text())["status"] == "finished"
    assert len(Path("runs/c/metrics.csv").read_text().splitlines()) == 3  # the head and two steps
    assert any("train/loss" in name for row in found[-1].history for name in row)
    assert any("val/mIoU" in row for row in found[-1].history) or fault is log_raises


# --- sweeps


def test_the_parameters_of_each_sweep_are_options_and_each_of_its_runs_has_a_folder(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    paths = sorted((ROOT / "conf/sweeps").glob("*.yaml"))
    assert paths
    for path in paths:
        sweep = yaml.safe_load(path.read_text())
        given = {
            name: options.get("value", options["values"][0] if "values" in options else options.get("min"))
            for name, options in sweep["parameters"].items()
        }
        arguments = create_sweep_command_args({"args": {name: {"value": v} for name, v in given.items()}})
        words = []  # of the command, as wandb's agent puts it together
        for word in create_sweep_command(list(sweep["command"])):
            whole_macro = word.startswith("${") and word.endswith("}")
            words += arguments.get(word[2:-1], []) if whole_macro else [word]
        config = SegmentationCLI(words, build=False).config
        assert config.output == "runs/sweep/abc123" and config.resume, shlex.join(words)
        for name, value in given.items():
            section, option = name.split(".", 1)
            options = config[section].get("init_args", config[section])
            assert options[option] == value, name
        assert sweep["metric"]["name"] == config.checkpoints.monitor
        assert (ROOT / sweep["program"]).is_file()
