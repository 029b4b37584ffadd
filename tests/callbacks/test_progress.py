"""Rates are measured and logged, in a terminal and without one, and cover the whole run."""

import pytest
import torch
from lightning.pytorch import Callback

from callbacks.checkpoints import Checkpoints
from callbacks.progress import Progress, count_images
from tests.tiny_training import TinyDataModule, tiny_module, tiny_trainer


class Clock(Callback):
    """A clock in place of the machine's: a batch takes three seconds to come and one to be trained on."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.now += 1


class SlowData(TinyDataModule):
    """Training batches that take their time."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.clock.now += 3
        return super().on_before_batch_transfer(batch, dataloader_idx)


def run(tmp_path, *callbacks, steps=6, data=None, **arguments):
    trainer = tiny_trainer(
        tmp_path, steps, [*callbacks], enable_checkpointing=False, enable_progress_bar=True, **arguments
    )
    trainer.fit(tiny_module(), data or TinyDataModule())
    return trainer


def test_throughput_and_waiting_are_logged(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("callbacks.progress.time", clock)
    data = SlowData(clock)
    trainer = run(tmp_path, Progress(), clock, data=data, limit_val_batches=0)
    assert trainer.callback_metrics["train/data_wait"] == 0.75
    assert trainer.callback_metrics["train/images_per_s"] == data.batch_size / 4


def test_validation_and_saving_are_not_waiting(tmp_path, monkeypatch):
    clock, save = Clock(), torch.save
    monkeypatch.setattr("callbacks.progress.time", clock)

    class SlowValidation(TinyDataModule):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            clock.now += 5 if self.trainer.validating else 0
            return super().on_before_batch_transfer(batch, dataloader_idx)

    def slow_save(*args):
        clock.now += 7
        save(*args)

    monkeypatch.setattr(torch, "save", slow_save)
    progress = Progress()
    options = {"limit_val_batches": 1, "val_check_interval": 3, "enable_progress_bar": True}
    trainer = tiny_trainer(tmp_path, 9, [progress, clock, Checkpoints(2)], **options)
    trainer.fit(tiny_module(), SlowValidation())
    assert clock.now > 9 + 3 * 5 + 7
    assert {(waited, whole) for waited, whole, _ in progress.window} == {(0, 1)}


def test_without_a_terminal_there_are_plain_lines_and_no_bar(tmp_path, capsys):
    run(tmp_path, Progress(line_every_s=0))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and "\x1b" not in "".join(lines)
    assert lines[-1].startswith("step 6/6  ") and lines[-1].endswith("images/s  0:00:00 left")


def test_lines_come_no_more_often_than_asked_but_the_last_step_has_one(tmp_path, capsys):
    run(tmp_path, Progress(line_every_s=100))
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == ["step 6/6"]


def test_a_run_that_only_time_ends_has_no_time_left(tmp_path, capsys):
    run(tmp_path, Progress(line_every_s=0), steps=-1, max_time={"seconds": 1})
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("step ") and last.endswith(" images/s") and "/-1" not in last


@pytest.mark.parametrize("every", [0, 100])
def test_in_a_terminal_a_bar_counts_the_batches_of_the_run(tmp_path, capsys, monkeypatch, every):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    progress = Progress(refresh_every_s=every)
    refreshed = []
    update = progress._update_metrics
    monkeypatch.setattr(progress, "_update_metrics", lambda *args: (refreshed.append(1), update(*args)))
    run(tmp_path, progress, accumulate_grad_batches=2)
    assert progress.train_progress_bar.total == 12 and progress.train_progress_bar.completed == 12
    assert progress.train_progress_bar.description == "Training"
    assert {"train/loss", "images/s", "data_wait"} <= set(progress.get_metrics(progress.trainer, None))
    assert len(refreshed) >= 12 if every == 0 else len(refreshed) <= 2
    assert "Training" in capsys.readouterr().out


def test_images_of_nested_batches_add_up():
    image = torch.zeros(2, 3, 4, 4)
    assert count_images({"image": image, "name": ["a", "b"]}) == 2
    assert count_images({"source": {"image": image}, "target": {"image": image[:1]}, "weight": 1.0}) == 3
