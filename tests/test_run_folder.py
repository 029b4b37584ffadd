"""Who may write into a run's folder, and what of its checkpoints is whole."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time

import pytest
import torch

import run_folder
from callbacks.checkpoints import write_checkpoint
from config_files import UsageError
from run_folder import RunLock, load_checkpoint, sound_checkpoint


def write(path, value=1.0):
    weights = {"a": torch.full((1000,), value)}
    write_checkpoint({"config": "{}", "classes": {}, "state_dict": weights}, path)
    return path


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in the tensor, the largest part of the file
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "a bit": flip_a_bit,
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


@pytest.fixture
def checkpoints(tmp_path):
    write(tmp_path / "checkpoints/previous.ckpt", 1.0)
    write(tmp_path / "checkpoints/last.ckpt", 2.0)
    return tmp_path / "checkpoints"


def test_the_last_checkpoint_is_taken_where_it_is_whole(checkpoints):
    assert sound_checkpoint(checkpoints.parent) == checkpoints / "last.ckpt"


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_last_checkpoint_gives_way_to_the_one_before_with_a_warning(checkpoints, how):
    DAMAGE[how](checkpoints / "last.ckpt")
    with pytest.warns(UserWarning, match=r"last\.ckpt .* cannot be used.* from .*previous\.ckpt"):
        assert sound_checkpoint(checkpoints.parent) == checkpoints / "previous.ckpt"
    # Else the damaged file would take the place of the whole one at the next save.
    assert not (checkpoints / "last.ckpt").exists()
    assert load_checkpoint(checkpoints / "previous.ckpt")["state_dict"]["a"][0] == 1


@pytest.mark.parametrize("how", DAMAGE)
def test_without_any_whole_checkpoint_there_is_an_error_and_never_a_fresh_start(checkpoints, how):
    for name in ("last", "previous"):
        DAMAGE[how](checkpoints / f"{name}.ckpt")
    with pytest.raises(UsageError, match=r"last\.ckpt \(.*previous\.ckpt \(.*\n.*--overwrite"):
        sound_checkpoint(checkpoints.parent)


@pytest.mark.parametrize("how", ["truncated", "a bit", "empty"])
def test_a_damaged_checkpoint_that_is_named_is_an_error_that_names_the_others(checkpoints, how):
    DAMAGE[how](checkpoints / "last.ckpt")
    with pytest.raises(UsageError, match=r"last\.ckpt is damaged: .*\n.*previous\.ckpt"):
        load_checkpoint(checkpoints / "last.ckpt")


def test_a_second_run_is_refused_while_the_first_goes_on_and_told_who_holds_the_folder(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        held = {"host": socket.gethostname(), "pid": other.pid, "started": "2026-01-01", "job": None}
        (tmp_path / ".lock").write_text(json.dumps(held))
        with pytest.raises(UsageError, match=f"by process {other.pid} on {held['host']}, since 2026-01-01"):
            RunLock(tmp_path).take()
    finally:
        other.kill()
        other.wait()
    lock = RunLock(tmp_path)  # its process has ended
    lock.take()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    lock.release()
    assert not (tmp_path / ".lock").exists()


class SlowToDecide(RunLock):
    def holder(self, own):
        held = super().holder(own)
        time.sleep(0.1)
        return held


@pytest.mark.parametrize("stale", [False, True])
def test_of_several_runs_that_start_at_once_one_takes_the_folder(tmp_path, stale):
    context = multiprocessing.get_context("fork")
    together, answers, end = context.Barrier(4), context.Queue(), context.Event()

    def take():
        together.wait()
        try:
            SlowToDecide(tmp_path).take()
            answers.put(os.getpid())
        except UsageError:
            answers.put(None)
        end.wait()  # a process that has ended holds nothing

    if stale:
        held = {"host": socket.gethostname(), "pid": 2**22 + 1, "started": "2026-01-01", "job": None}
        (tmp_path / ".lock").write_text(json.dumps(held))
    processes = [context.Process(target=take) for _ in range(4)]
    for process in processes:
        process.start()
    winners = {answers.get(timeout=60) for _ in processes} - {None}
    assert len(winners) == 1 and json.loads((tmp_path / ".lock").read_text())["pid"] in winners
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]
    end.set()
    for process in processes:
        process.join()


@pytest.mark.parametrize(
    ("age", "job", "own_job", "stale"),
    [
        (0, None, None, False),
        (10**4, None, None, True),  # not touched for hours
        (0, "17", "17", True),  # this job, started again on another node
        (0, "17", "18", False),
    ],
)
def test_a_lock_of_another_host_is_stale_when_untouched_or_of_this_job(
    tmp_path, monkeypatch, age, job, own_job, stale
):
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "2026-01-01", "job": job}))
    os.utime(path, (time.time() - age, time.time() - age))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if own_job:
        monkeypatch.setenv("SLURM_JOB_ID", own_job)
    lock = RunLock(tmp_path)
    if stale:
        lock.take()
        lock.release()
    else:
        with pytest.raises(UsageError, match="on elsewhere"):
            lock.take()
        lock.release()  # of a lock that was not taken: leaves the other's
        assert path.exists()


def test_a_lock_is_touched_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "HEARTBEAT", 0.01)
    lock = RunLock(tmp_path)
    lock.take()
    os.utime(lock.path, (0, 0))
    for _ in range(100):
        time.sleep(0.02)
        if lock.path.stat().st_mtime > 0:
            break
    assert lock.path.stat().st_mtime > 0
    lock.release()
