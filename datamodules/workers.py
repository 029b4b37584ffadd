"""Processes that load data: they outlive signals to all, and one that dies is an error and no hang."""

import multiprocessing.connection
import os
import queue
import signal
import threading
import time

import cv2
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

WORKER_TIMEOUT = 300  # seconds without a batch after which a hung worker is an error
LOOK = 1.0  # seconds between two looks, while a batch is waited for, at whether all workers live


def prepare_worker(worker: int) -> None:
    """Keep a loader's worker on one core, and alive while the main process saves after a signal to all.

    A terminal and SLURM send their signals to the workers too, whose death would be an error in the main
    process. SIGINT and SIGUSR1 are ignored, and so is a first SIGTERM that the main process has not sent.
    """
    cv2.setNumThreads(0)  # it would start as many threads as the machine has cores
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        # A handler would not learn who sent the signal, nor run while a library's call hangs; a thread does.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_on_sigterm, daemon=True).start()


def end_on_sigterm() -> None:
    """End this process at the main process's first SIGTERM, or at the second one of others."""
    for _ in range(2):
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == os.getppid():
            os._exit(0)  # as torch's own handler does: another code would be an error in the main process
    os._exit(128 + signal.SIGTERM)


class WorkerLoader(DataLoader):
    """A DataLoader whose workers are prepared by prepare_worker, with SIGTERM blocked from the beginning.

    A library may start threads in each forked process (OpenTelemetry does, which wandb uses), and a thread
    that does not block a signal would receive it.

    torch's handler of SIGCHLD is not kept. It raises the death of a worker at any instruction of the main
    process: in an optimiser's step the weights would be lost, in the writing of a checkpoint it would look
    like a full disk, and within a queue's lock the lock would stay closed, and the shutdown hang. Here a dead
    worker is found where its batch is waited for.
    """

    def __init__(self, dataset: Dataset, **options):
        super().__init__(dataset, **{**options, "worker_init_fn": prepare_worker})

    def __iter__(self):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _get_iterator(self):
        if self.num_workers == 0:
            return super()._get_iterator()
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            return WorkerIterator(self)
        finally:
            if threading.current_thread() is threading.main_thread():
                # Where SIG_IGN was inherited nobody would learn how a worker ended.
                signal.signal(signal.SIGCHLD, handler if callable(handler) else signal.SIG_DFL)


class WorkerIterator(_MultiProcessingDataLoaderIter):
    """Looks at its workers every second while it waits, and ends also where one died at a bad moment.

    A message broken off would still be waited for; but one holds handles of tensors, not what is in them, and
    is written at once.
    """

    def _try_get_data(self, timeout: float = LOOK):
        """Wait for a batch of any worker: (True, batch), or (False, None) after `timeout` seconds.

        Raises:
            RuntimeError: a worker died; with the signal that killed it.
        """
        end = time.monotonic() + timeout
        while True:
            try:
                return True, self._data_queue.get(timeout=max(0.0, min(LOOK, end - time.monotonic())))
            except queue.Empty as error:
                self.raise_death(error, wait=0)
            except (RuntimeError, OSError, EOFError) as error:
                # A batch that breaks off may be noticed before its worker has quite ended.
                self.raise_death(error, wait=LOOK)
                raise
            if time.monotonic() >= end:
                return False, None

    def raise_death(self, error: Exception, wait: float) -> None:
        """Raise the death of a worker as the reason of an error, if one is dead within `wait` seconds."""
        ended = multiprocessing.connection.wait([worker.sentinel for worker in self._workers], wait)
        for worker in self._workers:
            if worker.sentinel in ended:
                worker.join()
                code, reason = worker.exitcode or 0, "exited unexpectedly"
                if code < 0:
                    reason = f"is killed by signal: {signal.strsignal(-code)}"
                raise RuntimeError(f"DataLoader worker (pid {worker.pid}) {reason}.") from error

    def _shutdown_workers(self) -> None:
        # One that died while it held the lock of the event that ends all would be waited for for ever.
        event = getattr(self, "_workers_done_event", None)
        if event is not None and event._cond.acquire(timeout=LOOK):
            event._cond.release()
        elif event is not None:
            self._workers_done_event = torch.multiprocessing.Event()
            for worker in self._workers:
                worker.kill()
        super()._shutdown_workers()
