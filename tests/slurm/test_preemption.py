"""Runs on a real SLURM of two nodes: stopped and requeued, cancelled, as an array, and by torchrun."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import free_ports
from tests.slurm.conftest import MAX_STEPS, ROOT
from tests.tiny_training import assert_equal

pytestmark = pytest.mark.slurm


def test_a_run_on_two_nodes_is_saved_before_its_limit_requeued_once_and_ends_as_if_unbroken(jobs, unbroken):
    words = jobs.words("preempted", seconds=2)
    job = jobs.submit(*words, "--nodes", "2", "--gpus", "0", "--time", "30", "--signal-seconds", "120")
    jobs.wait("the first logged steps", (jobs.folder / "preempted/metrics.csv").exists, 300, job)
    # The limit comes nearer, in whole minutes, so that the signal is due when SLURM looks next (every 30 s).
    hours, minutes, seconds = map(int, jobs.state(job)["RunTime"].split(":"))
    limit = -(-(hours * 3600 + minutes * 60 + seconds + 90) // 60)
    jobs.command("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
    jobs.wait("the requeue", lambda: jobs.state(job)["Restarts"] == "1", 120, job)
    jobs.wait("the end of the first stretch", lambda: jobs.state(job)["JobState"] == "PENDING", 60, job)
    assert 0 < jobs.last("preempted")["global_step"] < MAX_STEPS
    assert jobs.record("preempted")["status"] == "stopped by SIGUSR1"
    # Else SLURM waits for two minutes.
    jobs.command("scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=30")
    jobs.wait("the end", lambda: jobs.state(job)["JobState"] in ("COMPLETED", "FAILED"), 300, job)
    state, record = jobs.state(job), jobs.record("preempted")
    log = Path(state["StdOut"]).read_text()
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("COMPLETED", "0:0", "1"), log
    assert jobs.controller_log().count(f"Requeuing JobId={job}\n") == 1
    assert (record["status"], record["step"], len(record["earlier"])) == ("finished", MAX_STEPS, 1)
    assert_equal(jobs.last("preempted")["state_dict"], unbroken["state_dict"])
    runs = [path.name.rsplit("-", 1)[1] for path in (jobs.folder / "preempted/wandb").glob("offline-run-*-*")]
    assert runs == [record["wandb_id"]] * 2  # both stretches belong to one run


def test_scancel_ends_a_run_with_its_last_step_saved_and_no_requeue(jobs):
    words = jobs.words("cancelled", seconds=1)
    job = jobs.submit(*words, "--nodes", "2", "--gpus", "0", "--time", "30")
    metrics = jobs.folder / "cancelled/metrics.csv"
    jobs.wait("the first logged steps", metrics.exists, 300, job)
    assert not (jobs.folder / "cancelled/checkpoints/last.ckpt").exists()
    jobs.command("scancel", job)
    jobs.wait("the end", lambda: jobs.state(job)["JobState"] == "CANCELLED", 90, job)
    state, record = jobs.state(job), jobs.record("cancelled")
    assert state["Restarts"] == "0"
    assert 0 < jobs.last("cancelled")["global_step"] == record["step"] < MAX_STEPS
    assert "Exited with exit code 143" in Path(state["StdOut"]).read_text()


def test_an_array_trains_one_run_for_each_seed(jobs):
    words = jobs.words(
        "seeds", max_steps=2, val_check_interval=2, accelerator="auto", num_nodes=1, strategy="auto"
    )
    job = jobs.submit(*words, "--gpus", "1", "--time", "30", "--seeds", "0", "3")
    for seed in (0, 3):
        own = f"{job}_{seed}"
        jobs.wait(f"the end of {own}", lambda own=own: jobs.state(own)["JobState"] == "COMPLETED", 180, own)
        assert (jobs.record(f"seeds/seed-{seed}")["seed"], jobs.record(f"seeds/seed-{seed}")["step"]) == (
            seed,
            2,
        )
        assert (jobs.folder / f"seeds/seed-{seed}/slurm-{job}.log").stat().st_size


def test_the_job_file_of_the_repository_works_as_it_stands(jobs):
    words = jobs.words("by hand", max_steps=2, val_check_interval=2)
    sizes = ["--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=2", "--time=30"]
    log = jobs.folder / "by hand.log"
    file = "scripts/slurm/train.sbatch"
    python = jobs.environment | {"PYTHON": sys.executable}
    done = subprocess.run(["sbatch", "--wait", f"--output={log}", *sizes, file, *words], cwd=ROOT, env=python)
    assert done.returncode == 0, log.read_text()
    assert (jobs.record("by hand")["step"], jobs.record("by hand")["world_size"]) == (2, 2)


def test_the_same_run_by_torchrun_on_two_nodes_ends_alike(jobs, unbroken):
    words = ["train.py", *jobs.words("torchrun")]
    (port,) = free_ports(1)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    launch += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test"]
    environment = {k: v for k, v in jobs.environment.items() if k != "MASTER_ADDR"}
    nodes = [subprocess.Popen([*launch, *words], cwd=ROOT, env=environment) for _ in range(2)]
    assert [node.wait(600) for node in nodes] == [0, 0]
    assert_equal(jobs.last("torchrun")["state_dict"], unbroken["state_dict"])
