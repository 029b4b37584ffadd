"""Processes that load data: signals to them, their death, and their end (F19)."""

import multiprocessing
import os
import re
import signal
import threading
import time
from itertools import islice
from pathlib import Path

import pytest

from datamodules.workers import WorkerLoader
from tests.faulty_data import FaultySamples
from tests.tiny_training import TinyDataModule, assert_equal


def workers() -> list[multiprocessing.Process]:
    return multiprocessing.active_children()


def send(number: int) -> None:
    """Signal all workers as a terminal or SLURM does, by another process, until they have taken it."""
    pids = [worker.pid for worker in workers()]
    os.spawnvp(os.P_WAIT, "kill", ["kill", f"-{int(number)}", *map(str, pids)])
    while any(is_pending(number, pid) for pid in pids):
        time.sleep(0.01)


def is_pending(number: int, pid: int) -> bool:
    pending = re.search(r"ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1]
    return bool(int(pending, 16) >> (number - 1) & 1)


def test_workers_outlive_signals_to_all_processes_and_end_at_once_with_their_loader():
    data = TinyDataModule(num_workers=2)
    loader = iter(data.train_dataloader())
    batches = [next(loader)]
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        send(number)
    time.sleep(0.2)
    batches += islice(loader, 5)
    assert_equal(batches, list(islice(TinyDataModule().train_dataloader(), 6)))
    assert len(workers()) == 2
    start = time.monotonic()
    del loader
    assert workers() == [] and time.monotonic() - start < 4


def test_workers_end_at_the_second_sigterm_of_others_and_at_the_first_of_the_main_process():
    loader = iter(TinyDataModule(num_workers=2).train_dataloader())
    next(loader)
    for worker in workers():
        worker.terminate()
    for worker in workers():
        worker.join(2)
    assert workers() == []
    del loader
    loader = iter(TinyDataModule(num_workers=1).train_dataloader())
    next(loader)
    send(signal.SIGTERM)
    next(loader)
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        send(signal.SIGTERM)
        for _ in range(100):
            next(loader)
    del loader
    assert workers() == []


@pytest.mark.parametrize("timeout", [0, 300])
def test_a_dead_worker_is_an_error_with_its_signal_where_its_batch_is_waited_for(timeout):
    loader = WorkerLoader(range(100), num_workers=2, timeout=timeout)
    batches = iter(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    assert not callable(handler)  # torch's own would raise at any instruction
    next(batches)
    for worker in workers():
        worker.kill()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="is killed by signal: Killed"):
        list(batches)
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_a_hung_worker_is_an_error_after_the_timeout(tmp_path):
    batches = iter(WorkerLoader(FaultySamples(tmp_path, 0, "sleeps"), num_workers=1, timeout=1.5))
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"timed out after 1\.5 seconds"):
        next(batches)
    assert time.monotonic() - start > 1.4


def test_a_worker_that_dies_with_the_lock_of_the_end_is_an_error_and_the_loader_ends():
    batches = iter(WorkerLoader(range(100), num_workers=2))
    next(batches)
    lock = batches._workers_done_event._cond
    lock.acquire()
    for worker in workers():
        worker.kill()
        worker.join()
    errors = []

    def go_on():
        try:
            list(batches)
        except RuntimeError as error:
            errors.append(str(error))
        batches._shutdown_workers()

    ending = threading.Thread(target=go_on, daemon=True)
    ending.start()
    ending.join(20)
    assert not ending.is_alive() and workers() == [] and "is killed by signal: Killed" in errors[0]


def test_workers_end_where_a_dead_one_holds_the_lock_that_they_want():
    batches = iter(WorkerLoader(range(100), num_workers=2))
    next(batches)
    batches._workers_done_event._cond.acquire()
    ending = threading.Thread(target=batches._shutdown_workers, daemon=True)
    ending.start()
    ending.join(20)
    assert not ending.is_alive() and workers() == []
