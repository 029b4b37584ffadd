"""Jobs are checked before they are queued; `sbatch` is a script that notes how it was called."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lightning.fabric.plugins.environments import SLURMEnvironment

from cli import SegmentationCLI
from config_files import UsageError, read_yaml
from scripts.slurm.submit import main, seconds
from tests.tiny_run import tiny_config, write_config

ROOT = Path(__file__).parent.parent.parent.parent
TWO_NODES = ["--trainer.num_nodes", "2", "--trainer.devices", "3"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder with tiny.yaml, and in front of PATH an sbatch and an srun that note their words."""
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "tiny.yaml", tiny_config())
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, answer in (("sbatch", "echo '41;somewhere'"), ("srun", "")):
        (programs / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/{name}.words\n{answer}\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return tmp_path


def submit(*words: str) -> None:
    main(["--config", "tiny.yaml", "--time", "1:00:00", *words])


def options(path: str) -> list[str]:
    """What a job file asks of sbatch, as sbatch reads it."""
    lines = re.findall(r"(?m)^#SBATCH (.*)$", Path(path).read_text())
    return [word for line in lines for word in shlex.split(line)]


def run(path: str, **environment: str) -> list[str]:
    """Run a job file with the srun that notes; return srun's words."""
    subprocess.run(["bash", path], check=True, env={"PATH": "bin:/usr/bin:/bin", **environment})
    return Path("srun.words").read_text().splitlines()


def test_a_job_is_written_into_its_run_folder_and_submitted(place, capsys):
    submit("--output", "runs/two words", "--model.lr", "0.5", "--gpus", "0")
    assert "Submitted batch job 41 " in capsys.readouterr().out
    assert (place / "sbatch.words").read_text().splitlines() == ["--parsable", "runs/two words/job.sbatch"]
    assert options("runs/two words/job.sbatch") == [
        "--job-name=two words",
        f"--chdir={place}",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--cpus-per-task=1",
        "--time=1:00:00",
        "--signal=USR1@120",
        "--open-mode=append",
        "--output=runs/two words/slurm-%j.log",
        "--requeue",
    ]
    words = ["--config", "tiny.yaml", "--output", "runs/two words", "--model.lr", "0.5", "--resume"]
    assert run("runs/two words/job.sbatch") == ["--kill-on-bad-exit=1", sys.executable, "train.py", *words]
    assert not SegmentationCLI(words, build=False).config.overwrite  # train.py understands them


def test_every_option_reaches_sbatch(place, capsys):
    submit(
        *["--trainer.accelerator", "gpu", *TWO_NODES, "--nodes", "2", "--gpus", "3", "--cpus", "7"],
        *[
            "--partition",
            "long",
            "--account",
            "us",
            "--no-requeue",
            "--name",
            "trial",
            "--signal-seconds",
            "60",
        ],
        *["--sbatch-arg=--mem=64G", "--sbatch-arg=--exclusive", "--dry-run", "--data.num_workers", "4"],
    )
    found = options("runs/tiny/job.sbatch")
    expected = (
        "--nodes=2 --ntasks-per-node=3 --gpus-per-node=3 --cpus-per-task=7 --partition=long --account=us"
    )
    expected += " --no-requeue --job-name=trial --signal=USR1@60 --mem=64G --exclusive"
    assert set(expected.split()) < set(found) and "--requeue" not in found
    assert not (place / "sbatch.words").exists()
    assert "sbatch runs/tiny/job.sbatch" in capsys.readouterr().out


def test_each_process_gets_a_cpu_for_each_data_worker_and_one_more(place):
    submit("--gpus", "0", "--data.num_workers", "4")
    assert "--cpus-per-task=5" in options("runs/tiny/job.sbatch")
    environment = {"SLURM_CPUS_PER_TASK": "5"}
    Path("bin/srun").write_text('#!/bin/sh\necho "$SRUN_CPUS_PER_TASK $OMP_NUM_THREADS" > srun.words\n')
    assert run("runs/tiny/job.sbatch", **environment) == ["5 5"]
    assert run("runs/tiny/job.sbatch", **environment, OMP_NUM_THREADS="2") == ["5 2"]


def test_seeds_become_an_array_with_a_run_folder_for_each(place):
    submit("--output", "runs/many", "--gpus", "0", "--seeds", "0", "4")
    found = options("runs/many/job.sbatch")
    assert "--array=0,4" in found and "--output=runs/many/seed-%a/slurm-%A.log" in found
    assert (place / "runs/many/seed-0").is_dir() and (place / "runs/many/seed-4").is_dir()
    words = run("runs/many/job.sbatch", SLURM_ARRAY_TASK_ID="4")[3:]
    config = SegmentationCLI(words, build=False).config
    assert (config.seed_everything, config.output, config.resume) == (4, "runs/many/seed-4", True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 5400), ("2:30", 150), ("1:02:03", 3723), ("1-2", 93600), ("1-2:3", 93780), ("1-0:0:5", 86405)],
)
def test_times_are_read_as_slurm_does(text, expected):
    assert seconds(text) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--time", "1h"], r"--time \(given: 1h\).*\n.*1:30:00"),
        (["--time", "0"], "no time at all"),
        (["--time", "3:00"], r"120 s \(--signal-seconds\) before"),
        (["--signal-seconds", "0"], r"--signal-seconds \(given: 0\) must be 1 or more"),
        (["--seeds", "1", "1"], "different numbers"),
        (["--seeds", "-1"], "none below 0"),
        (["--seeds", "1", "--seed_everything", "2"], "both give the seed"),
        (["--overwrite"], "delete the run each time"),
        (["--model.lrr", "1"], r"Did you mean model\.lr\?"),
        (["--config", "tyni.yaml"], "does not exist"),
        (["--gpus", "4", *TWO_NODES], r"2 node\(s\) with 3 process"),
        (["--nodes", "4", *TWO_NODES], r"4 node\(s\) with 0 GPU.* each, the config for 2 node"),
        (["--gpus", "1", "--trainer.accelerator", "cpu"], "accelerator 'cpu'"),
        (["--gpus", "0", "--trainer.accelerator", "gpu", "--trainer.devices", "1"], "accelerator 'gpu'"),
        (["--trainer.accelerator", "gpu"], "neither --gpus nor trainer.devices"),
        (["--data.api_key", "abcdefgh"], r"secret.*\n.*oc\.env"),
        (["--output", "tiny.yaml/below"], "cannot be written"),
    ],
)
def test_a_mistake_is_told_before_anything_is_queued(place, words, message):
    with pytest.raises(UsageError, match=message):
        submit(*words)
    assert not (place / "sbatch.words").exists()


@pytest.mark.parametrize(
    ("devices", "accelerator", "gpus"),
    [("2", "gpu", 2), ("[0,1]", "gpu", 2), ("-1", "gpu", 2), ("auto", "auto", 2)],
)
def test_the_number_of_processes_is_that_of_the_gpus(place, devices, accelerator, gpus):
    submit("--gpus", str(gpus), "--trainer.devices", devices, "--trainer.accelerator", accelerator)
    assert {"--ntasks-per-node=2", "--gpus-per-node=2"} < set(options("runs/tiny/job.sbatch"))


def test_a_secret_stays_in_the_environment(place, monkeypatch):
    monkeypatch.setenv("THEIR_KEY", "abcdefgh")
    submit("--gpus", "0", "--data.api_key", "${oc.env:THEIR_KEY}")
    text = Path("runs/tiny/job.sbatch").read_text()
    assert "abcdefgh" not in text and "'${oc.env:THEIR_KEY}'" in text


def hold_a_run(folder: Path, step: int, finished: bool = True, **changed) -> None:
    words = ["--config", "tiny.yaml", *(word for k, v in changed.items() for word in (f"--{k}", str(v)))]
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(SegmentationCLI(words, build=False).resolved()))
    # A run may have made its last step and still lack it: its last save can have failed.
    record = {"step": step, "status": "finished" if finished else "failed: SaveError"}
    (folder / "run.json").write_text(json.dumps(record))


def test_a_folder_with_a_run_needs_resume_and_the_same_options(place):
    hold_a_run(place / "runs/tiny/seed-1", 1, seed_everything=1)
    with pytest.raises(UsageError, match="seed-1 holds a run"):
        submit("--gpus", "0", "--seeds", "0", "1")
    with pytest.raises(UsageError, match=r"model\.init_args\.lr"):
        submit("--gpus", "0", "--seeds", "0", "1", "--resume", "--model.lr", "0.7")
    submit("--gpus", "0", "--seeds", "0", "1", "--resume")
    assert "--array=0,1" in options("runs/tiny/job.sbatch")


def test_a_finished_run_is_not_queued_unless_it_has_more_to_do(place):
    hold_a_run(place / "runs/tiny", 2)
    with pytest.raises(UsageError, match="has finished: step 2 is its last"):
        submit("--gpus", "0", "--resume")
    submit("--gpus", "0", "--resume", "--trainer.max_steps", "3")
    hold_a_run(place / "other", 2, finished=False)
    submit("--gpus", "0", "--resume", "--output", "other")


def test_what_sbatch_refuses_and_its_absence_are_told(place, monkeypatch):
    (place / "bin/sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    with pytest.raises(UsageError, match=r"refuses runs/tiny/job\.sbatch: sbatch: error: invalid partition"):
        submit("--gpus", "0")
    (place / "bin/sbatch").unlink()
    monkeypatch.setenv("PATH", str(place / "bin"))
    with pytest.raises(UsageError, match=r"is written, .* but there is no sbatch"):
        submit("--gpus", "0", "--resume")


def test_the_overlay_and_the_job_file_of_the_repository_ask_for_the_same(monkeypatch):
    trainer = read_yaml(ROOT / "conf/slurm.yaml")["trainer"]
    asked = dict(word.split("=") for word in options(ROOT / "scripts/slurm/train.sbatch") if "=" in word)
    assert int(asked["--nodes"]) == trainer["num_nodes"]
    assert int(asked["--ntasks-per-node"]) == int(asked["--gpus-per-node"]) == trainer["devices"]
    # Lightning has the last word.
    monkeypatch.setenv("SLURM_NNODES", asked["--nodes"])
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", asked["--ntasks-per-node"])
    SLURMEnvironment.validate_settings(None, trainer["devices"], trainer["num_nodes"])


def test_the_overlay_turns_an_experiment_into_one_of_several_nodes(place):
    files = ["--config", "tiny.yaml", "--config", str(ROOT / "conf/slurm.yaml")]
    config = SegmentationCLI(files, build=False).config
    assert (config.trainer.num_nodes, config.trainer.devices, config.trainer.strategy) == (2, 4, "ddp")
    assert config.trainer.sync_batchnorm and config.checkpoints.every_n_steps == 500
    submit(*files)
    assert {"--nodes=2", "--gpus-per-node=4"} < set(options("runs/tiny/job.sbatch"))
