import json
import sys

import pytest

from config_files import UsageError
from scripts import experiments
from scripts.experiments import main, read_plan, run_folder


@pytest.fixture
def commands(monkeypatch):
    """Commands that would run; each leaves the files that the real one leaves."""
    ran = []

    def run(command, stdout, stderr, env):
        ran.append((command[1:], env["OMP_NUM_THREADS"]))
        assert command[0] == sys.executable
        if command[1] == "train.py":
            folder = experiments.Path(command[command.index("--output") + 1])
            folder.mkdir(exist_ok=True)
            (folder / "config.yaml").write_text(json.dumps(options(command[2:])))
        else:
            scores = {"sets": {"day": {"mIoU": 40.0}}, "mean": {"mIoU": 40.0}}
            place = experiments.Path(command[2]) / "test" / "own-last"
            place.mkdir(parents=True)
            (place / "metrics.json").write_text(json.dumps({"test": scores}))
        return type("Done", (), {"returncode": int("broken" in command)})

    def options(words):
        words = words[: words.index("--output")] if "--output" in words else words
        trainer = {"max_steps": 5}
        return {"seed_everything": 0, "model": {"words": words}, "data": {}, "trainer": trainer}

    class CLI:
        def __init__(self, words, build):
            self.words = words

        def resolved(self):
            return options(self.words)

    monkeypatch.setattr(experiments.subprocess, "run", run)
    monkeypatch.setattr(experiments, "SegmentationCLI", CLI)
    return ran


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(
        "depth: {source only: --config a.yaml, MADM: --config b.yaml --model.lr 1}\nevent: {x: broken}\n"
    )
    return path


def test_each_row_is_trained_and_scored_with_each_seed_and_not_twice(plan, tmp_path, commands, capsys):
    words = [str(plan), "--runs", str(tmp_path), "--only", "depth", "--seeds", "0", "1"]
    main([*words, "--output", str(tmp_path / "docs" / "table.md")])
    assert len(commands) == 8 and "| MADM | 2 | 40.0 ± 0.0 | 40.0 ± 0.0 |" in capsys.readouterr().out
    assert "### depth" in (tmp_path / "docs" / "table.md").read_text()
    first = [c for c, _ in commands if c[0] == "train.py"][1]
    assert first[1:5] == ["--config", "b.yaml", "--model.lr", "1"]
    assert first[first.index("--seed_everything") + 1] == "0"
    assert ["test.py", str(run_folder(tmp_path, "depth", "MADM", 1)), "--checkpoint", "last"] in [
        c for c, _ in commands
    ]
    main(words)
    assert len(commands) == 8


def test_a_finished_run_of_other_options_is_refused(plan, tmp_path, commands):
    words = [str(plan), "--runs", str(tmp_path), "--only", "depth", "--seeds", "0"]
    main(words)
    plan.write_text(plan.read_text().replace("--model.lr 1", "--model.lr 2"))
    with pytest.raises(UsageError, match=r"madm-0: model.words is .* and was .*lr', '1'.*Delete"):
        main(words)
    assert len(commands) == 4


def test_an_interrupted_run_is_resumed(plan, tmp_path, commands):
    run_folder(tmp_path, "depth", "MADM", 0).mkdir(parents=True)
    main([str(plan), "--runs", str(tmp_path), "--only", "depth", "--seeds", "0"])
    trained = {c[-2]: c[-1] for c, _ in commands if c[0] == "train.py" and "--resume" in c}
    assert len(trained) == 1


def test_jobs_share_the_cores(plan, tmp_path, commands, monkeypatch):
    monkeypatch.setattr(experiments.os, "cpu_count", lambda: 6)
    main([str(plan), "--runs", str(tmp_path), "--only", "depth", "--seeds", "0", "--jobs", "3"])
    assert {threads for _, threads in commands} == {"2"}


def test_a_failed_run_is_named(plan, tmp_path, commands):
    with pytest.raises(UsageError, match=r"train\.py broken .* failed: .*x-0\.log says why"):
        main([str(plan), "--runs", str(tmp_path), "--only", "event"])


def test_a_file_that_is_no_plan_and_an_unknown_title_are_refused(plan, tmp_path):
    (tmp_path / "other.yaml").write_text("model: {lr: 1}\n")
    with pytest.raises(UsageError, match="is no plan"):
        read_plan(tmp_path / "other.yaml", [])
    with pytest.raises(UsageError, match="no title 'fog': choose from depth, event"):
        read_plan(plan, ["fog"])
