"""A run that is resumed equals one that never stopped; files are whole; foreign ones are refused."""

import errno
import multiprocessing
import os
import random
import resource
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from callbacks.checkpoints import (
    AtomicCheckpointIO,
    Checkpoints,
    SaveError,
    damage,
    rng_state,
    set_rng_state,
    write_checkpoint,
)
from datamodules.base import TrainingSamples
from lightning_modules.schedules import WarmupPoly
from tests.processes import exit_code_of, one_thread
from tests.tiny_training import TinyDataModule, assert_equal, tiny_module, tiny_trainer


class Killed(Exception):
    pass


class Observer(Callback):
    """Records what a step saw and gave, and ends the process's training at the start of batch `kill_at`."""

    def __init__(self, kill_at: int | None = None):
        self.kill_at, self.seen = kill_at, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.kill_at:
            raise Killed

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(
            (batch_idx, tuple(batch["name"]), float(outputs["loss"]), float(batch["image"].sum()))
        )


def train(
    folder, kill_at=None, resume=None, workers=0, length=7, every_n_steps=4, data=None, **trainer_arguments
):
    observer, checkpoints = Observer(kill_at), Checkpoints(every_n_steps)
    module = tiny_module(schedule=WarmupPoly(warmup_steps=3))
    trainer = tiny_trainer(folder, 8, [observer, checkpoints], **trainer_arguments)
    data = data or TinyDataModule(num_workers=workers, length=length)
    arguments = {"datamodule": data, "ckpt_path": resume, "weights_only": True}
    if kill_at is None:
        trainer.fit(module, **arguments)
    else:
        with pytest.raises(Killed):
            trainer.fit(module, **arguments)
    return observer.seen, folder / "checkpoints"


def load(path):
    return torch.load(path, weights_only=True)


def assert_same_end(whole, resumed, forked=False):
    a, b = load(whole / "last.ckpt"), load(resumed / "last.ckpt")
    if forked:  # python itself reseeds `random` in a forked process
        for state in a["callbacks"]["Checkpoints"]["rng"] + b["callbacks"]["Checkpoints"]["rng"]:
            del state["python"]
    assert a["global_step"] == b["global_step"] == 8
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "TinyDataModule"):
        assert_equal(a[key], b[key])
    assert a["loops"]["fit_loop"]["epoch_loop.state_dict"] == b["loops"]["fit_loop"]["epoch_loop.state_dict"]


@pytest.mark.parametrize(
    ("workers", "accumulated", "length"),
    [(0, 1, 7), (2, 1, 7), (0, 2, 7), (2, 2, 7), (0, 1, 8)],  # of 8 samples, the fourth step ends a pass
)
def test_four_steps_and_a_resume_equal_eight_steps_bit_for_bit(tmp_path, workers, accumulated, length):
    """F01, and F02 with accumulation."""
    options = {"workers": workers, "length": length, "accumulate_grad_batches": accumulated}
    torch.manual_seed(1)
    expected, whole = train(tmp_path / "whole", **options)

    # With accumulation the kill falls between two micro-batches, of which the first must be trained again.
    kill_at = 5 if accumulated == 1 else 9
    _, stopped = train(tmp_path / "resumed", kill_at=kill_at, **options)
    torch.manual_seed(2)  # another process starts with other generators
    seen, resumed = train(tmp_path / "resumed", resume=stopped / "last.ckpt", **options)

    assert seen == expected[4 * accumulated :]
    assert_same_end(whole, resumed)


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_run_resumed_from_the_checkpoint_of_a_validation_equals_one_that_went_on(tmp_path, name):
    options = {"limit_val_batches": 1.0, "val_check_interval": 4, "every_n_steps": 100}
    expected, whole = train(tmp_path / "whole", **options)
    _, stopped = train(tmp_path / "resumed", kill_at=6, **options)
    seen, resumed = train(tmp_path / "resumed", resume=stopped / f"{name}.ckpt", **options)
    assert seen == expected[4:]
    assert_same_end(whole, resumed)


@pytest.mark.cuda
def test_a_run_resumed_on_a_gpu_draws_the_same_dropout(tmp_path):
    expected, whole = train(tmp_path / "whole", accelerator="gpu")
    _, stopped = train(tmp_path / "resumed", kill_at=5, accelerator="gpu")
    seen, resumed = train(tmp_path / "resumed", resume=stopped / "last.ckpt", accelerator="gpu")
    assert [name for _, name, *_ in seen] == [name for _, name, *_ in expected[4:]]
    assert [loss for *_, loss, _ in seen] == pytest.approx([loss for *_, loss, _ in expected[4:]], rel=1e-5)
    a, b = (load(folder / "last.ckpt")["callbacks"]["Checkpoints"]["rng"] for folder in (whole, resumed))
    assert_equal(a, b)


def test_two_processes_resume_as_exactly_as_one(tmp_path):
    def fit(folder, max_steps, resume=None):
        options = {"devices": 2, "strategy": "ddp_fork"}
        trainer = tiny_trainer(folder, max_steps, [Checkpoints(100)], **options)
        trainer.fit(tiny_module(), datamodule=TinyDataModule(), ckpt_path=resume, weights_only=True)
        return folder / "checkpoints"

    whole, stopped = fit(tmp_path / "whole", 8), fit(tmp_path / "resumed", 4)
    resumed = fit(tmp_path / "resumed", 8, stopped / "last.ckpt")
    assert_same_end(whole, resumed, forked=True)
    states = load(resumed / "last.ckpt")["callbacks"]["Checkpoints"]["rng"]
    assert not torch.equal(states[0]["torch"], states[1]["torch"])  # dropout differs between processes


def test_a_validation_between_steps_does_not_change_training(tmp_path):
    plain, _ = train(tmp_path / "plain")
    validated, _ = train(tmp_path / "validated", limit_val_batches=1.0, val_check_interval=2)
    assert plain == validated


def test_best_is_kept_by_the_monitored_score_and_survives_a_resume():
    checkpoints = Checkpoints(monitor="val/mIoU")
    assert checkpoints.improves(3.0) and not checkpoints.improves(float("nan"))
    checkpoints.best_score = 3.0
    assert (
        checkpoints.improves(3.1) and not checkpoints.improves(2.9) and not checkpoints.improves(float("nan"))
    )

    resumed = Checkpoints(mode="min")
    resumed.load_state_dict(checkpoints.state_dict())
    assert resumed.best_score == 3.0
    assert resumed.improves(2.9) and not resumed.improves(3.1)


def test_best_is_written_only_after_the_validation_with_the_best_score(tmp_path):
    class Scores(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("val/made_up", {2: 1.0, 4: 5.0, 6: 2.0, 8: 3.0}[trainer.global_step])

    trainer = tiny_trainer(
        tmp_path, 8, [Scores(), Checkpoints(100, "val/made_up")], limit_val_batches=1, val_check_interval=2
    )
    trainer.fit(tiny_module(), TinyDataModule())
    assert load(tmp_path / "checkpoints/best.ckpt")["global_step"] == 4
    assert load(tmp_path / "checkpoints/last.ckpt")["global_step"] == 8


def test_the_last_step_is_saved_whatever_the_interval(tmp_path):
    _, folder = train(tmp_path, every_n_steps=1000)
    assert load(folder / "last.ckpt")["global_step"] == 8
    assert not (folder / "best.ckpt").exists()


def test_validation_inside_gradient_accumulation_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"val_check_interval 3 .* trainer.accumulate_grad_batches 2"):
        train(tmp_path, accumulate_grad_batches=2, val_check_interval=3)


def test_the_config_of_the_run_is_in_its_checkpoints(tmp_path):
    checkpoints = Checkpoints(2)
    checkpoints.config_text = "seed: 3\n"
    tiny_trainer(tmp_path, 2, [checkpoints]).fit(tiny_module(), TinyDataModule())
    assert load(tmp_path / "checkpoints/last.ckpt")["config"] == "seed: 3\n"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path, writer = tmp_path / "last.ckpt", AtomicCheckpointIO()
    writer.save_checkpoint({"step": 1}, path)

    def fail_in_the_middle(content, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fail_in_the_middle)
    with pytest.raises(OSError, match="no space left"):
        writer.save_checkpoint({"step": 2}, path)
    assert writer.load_checkpoint(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_half_written_files_of_a_killed_run_are_removed_at_the_next_start(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/.last.ckpt.tmp").write_bytes(b"half")
    _, folder = train(tmp_path)
    assert sorted(file.name for file in folder.iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "marker"), "w"))

    torch.save({"state_dict": Malicious()}, tmp_path / "bad.ckpt")
    with pytest.raises(Exception, match="Weights only load failed"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "bad.ckpt", weights_only=False)
    assert not (tmp_path / "marker").exists()


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*nothing\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "nothing.ckpt")


def test_generators_go_on_from_the_stored_state(tmp_path):
    torch.save(rng_state(), tmp_path / "rng")
    first = random.random(), np.random.rand(), torch.rand(1).item()
    set_rng_state(load(tmp_path / "rng"))
    assert first == (random.random(), np.random.rand(), torch.rand(1).item())


@pytest.mark.parametrize("wrong", [{"every_n_steps": 0}, {"mode": "highest"}])
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(ValueError, match="every_n_steps >= 1, mode min or max"):
        Checkpoints(**wrong)


@pytest.mark.parametrize("links", [True, False])
def test_a_process_killed_while_it_saves_leaves_a_checkpoint_that_loads(tmp_path, monkeypatch, links):
    def save_for_ever():
        for number in range(1, 10**6):
            checkpoint = {"number": number, "weights": torch.full((200_000,), float(number))}
            write_checkpoint(checkpoint, tmp_path / "last.ckpt", tmp_path / "previous.ckpt")

    if not links:
        monkeypatch.setattr(os, "link", lambda *a: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    write_checkpoint({"number": 0, "weights": torch.zeros(1)}, tmp_path / "last.ckpt")
    moments = np.random.default_rng(0).uniform(0.02, 0.15, 20)
    for moment in moments[: 20 if links else 5]:
        process = multiprocessing.get_context("fork").Process(target=save_for_ever)
        with one_thread():
            process.start()
        time.sleep(moment)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        for name in ("last.ckpt", "previous.ckpt"):
            assert not (tmp_path / name).exists() or damage(tmp_path / name) is None
        found = load(tmp_path / "last.ckpt")
        assert (found["weights"] == found["number"]).all()


def test_a_copy_that_fails_leaves_no_part(tmp_path, monkeypatch):
    def fail(path, target):
        Path(target).write_bytes(b"part")
        raise OSError(errno.ENOSPC, "disk full")

    write_checkpoint({"number": 0}, tmp_path / "last.ckpt")
    monkeypatch.setattr(os, "link", lambda *a: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    monkeypatch.setattr("callbacks.checkpoints.shutil.copyfile", fail)
    with pytest.raises(OSError, match="disk full"):
        write_checkpoint({"number": 1}, tmp_path / "last.ckpt", tmp_path / "previous.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert load(tmp_path / "last.ckpt") == {"number": 0}


@contextmanager
def no_file_above(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class FullDisk(Callback):
    """Lets no file grow beyond a size from one step on."""

    def __init__(self, first, last=10**6):
        self.first, self.last, self.limit = first, last, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.first:
            self.limit = no_file_above(1000)
            self.limit.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.last:
            self.end()

    def end(self):
        if self.limit is not None:
            self.limit.__exit__(None, None, None)
        self.limit = None


def train_on_a_full_disk(folder, disk, **options):
    trainer = tiny_trainer(folder, 8, [disk, Checkpoints(2)], **options)
    try:
        trainer.fit(tiny_module(), datamodule=TinyDataModule())
    finally:
        disk.end()


def test_a_periodic_save_that_fails_is_a_warning_and_the_run_goes_on(tmp_path):
    with pytest.warns(UserWarning, match=r"last\.ckpt could not be written at step 4: .*The run goes on"):
        train_on_a_full_disk(tmp_path, FullDisk(2, 4))
    folder = tmp_path / "checkpoints"
    assert load(folder / "last.ckpt")["global_step"] == 8
    assert load(folder / "previous.ckpt")["global_step"] == 6
    assert not list(folder.glob(".*"))


def test_the_save_with_which_a_run_ends_must_succeed(tmp_path):
    with (
        pytest.raises(SaveError, match=r"at step 8: .*Free space in .* --resume"),
        pytest.warns(UserWarning, match="at step 6"),
    ):
        train_on_a_full_disk(tmp_path, FullDisk(5))
    folder = tmp_path / "checkpoints"
    assert load(folder / "last.ckpt")["global_step"] == 4
    assert not list(folder.glob(".*"))


def test_the_latest_checkpoints_are_kept_by_their_steps(tmp_path):
    trainer = tiny_trainer(tmp_path, 8, [Checkpoints(2, keep_last=3)])
    trainer.fit(tiny_module(), datamodule=TinyDataModule())
    folder = tmp_path / "checkpoints"
    assert {path.name for path in folder.glob("step-*")} == {f"step-{n}.ckpt" for n in (4, 6, 8)}
    assert [load(folder / f"step-{n}.ckpt")["global_step"] for n in (4, 6, 8)] == [4, 6, 8]


def test_an_error_between_two_steps_loses_nothing(tmp_path, monkeypatch):
    expected, whole = train(tmp_path / "whole")
    read = TrainingSamples.__getitem__

    def fail_later(samples, item):
        if item[1] >= 10:
            raise OSError("the data set has gone")
        return read(samples, item)

    with monkeypatch.context() as broken, pytest.raises(OSError, match="has gone"):
        broken.setattr(TrainingSamples, "__getitem__", fail_later)
        train(tmp_path / "part", every_n_steps=100)
    stopped = tmp_path / "part/checkpoints/last.ckpt"
    assert load(stopped)["global_step"] == 4  # batches of two, of which one is read ahead
    seen, resumed = train(tmp_path / "part", resume=stopped)
    assert seen == expected[4:]
    assert_same_end(whole, resumed)


def test_an_error_within_a_step_saves_nothing_of_it(tmp_path):
    class Broken(Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 5:
                raise Killed

    trainer = tiny_trainer(tmp_path, 8, [Broken(), Checkpoints(4)])
    with pytest.raises(Killed):
        trainer.fit(tiny_module(), datamodule=TinyDataModule())
    assert load(tmp_path / "checkpoints/last.ckpt")["global_step"] == 4


@pytest.mark.parametrize("at", [4, 8])
def test_a_run_killed_in_its_validation_repeats_it(tmp_path, at):
    class Validations(Callback):
        def __init__(self, kill):
            self.kill, self.ended = kill, []

        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            if self.kill and trainer.global_step == at:
                os._exit(9)

        def on_validation_end(self, trainer, pl_module):
            self.ended.append(trainer.global_step)

    def fit(folder, resume=None, kill=False):
        validations = Validations(kill)
        options = {"limit_val_batches": 1.0, "val_check_interval": 4}
        trainer = tiny_trainer(folder, 8, [validations, Checkpoints(4)], **options)
        trainer.fit(tiny_module(), datamodule=TinyDataModule(), ckpt_path=resume, weights_only=True)
        return validations.ended

    assert exit_code_of(lambda: fit(tmp_path / "part", kill=True)) == 9
    with one_thread():
        assert fit(tmp_path / "part", tmp_path / "part/checkpoints/last.ckpt") == [4, 8][at // 8 :]
        fit(tmp_path / "whole")
    assert_same_end(*(tmp_path / name / "checkpoints" for name in ("whole", "part")), forked=True)


def test_loggers_count_on_where_the_stop_had_a_validation_that_the_resumed_run_has_not(tmp_path):
    class Steps(Callback):
        def __init__(self):
            self.logged = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.logged.append((trainer.global_step, trainer.fit_loop.epoch_loop._batches_that_stepped + 1))

    steps = Steps()
    for last, interval, resume in ((3, 3, None), (8, 4, "last.ckpt")):
        options = {"limit_val_batches": 1.0, "val_check_interval": interval}
        trainer = tiny_trainer(tmp_path, last, [steps, Checkpoints()], **options)
        path = resume and tmp_path / "checkpoints" / resume
        trainer.fit(tiny_module(), datamodule=TinyDataModule(), ckpt_path=path, weights_only=True)
    assert steps.logged == [(step, step) for step in range(1, 9)]


def test_a_run_that_goes_on_with_another_number_of_processes_says_so(tmp_path):
    options = {"devices": 2, "strategy": "ddp_fork"}
    trainer = tiny_trainer(tmp_path, 4, [Checkpoints(100)], **options)
    trainer.fit(tiny_module(), datamodule=TinyDataModule())
    with pytest.warns(UserWarning, match="with 1 processes instead of 2"):
        train(tmp_path, resume=tmp_path / "checkpoints/last.ckpt")


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_limit_of_time_ends_a_run_after_a_whole_step_which_is_saved(tmp_path, accumulated):
    class TimeIsUp(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = batch_idx >= 4

    options = {"accumulate_grad_batches": accumulated}
    trainer = tiny_trainer(tmp_path, 100, [TimeIsUp(), Checkpoints(100)], **options)
    trainer.fit(tiny_module(), datamodule=TinyDataModule())
    checkpoint = load(tmp_path / "checkpoints/last.ckpt")
    assert checkpoint["global_step"] == (5 if accumulated == 1 else 3)
    assert checkpoint["TinyDataModule"]["batches_drawn"] == (5 if accumulated == 1 else 6)


def test_the_best_score_is_that_of_a_file_that_was_written(tmp_path, monkeypatch):
    checkpoints, trainer = Checkpoints(100), tiny_trainer(tmp_path, 1)
    trainer.state.fn = "fit"
    trainer._logger_connector._callback_metrics["val/mIoU"] = torch.tensor(50.0)
    for written, best in ((False, None), (True, 50.0)):
        monkeypatch.setattr(checkpoints, "save", lambda *a, written=written: written)
        monkeypatch.setattr(checkpoints, "save_last", lambda *a: None)
        checkpoints.on_validation_end(trainer, None)
        assert checkpoints.best_score == best
