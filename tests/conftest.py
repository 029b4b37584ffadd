"""Settings shared by all tests: no network, no online checks, marked tests skipped with their reason."""

import gc
import os
import signal

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch


@pytest.fixture
def new_process(monkeypatch):
    """Data workers are watched over as in a process that has not trained before.

    Those of failed trainings live until their errors are collected. Torch sets its handler of SIGCHLD once in
    a process, and Lightning takes it off after a training: a dead worker would show itself after a timeout.
    """
    gc.collect()
    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_SIGCHLD_handler_set", False)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(skip)
