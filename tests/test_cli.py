import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml

from config_files import UsageError, parse_yaml
from tests.tiny_run import tiny_config, write_config
from train import main

ROOT = Path(__file__).parent.parent


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return str(write_config(tmp_path / "tiny.yaml", tiny_config()))


def error_of(args, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()
    start = next(i for i, line in enumerate(message) if line.startswith("error: "))
    assert len(message) - start <= 3, message
    return "\n".join(message[start:])


def resolved(args) -> dict:
    from cli import SegmentationCLI

    return SegmentationCLI(args, build=False).resolved()


# --- what a command does


def test_a_run_leaves_configs_metrics_checkpoints_and_a_finished_record(config):
    main(["--config", config])
    folder = Path("runs/tiny")
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {
        "config_as_given.yaml",
        "config.yaml",
        "run.json",
        "metrics.json",
        "metrics.md",
        "metrics.csv",
    } <= files
    assert {"checkpoints/last.ckpt", "checkpoints/best.ckpt"} <= files
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["step"], record["seed"]) == ("finished", 2, 0)
    assert set(json.loads((folder / "metrics.json").read_text())["val"]["sets"]) == {"day", "night"}


def test_an_override_changes_what_another_key_interpolates(config):
    assert resolved(["--config", config])["model"]["init_args"]["classes"] == "deliver11"
    found = resolved(["--config", config, "--data.init_args.classes", "mini_objects"])
    assert found["model"]["init_args"]["classes"] == "mini_objects"


def test_an_overlay_changes_what_another_key_interpolates_and_leaves_the_rest(config, tmp_path):
    overlay = write_config(tmp_path / "o.yaml", {"data": {"init_args": {"classes": "mini_objects"}}})
    found = resolved(["--config", config, "--config", str(overlay)])
    assert found["model"]["init_args"]["classes"] == "mini_objects"
    assert found["data"]["init_args"]["batch_size"] == 2 and found["model"]["init_args"]["lr"] == 0.01


def test_short_overrides_reach_nested_constructors(config):
    found = resolved(["--config", config, "--model.lr", "1e-5", "--model.network.width", "8"])["model"][
        "init_args"
    ]
    assert found["lr"] == 1e-5 and found["network"]["init_args"]["width"] == 8


def test_output_and_seed_are_taken_from_the_command(config):
    main(["--config", config, "--output", "elsewhere/a b é", "--seed_everything", "7"])
    assert json.loads(Path("elsewhere/a b é/run.json").read_text())["seed"] == 7
    assert not Path("runs").exists()


def test_another_seed_gives_other_weights_and_the_same_seed_the_same(config):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        main(["--config", config, "--output", name, "--seed_everything", seed])
    a, b, c = (torch.load(f"{n}/checkpoints/last.ckpt")["state_dict"]["network.head.weight"] for n in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_folder_that_holds_a_run_is_refused_before_anything_is_built(config, capsys):
    main(["--config", config])
    before = Path("runs/tiny/run.json").read_text()
    message = error_of(["--config", config, "--data.root", "not built, so not missed"], capsys)
    assert "runs/tiny holds a run" in message and "--resume" in message and "--overwrite" in message
    assert Path("runs/tiny/run.json").read_text() == before


def test_a_run_writes_into_its_folder_alone(config, tmp_path, monkeypatch):
    """F13."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    main(["--config", config, "--output", "out/run"])
    written = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert written and {p for p in written if "out/run/" not in str(p)} == {tmp_path / "tiny.yaml"}


def test_overwrite_deletes_the_run_and_nothing_else(config):
    main(["--config", config])
    Path("runs/tiny/notes.txt").write_text("mine")
    Path("runs/tiny/pictures").mkdir(exist_ok=True)
    Path("runs/tiny/pictures/old.png").write_text("old")
    main(["--config", config, "--overwrite", "--trainer.max_steps", "1"])
    assert json.loads(Path("runs/tiny/run.json").read_text())["step"] == 1
    assert Path("runs/tiny/notes.txt").exists() and not Path("runs/tiny/pictures/old.png").exists()


def test_resume_goes_on_and_ends_with_the_weights_of_one_run(config):
    main(["--config", config, "--output", "whole", "--trainer.max_steps", "4"])
    main(["--config", config, "--output", "parts"])
    main(["--config", config, "--output", "parts", "--trainer.max_steps", "4", "--resume"])
    whole, parts = (torch.load(f"{name}/checkpoints/last.ckpt") for name in ("whole", "parts"))
    assert parts["global_step"] == 4
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, parts["state_dict"][name]), name
    assert len(json.loads(Path("parts/run.json").read_text())["earlier"]) == 1
    assert Path("whole/metrics.csv").read_text() == Path("parts/metrics.csv").read_text()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--model.lr", "0.5"], ["model.init_args.lr ('0.01' -> '0.5')"]),
        (["--data.batch_size", "3"], ["data.init_args.batch_size ('2' -> '3')"]),
        (["--seed_everything", "7"], ["seed_everything ('0' -> '7')"]),
        (
            ["--model.schedule", "lightning_modules.schedules.WarmupPoly"],
            ["schedule ('None' -> "],
        ),
    ],
)
def test_resuming_with_another_model_data_or_seed_is_refused(config, capsys, words, parts):
    main(["--config", config])
    record = Path("runs/tiny/run.json").read_text()
    message = error_of(["--config", config, "--trainer.max_steps", "4", "--resume", *words], capsys)
    assert [part for part in [*parts, "--output DIR"] if part not in message] == [], message
    assert Path("runs/tiny/run.json").read_text() == record


def test_resuming_with_other_speed_evaluation_or_record_goes_on(config):
    main(["--config", config, "--data.api_key", "secret-one"])
    words = ["--data.num_workers", "1", "--data.eval_batch_size", "1", "--data.api_key", "secret-two"]
    words += ["--checkpoints.every_n_steps", "1", "--wandb.project", "other", "--trainer.max_steps", "3"]
    main(["--config", config, "--resume", *words])
    assert json.loads(Path("runs/tiny/run.json").read_text())["step"] == 3


def test_what_differs_is_listed_to_the_depth_at_which_it_differs():
    from config_files import differences

    old = {"a": {"b": 1, "c": {"d": [1, 2]}}, "e": None, "same": {"x": 1}}
    new = {"a": {"b": 2, "c": {"d": [1, 3]}}, "e": {"f": 1}, "same": {"x": 1}, "g": 4}
    assert differences(old, new) == [
        ("a.b", 1, 2),
        ("a.c.d", [1, 2], [1, 3]),
        ("e", None, {"f": 1}),
        ("g", "nothing", 4),
    ]


def test_a_run_of_another_method_is_refused_and_what_differs_is_named(config, capsys):
    """F10."""
    main(["--config", config])
    other = yaml.safe_load(Path(config).read_text())
    other["model"]["class_path"] = "lightning_modules.supervised.SourceOnly"
    write_config(Path(config), other)
    message = error_of(["--config", config, "--trainer.max_steps", "4", "--resume"], capsys)
    assert "class_path ('lightning_modules.supervised.Supervised' -> 'lightning_modules" in message, message


def test_many_changes_are_counted_and_ten_of_them_named():
    from run_folder import check_unchanged

    old = {"model": {f"m{i}": 1 for i in range(9)}, "data": {f"d{i}": 1 for i in range(4)}}
    new = {"model": {f"m{i}": 2 for i in range(9)}, "data": {f"d{i}": 2 for i in range(4)}}
    with pytest.raises(UsageError, match=r"data\.d0 .* and 3 more\.") as error:
        check_unchanged(old, new)
    assert len(str(error.value).splitlines()) == 3 and "d1" not in str(error.value)


def test_a_trial_run_keeps_nothing_and_says_so(config, capsys, tmp_path):
    main(["--config", config, "--trainer.fast_dev_run", "true"])
    printed = capsys.readouterr().out
    assert "Nothing was kept" in printed and "metrics.md" not in printed
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize("option", ["--resume", "--overwrite"])
def test_a_trial_run_leaves_the_run_of_the_folder_alone(config, capsys, option):
    main(["--config", config])
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    main(["--config", config, "--trainer.fast_dev_run", "true"])
    assert f"{option}" in error_of(["--config", config, "--trainer.fast_dev_run", "true", option], capsys)
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")} == before


def test_a_run_without_checkpoints_is_refused_before_its_folder_is_made(config, capsys):
    message = error_of(["--config", config, "--trainer.enable_checkpointing", "false"], capsys)
    assert "trainer.enable_checkpointing" in message and "Leave it out" in message
    assert not Path("runs").exists()


def test_resuming_a_finished_run_says_so_and_succeeds(config, capsys):
    main(["--config", config])
    main(["--config", config, "--resume"])
    assert "already finished: step 2" in capsys.readouterr().out.replace("has ", "")


@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_whose_last_validation_was_broken_off_repeats_it(config, capsys, damaged):
    main(["--config", config])
    folder = Path("runs/tiny")
    scores = (folder / "metrics.json").read_text()
    if damaged:  # the one before was saved between the last step and its validation
        (folder / "checkpoints/last.ckpt").write_bytes(b"")
    else:
        (folder / "checkpoints/previous.ckpt").rename(folder / "checkpoints/last.ckpt")
    (folder / "metrics.json").unlink()
    with pytest.warns(UserWarning, match="cannot be used") if damaged else nullcontext():
        main(["--config", config, "--resume"])
    assert "already finished" not in capsys.readouterr().out
    assert (folder / "metrics.json").read_text() == scores
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["step"]) == ("finished", 2)
    main(["--config", config, "--resume"])
    assert "already finished: step 2" in capsys.readouterr().out.replace("has ", "")


def test_resuming_a_run_without_checkpoint_says_that_it_begins(config, capsys):
    main(["--config", config])
    shutil.rmtree("runs/tiny/checkpoints")
    main(["--config", config, "--resume"])
    assert "no checkpoint yet: the run begins with its first step" in capsys.readouterr().err


def test_a_checkpoint_of_weights_only_cannot_be_resumed(config, capsys):
    main(["--config", config])
    path = Path("runs/tiny/checkpoints/last.ckpt")
    checkpoint = torch.load(path)
    torch.save({k: v for k, v in checkpoint.items() if k != "optimizer_states"}, path)
    message = error_of(["--config", config, "--trainer.max_steps", "4", "--resume"], capsys)
    assert "holds weights only" in message and "test.py" in message


def test_resume_without_a_checkpoint_starts_at_the_first_step(config):
    main(["--config", config, "--resume"])
    assert json.loads(Path("runs/tiny/run.json").read_text())["step"] == 2


def test_a_short_trial_of_a_long_experiment_still_ends_with_a_validation(config):
    main(["--config", config, "--trainer.val_check_interval", "500"])
    assert json.loads(Path("runs/tiny/metrics.json").read_text())["val"]["step"] == 2


def test_a_section_of_the_yaml_configures_the_checkpoints(config):
    main(["--config", config, "--checkpoints.monitor", "val/nothing"])
    assert not Path("runs/tiny/checkpoints/best.ckpt").exists()


# --- mistakes


def test_an_unknown_key_of_the_model_suggests_the_nearest(config, capsys):
    message = error_of(["--config", config, "--model.lrr", "1"], capsys)
    assert "model.lrr" in message and "given: 1" in message and "Did you mean model.lr?" in message


def test_an_unknown_key_in_a_file_suggests_the_nearest(config, capsys, tmp_path):
    overlay = write_config(
        tmp_path / "o.yaml", {"model": {"init_args": {"network": {"init_args": {"widht": 12}}}}}
    )
    message = error_of(["--config", config, "--config", str(overlay)], capsys)
    assert (
        "model.network.widht" in message
        and "given: 12" in message
        and "Did you mean model.network.width?" in message
    )


@pytest.mark.parametrize(
    ("words", "key", "guess"),
    [
        (["--trainer.max_stepz", "3"], "trainer.max_stepz", "trainer.max_steps"),
        (["--wandb.mod=offline"], "wandb.mod", "wandb.mode"),
        (["--outptu", "x"], "outptu", "output"),
    ],
)
def test_an_unknown_key_elsewhere_suggests_the_nearest(config, capsys, words, key, guess):
    message = error_of(["--config", config, *words], capsys)
    assert f"{key} " in message and f"Did you mean {guess}?" in message


def test_an_unknown_section_in_a_file_suggests_the_nearest(config, capsys, tmp_path):
    overlay = write_config(tmp_path / "o.yaml", {"trainr": {"max_steps": 3}})
    message = error_of(["--config", config, "--config", str(overlay)], capsys)
    assert "trainr.max_steps" in message and "Did you mean trainer.max_steps?" in message


def test_a_value_of_the_wrong_type_names_key_value_and_type(config, capsys):
    message = error_of(["--config", config, "--model.lr", "fast"], capsys)
    assert "model.lr " in message and "'fast'" in message and "float" in message
    message = error_of(["--config", config, "--trainer.max_steps", "many"], capsys)
    assert "trainer.max_steps " in message and "'many'" in message and "int" in message


@pytest.mark.parametrize(
    "wrong", ["lightning_modules.supervised.Supervized", "lightning_modules.supervized.Supervised"]
)
def test_an_unknown_class_path_suggests_a_class_of_the_project(config, capsys, tmp_path, wrong):
    overlay = write_config(tmp_path / "o.yaml", {"model": {"class_path": wrong}})
    message = error_of(["--config", config, "--config", str(overlay)], capsys)
    assert wrong in message and "Did you mean lightning_modules.supervised.Supervised?" in message


SCHEDULE = {"class_path": "lightning_modules.schedules.WarmupPoly", "init_args": {"warmup_steps": 3}}


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ["--model.schedule.warmup_stepz", "5"],
            ["model.schedule.warmup_stepz", "5", "mean model.schedule.warmup_steps?"],
        ),
        (["--model.schedule.warmup_steps", "x"], ["model.schedule.warmup_steps ", "'x'", "expected int"]),
        (
            ["--model.schedule", "lightning_modules.schedules.WarmupPoli"],
            ["mean lightning_modules.schedules.WarmupPoly?"],
        ),
        (["--checkpoints.mode", "mix"], ["checkpoints.mode ", "'mix'", "'min', 'max'", "mean min?"]),
        (["--trainer.precision", "b16"], ["trainer.precision ", "'b16'", "mean bf16"]),
        (["--seed_everything", "x"], ["seed_everything ", "'x'", "bool or int"]),
        (["--model.lr_multipliers", "3"], ["model.lr_multipliers ", "'3'", "expected dict"]),
        (["--trainer.accelerator", "gpu"], ["No supported gpu backend"]),
    ],
)
def test_mistakes_in_nested_objects_choices_and_the_trainer_are_told_in_short(
    tmp_path, capsys, monkeypatch, words, parts
):
    if "gpu" in words and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    config = tiny_config()
    config["model"]["init_args"]["schedule"] = SCHEDULE
    message = error_of(["--config", str(write_config(tmp_path / "c.yaml", config)), *words], capsys)
    assert [part for part in parts if part not in message] == [], message


def test_a_class_of_the_wrong_kind_is_refused(config, capsys):
    message = error_of(["--config", config, "--model", "tests.tiny_run.TinyNetwork"], capsys)
    assert "model" in message and "tests.tiny_run.TinyNetwork" in message


def test_a_missing_required_key_is_named(capsys, tmp_path):
    config = tiny_config()
    del config["model"]["init_args"]["classes"]
    message = error_of(["--config", str(write_config(tmp_path / "c.yaml", config))], capsys)
    assert "classes" in message and "lightning_modules.supervised.Supervised" in message


def test_an_interpolation_of_nothing_names_both_ends(capsys, tmp_path):
    config = tiny_config()
    config["model"]["init_args"]["classes"] = "${data.init_args.clases}"
    message = error_of(["--config", str(write_config(tmp_path / "c.yaml", config))], capsys)
    assert "data.init_args.clases" in message and "model.init_args.classes" in message


def test_a_missing_data_root_is_shown_as_the_data_module_says_it(config, capsys):
    message = error_of(["--config", config, "--data.root", "/no/such/folder"], capsys)
    assert message.startswith("error: TinyData has no folder /no/such/folder. Set data.init_args.root")


def test_data_of_another_class_table_is_refused(config, capsys):
    message = error_of(["--config", config, "--model.classes", "mini_objects"], capsys)
    assert "'mini_objects'" in message and "'deliver11'" in message


def test_a_run_without_an_end_is_refused(config, capsys):
    assert "trainer.max_steps" in error_of(["--config", config, "--trainer.max_steps", "-1"], capsys)


def test_an_output_that_cannot_be_written_is_named(config, capsys):
    message = error_of(["--config", config, "--output", config + "/below-a-file"], capsys)
    assert "below-a-file" in message and "cannot be written" in message


def test_resume_and_overwrite_exclude_each_other(config, capsys):
    assert "one of the two" in error_of(["--config", config, "--resume", "--overwrite"], capsys)


def test_a_damaged_checkpoint_is_an_error_and_no_fresh_start(config, capsys):
    main(["--config", config])
    for name in ("last", "previous"):
        Path(f"runs/tiny/checkpoints/{name}.ckpt").write_bytes(b"damaged")
    message = error_of(["--config", config, "--resume"], capsys)
    assert "last.ckpt (" in message and "previous.ckpt (" in message and "--overwrite" in message


def test_a_bug_keeps_its_traceback(config, monkeypatch):
    def fail(self, batch, batch_idx):
        raise ValueError("a bug in the middle of training")

    monkeypatch.setattr("lightning_modules.supervised.Supervised.training_step", fail)
    with pytest.raises(ValueError, match="a bug in the middle"):
        main(["--config", config])
    assert json.loads(Path("runs/tiny/run.json").read_text())["status"].startswith(
        "failed: ValueError: a bug"
    )


# --- YAML


def test_a_missing_config_suggests_the_nearest_file(config, capsys):
    assert "Did you mean tiny.yaml?" in error_of(["--config", "tinny.yaml"], capsys)
    assert "needs the path" in error_of(["--config"], capsys)
    assert "no config is given" in error_of([], capsys)


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        (
            "a: 1\nb: !!python/object/apply:os.system ['touch owned']\n",
            2,
            "!!python/object/apply:os.system is refused",
        ),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", 4, "'c' is given twice"),
        ("a: 1\nb:\n\tc: 1\n", 3, "a tab character"),
        ("a: 1\nb: [1, 2\nc: 3\n", 3, "expected"),
    ],
)
def test_faulty_yaml_names_file_line_and_problem(text, line, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as error:
        parse_yaml(text, "faulty.yaml")
    assert str(error.value).startswith(f"faulty.yaml:{line}: ") and problem in str(error.value)
    assert not Path("owned").exists()


def test_a_list_is_no_config():
    with pytest.raises(UsageError, match="found list"):
        parse_yaml("- 1\n", "x.yaml")


def test_merge_keys_are_no_duplicates():
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, x: 2}\n", "x.yaml")["b"] == {"x": 2}


def cpu_seconds_of_children() -> float:
    """Unlike the clock on the wall, the same on a busy machine."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model:\n\tclass_path: x\n", "bad.yaml:2: a tab character"),
        ("a: 1\na: 2\n", "bad.yaml:2: the key 'a' is given twice"),
        ("a: !!python/name:os.system x\n", "bad.yaml:1: the tag !!python/name:os.system is refused"),
        (None, "bad.yaml"),
    ],
    ids=["tab", "duplicate key", "tag", "missing overlay"],
)
def test_faulty_yaml_is_found_in_less_than_three_seconds_without_importing_torch(tmp_path, text, told):
    """F12."""
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("seed_everything: 1\n")
    if text is not None:
        bad.write_text(text)
    words = ["--config", str(good), "--config", str(bad)]
    code = f"import sys, train\ntry:\n train.main({words!r})\n"
    code += "except SystemExit as stop:\n assert 'torch' not in sys.modules\n sys.exit(stop.code)"
    start = cpu_seconds_of_children()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert cpu_seconds_of_children() - start < 3
    assert done.returncode == 2 and told in done.stderr, done.stderr


@pytest.mark.slow
def test_the_command_ends_with_exit_code_two_and_three_lines(config):
    command = [sys.executable, str(ROOT / "train.py"), "--config", config, "--model.lrr", "1"]
    start = cpu_seconds_of_children()
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."}
    )
    assert cpu_seconds_of_children() - start < 20
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) <= 3, done.stderr
    assert "Did you mean model.lr?" in done.stderr


def test_print_config_shows_what_results(config, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--config", config, "--model.lr", "0.25", "--print_config"])
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["lr"] == 0.25
