"""Settings shared by all tests: no network, no online checks, marked tests skipped with their reason."""

import multiprocessing
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # two threads of each of two processes would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch


@pytest.fixture(autouse=True)
def no_workers_left():
    """End the data workers that a test leaves behind: those of a failed training live on with its error.

    Garbage collection would end them at any moment of another test, in any thread, and slowly.
    """
    yield
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(skip)
