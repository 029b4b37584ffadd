"""Progress of a run whose clock is the step: images per second, time left, time spent waiting for data."""

import time
from collections import deque
from datetime import timedelta
from typing import Any

from lightning.pytorch.callbacks import RichProgressBar
from rich import get_console

WINDOW = 50  # batches over which rates are averaged


def count_images(batch: dict) -> int:
    """Number of images in a batch; those of nested batches (source and target) add up."""
    if "image" in batch:
        return len(batch["image"])
    return sum(count_images(part) for part in batch.values() if isinstance(part, dict))


class Progress(RichProgressBar):
    """A bar in a terminal, a line now and then elsewhere; logs `train/images_per_s` and `train/data_wait`.

    `train/data_wait` is the share of time between the end of a batch and the start of the next one, without
    validation and saving. The screen is refreshed by time, because reading a number off the device makes the
    host wait for it.

    Args:
        refresh_every_s: seconds between two refreshes of the bar.
        line_every_s: seconds between two lines where there is no terminal.
    """

    def __init__(self, refresh_every_s: float = 0.5, line_every_s: float = 30.0):
        super().__init__()
        self.refresh_every_s, self.line_every_s = refresh_every_s, line_every_s
        self.in_terminal = True
        self.idle_since: float | None = None  # end of the last batch; None when something else came after it
        self.started = 0.0  # of the current batch
        self.window: deque[tuple[float, float, int]] = deque(maxlen=WINDOW)  # (waited, whole time, images)
        self.last_shown = 0.0

    def setup(self, trainer, pl_module, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        console = get_console()
        self.in_terminal = console.is_terminal or console.is_jupyter
        if not self.in_terminal:
            self.disable()

    @property
    def total_train_batches(self) -> int | float:
        """Batches of the whole run, also of a resumed one."""
        if self.trainer.max_steps > 0:
            return self.trainer.max_steps * self.trainer.accumulate_grad_batches
        return super().total_train_batches

    def on_train_start(self, trainer, pl_module) -> None:
        super().on_train_start(trainer, pl_module)
        self.window.clear()
        self.idle_since, self.last_shown = None, time.perf_counter()

    def on_validation_start(self, trainer, pl_module) -> None:
        super().on_validation_start(trainer, pl_module)
        self.idle_since = None

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        self.idle_since = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx: int) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        now = time.perf_counter()
        if self.idle_since is not None:
            waited = self.started - self.idle_since
            self.window.append((waited, now - self.idle_since, count_images(batch) * trainer.world_size))
            pl_module.log_dict({f"train/{name}": value for name, value in self.rates().items()})
        self.idle_since = now
        due = self.refresh_every_s if self.in_terminal else self.line_every_s
        last = batch_idx + 1 == self.total_train_batches
        if now - self.last_shown >= due or last:
            self.last_shown = now
            if self.in_terminal:
                super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
                self.name_bar()
            elif trainer.is_global_zero:
                print(self.line(batch_idx + 1), flush=True)

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self.name_bar()

    def name_bar(self) -> None:
        """Replace Lightning's "Epoch 0/-2": there are no epochs."""
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, description="Training")

    def rates(self) -> dict[str, float]:
        """Return images per second of all processes and the share of time waiting, over the last batches."""
        if not self.window:
            return {}
        waited, whole, images = (sum(column) for column in zip(*self.window, strict=True))
        return {"images_per_s": images / whole, "data_wait": waited / whole}

    def line(self, batches: int) -> str:
        """One line of text on where the run is."""
        endless = self.trainer.max_steps < 0  # only trainer.max_time ends the run
        text = f"step {self.trainer.global_step}" + ("" if endless else f"/{self.trainer.max_steps}")
        if self.window:
            text += f"  {self.rates()['images_per_s']:.1f} images/s"
        if self.window and not endless:
            seconds = sum(whole for _, whole, _ in self.window) / len(self.window)
            text += f"  {timedelta(seconds=round(seconds * (self.total_train_batches - batches)))} left"
        return text

    def get_metrics(self, trainer, pl_module) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {**metrics, **{name.replace("_per_", "/"): value for name, value in self.rates().items()}}
