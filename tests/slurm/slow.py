"""A callback that makes a run long enough to be stopped."""

import os
import time

from lightning.pytorch import Callback


class SlowUntilRequeued(Callback):
    """Waits before every step of a job that has not been queued again yet."""

    def __init__(self, seconds: float):
        self.seconds = 0 if int(os.environ.get("SLURM_RESTART_COUNT", 0)) else seconds

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        time.sleep(self.seconds)
