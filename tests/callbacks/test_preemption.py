"""A signal stops a run between two steps on all processes; what goes on from there equals an unbroken run."""

import csv
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from lightning.pytorch import Callback

from callbacks.checkpoints import Checkpoints
from callbacks.loggers import MetricsCSV
from callbacks.preemption import SIGNALS, Preempted, Preemption
from lightning_modules.supervised import Supervised
from tests.callbacks.test_checkpoints import Observer, assert_same_end, load
from tests.processes import exit_code_of
from tests.tiny_run import tiny_config, write_config
from tests.tiny_training import (
    TinyDataModule,
    assert_equal,
    tiny_module,
    tiny_trainer,
    training_state,
)
from train import main

ENDS = {signal.SIGUSR1: 75, signal.SIGTERM: 143, signal.SIGINT: 130}


class Send(Callback):
    """Sends this process signals once, at a batch or validation batch of training."""

    def __init__(self, *signals, hook="on_train_batch_start", at=2, rank=0):
        self.signals, self.hook, self.at, self.rank, self.validations = signals, hook, at, rank, 0

    def send(self, trainer, hook, index):
        if hook == self.hook and index == self.at and trainer.global_rank == self.rank:
            for number in self.signals:
                os.kill(os.getpid(), number)
            self.signals = ()

    def on_sanity_check_start(self, trainer, pl_module):
        self.send(trainer, "on_sanity_check_start", self.at)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.send(trainer, "on_train_batch_start", batch_idx)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.send(trainer, "on_train_batch_end", batch_idx)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.send(trainer, "on_validation_batch_end", batch_idx)

    def on_validation_end(self, trainer, pl_module):
        self.validations += not trainer.sanity_checking


@pytest.fixture(autouse=True)
def own_handlers():
    before = {number: signal.getsignal(number) for number in ENDS}
    yield
    SIGNALS.restore()
    assert {number: signal.getsignal(number) for number in ENDS} == before


@pytest.fixture
def requests(tmp_path, monkeypatch):
    """The lines that a fake `scontrol` was called with."""
    (tmp_path / "bin").mkdir()
    script, log = tmp_path / "bin/scontrol", tmp_path / "calls"
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexit ${{SCONTROL_FAILS:-0}}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    return lambda: log.read_text().splitlines() if log.exists() else []


def fit(folder, send=None, resume=None, stops=False, every_n_steps=100, **options):
    observer, callbacks = Observer(), [Checkpoints(every_n_steps), Preemption()]
    trainer = tiny_trainer(folder, 8, [observer, *([send] if send else []), *callbacks], **options)
    arguments = {"datamodule": TinyDataModule(), "ckpt_path": resume, "weights_only": True}
    stop = None
    if stops:
        with pytest.raises(Preempted) as raised:
            trainer.fit(tiny_module(), **arguments)
        stop = raised.value
    else:
        trainer.fit(tiny_module(), **arguments)
    return observer.seen, folder / "checkpoints", stop


@pytest.mark.parametrize("number", ENDS)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_signal_stops_after_the_step_and_the_resumed_run_equals_an_unbroken_one(
    tmp_path, requests, monkeypatch, number, accumulated
):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    options = {"accumulate_grad_batches": accumulated}
    torch.manual_seed(1)
    expected, whole, _ = fit(tmp_path / "whole", **options)
    seen, stopped, stop = fit(tmp_path / "part", Send(number, at=2), stops=True, **options)
    assert seen == expected[: len(seen)] and stop.exit_code == ENDS[number]
    assert stop.step == load(stopped / "last.ckpt")["global_step"] == len(seen) / accumulated
    assert requests() == (["requeue 17"] if number == signal.SIGUSR1 else [])

    SIGNALS.restore()
    torch.manual_seed(2)
    rest, resumed, _ = fit(tmp_path / "part", resume=stopped / "last.ckpt", **options)
    assert seen + rest == expected
    assert_same_end(whole, resumed)


def test_an_array_task_is_requeued_by_its_own_number(tmp_path, requests, monkeypatch):
    for name, value in {"JOB_ID": "18", "ARRAY_JOB_ID": "17", "ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    fit(tmp_path / "run", Send(signal.SIGUSR1), stops=True)
    assert requests() == ["requeue 17_3"]


def test_outside_slurm_nothing_is_requeued(tmp_path, requests, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    fit(tmp_path / "run", Send(signal.SIGUSR1), stops=True)
    assert requests() == []


def test_a_requeue_that_fails_is_told_and_the_state_is_saved(tmp_path, requests, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SCONTROL_FAILS", "1")
    with pytest.warns(UserWarning, match="did not queue job 17 again"):
        _, folder, _ = fit(tmp_path / "run", Send(signal.SIGUSR1), stops=True)
    assert load(folder / "last.ckpt")["global_step"] == 3


def test_two_signals_in_a_row_save_once_and_the_first_counts(tmp_path, monkeypatch):
    saved, save = [], Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, *a, **k: saved.append(a[1]) or save(self, *a, **k))
    _, _, stop = fit(tmp_path, Send(signal.SIGTERM, signal.SIGUSR1), stops=True)
    assert saved == ["last"] and stop.signal_name == "SIGTERM"


def test_a_signal_after_the_step_was_saved_does_not_save_again(tmp_path, monkeypatch):
    saved, save = [], Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, *a, **k: saved.append(a[1]) or save(self, *a, **k))
    fit(tmp_path, Send(signal.SIGTERM, at=3), stops=True, every_n_steps=4)
    assert saved == ["last"]


def test_a_run_that_has_made_its_last_step_ends_by_itself(tmp_path, requests, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    _, folder, _ = fit(tmp_path, Send(signal.SIGUSR1, at=7))
    assert load(folder / "last.ckpt")["global_step"] == 8 and requests() == []


@pytest.mark.parametrize(("hook", "at"), [("on_train_batch_start", 7), ("on_validation_batch_end", 0)])
def test_the_last_validation_is_broken_off_too_and_repeated(tmp_path, requests, monkeypatch, hook, at):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    options = {"limit_val_batches": 1.0, "val_check_interval": 8}
    send = Send(signal.SIGUSR1, hook=hook, at=at)
    _, folder, stop = fit(tmp_path, send, stops=True, **options)
    assert stop.step == load(folder / "last.ckpt")["global_step"] == 8 and send.validations == 0
    assert requests() == ["requeue 17"]
    SIGNALS.restore()
    again = Send()
    seen, _, _ = fit(tmp_path, again, folder / "last.ckpt", **options)
    assert not seen and again.validations == 1
    assert not load(folder / "last.ckpt")["callbacks"]["Checkpoints"]["validation_due"]


def test_what_the_step_before_the_stop_logged_is_kept(tmp_path):
    options = {"logger": MetricsCSV(tmp_path)}
    fit(tmp_path, Send(signal.SIGTERM, at=2), stops=True, **options)
    with (tmp_path / "metrics.csv").open() as file:
        assert [row["train/loss"] != "" for row in csv.DictReader(file)] == [True, True, True]


@pytest.mark.parametrize("hook", ["on_sanity_check_start", "on_train_batch_start"])
def test_a_signal_before_the_first_step_is_obeyed_after_it(tmp_path, hook):
    send = Send(signal.SIGTERM, hook=hook, at=0)
    options = {"num_sanity_val_steps": 1, "limit_val_batches": 1.0, "val_check_interval": 4}
    seen, folder, _ = fit(tmp_path, send, stops=True, **options)
    assert len(seen) == 1 and load(folder / "last.ckpt")["global_step"] == 1


@pytest.mark.parametrize("at", [0, 1])
def test_a_validation_is_broken_off_and_repeated_by_the_resumed_run(tmp_path, at):
    options = {"limit_val_batches": 1.0, "val_check_interval": 4}
    whole_run = Send()
    expected, whole, _ = fit(tmp_path / "whole", whole_run, **options)
    send = Send(signal.SIGTERM, hook="on_validation_batch_end", at=at)
    seen, stopped, _ = fit(tmp_path / "part", send, stops=True, **options)
    assert len(seen) == 4 and send.validations == 0
    SIGNALS.restore()
    resumed_run = Send()
    rest, resumed, _ = fit(tmp_path / "part", resumed_run, stopped / "last.ckpt", **options)
    assert seen + rest == expected and whole_run.validations == resumed_run.validations == 2
    assert_same_end(whole, resumed)
    assert (resumed / "best.ckpt").is_file()


def test_a_second_interrupt_ends_the_process_at_once_and_leaves_the_old_file(tmp_path):
    """F34."""

    def child():
        send = Send(signal.SIGINT, signal.SIGINT, at=5)
        trainer = tiny_trainer(tmp_path, 8, [send, Checkpoints(4), Preemption()])
        trainer.fit(tiny_module(), datamodule=TinyDataModule())
        os._exit(1)

    assert exit_code_of(child) == 130
    assert load(tmp_path / "checkpoints/last.ckpt")["global_step"] == 4


def command(config, folder, *words) -> int:
    """Exit code of a training by the command line, in this process."""
    try:
        main(["--config", str(config), "--output", str(folder), *words])
    except SystemExit as stop:
        return stop.code
    finally:
        SIGNALS.restore()
    return 0


@pytest.mark.parametrize("number", ENDS)
def test_a_command_that_gets_signals_at_random_times_ends_as_if_it_had_got_none(
    tmp_path, requests, monkeypatch, number
):
    """F04: its exit codes, at most one request for each stretch, the same weights and logs in the end."""
    step, draw, planned = Supervised.training_step, random.Random(int(number)), []

    def signalled(module, batch, batch_idx):
        if planned and batch_idx == planned[0][0]:
            threading.Timer(planned.pop()[1], os.kill, (os.getpid(), number)).start()
        time.sleep(0.002)
        return step(module, batch, batch_idx)

    monkeypatch.setattr(Supervised, "training_step", signalled)
    config = tiny_config()
    config["trainer"] |= {"max_steps": 60, "val_check_interval": 15}
    path = write_config(tmp_path / "run.yaml", config)
    assert command(path, tmp_path / "whole") == 0
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    codes = []
    for first in (draw.randrange(10), draw.randrange(21, 40)):
        planned.append((first, draw.random() / 50))
        codes.append(command(path, tmp_path / "parts", "--resume"))
    assert codes == [ENDS[number]] * 2 and command(path, tmp_path / "parts", "--resume") == 0
    assert requests() == (["requeue 17"] * 2 if number == signal.SIGUSR1 else [])
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    for name in ("last", "best"):
        file = f"checkpoints/{name}.ckpt"
        assert_equal(training_state(whole / file), training_state(parts / file))
    assert (whole / "metrics.csv").read_text() == (parts / "metrics.csv").read_text()


def test_a_signal_to_one_of_two_processes_stops_both_at_one_step(tmp_path):
    started = time.monotonic()
    send = Send(signal.SIGTERM, at=3, rank=1)
    trainer = tiny_trainer(
        tmp_path, 500, [send, Checkpoints(1000), Preemption()], devices=2, strategy="ddp_fork"
    )
    with pytest.raises(Exception, match=r"terminated|exit code"):
        trainer.fit(tiny_module(), datamodule=TinyDataModule())
    checkpoint = load(tmp_path / "checkpoints/last.ckpt")
    assert checkpoint["global_step"] == 4 and len(checkpoint["callbacks"]["Checkpoints"]["rng"]) == 2
    assert time.monotonic() - started < 60


def test_it_needs_the_callback_that_saves(tmp_path):
    with pytest.raises(ValueError, match="Checkpoints: found none"):
        tiny_trainer(tmp_path, 1, [Preemption()]).fit(tiny_module(), datamodule=TinyDataModule())


class KillAt(Callback):
    """Ends the training at the start of a batch, before anything of its step is done."""

    def __init__(self, at):
        self.at = at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.at:
            raise KeyboardInterrupt


def test_a_kill_just_after_a_repeated_validation_changes_nothing_either(tmp_path):
    options = {"limit_val_batches": 1.0, "val_check_interval": 4}
    torch.manual_seed(1)
    expected, whole, _ = fit(tmp_path / "whole", **options)
    send = Send(signal.SIGTERM, hook="on_validation_batch_end", at=0)
    _, folder, _ = fit(tmp_path / "part", send, stops=True, **options)
    SIGNALS.restore()
    torch.manual_seed(2)
    trainer = tiny_trainer(tmp_path / "part", 8, [KillAt(4), Checkpoints(100), Preemption()], **options)
    with pytest.raises(SystemExit):
        trainer.fit(
            tiny_module(), datamodule=TinyDataModule(), ckpt_path=folder / "last.ckpt", weights_only=True
        )
    torch.manual_seed(3)
    rest, resumed, _ = fit(tmp_path / "part", resume=folder / "last.ckpt", **options)
    assert rest == expected[4:]
    assert_same_end(whole, resumed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_a_repeated_validation_is_obeyed_like_any(tmp_path, number):
    options = {"limit_val_batches": 1.0, "val_check_interval": 4}
    _, folder, _ = fit(
        tmp_path, Send(signal.SIGTERM, hook="on_validation_batch_end", at=0), stops=True, **options
    )
    SIGNALS.restore()
    again = Send(number, hook="on_validation_batch_end", at=0)
    seen, _, stop = fit(tmp_path, again, folder / "last.ckpt", stops=True, **options)
    assert not seen and stop.exit_code == ENDS[number] and again.validations == 0


SIGNALLED = """
import os, signal, sys, train
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
class Signalled:
    def find_spec(name, *args):
        if name == "cli":
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Signalled)
train.main({words})
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGUSR1, 75, marks=pytest.mark.slow), (signal.SIGINT, 130)],
)
def test_a_signal_while_libraries_are_imported_waits_for_the_first_step_or_ends_it_in_a_line(
    tmp_path, number, code
):
    path = write_config(tmp_path / "run.yaml", tiny_config())
    words = ["--config", str(path), "--output", str(tmp_path / "run")]
    program = SIGNALLED.format(number=int(number), words=words)
    environment = {name: value for name, value in os.environ.items() if name != "SLURM_JOB_ID"}
    environment["PYTHONPATH"] = "."
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stderr
    if number == signal.SIGINT:
        assert done.stderr == "interrupted\n"
    else:
        assert load(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 1


def test_lightnings_handlers_are_never_in_place_and_those_of_before_come_back(tmp_path):
    class Handlers(Callback):
        found = ()

        def on_train_start(self, trainer, pl_module):
            self.found = tuple(signal.getsignal(number) for number in ENDS)

    before = {number: signal.getsignal(number) for number in ENDS}
    handlers = Handlers()
    fit(tmp_path, handlers)
    assert handlers.found == (SIGNALS.note,) * 3
    assert {number: signal.getsignal(number) for number in ENDS} == before
    fit(tmp_path, Send(signal.SIGTERM), stops=True)
    assert {number: signal.getsignal(number) for number in ENDS} == before


def test_an_interrupt_before_training_is_listened_to_ends_the_command_in_a_line(
    tmp_path, capsys, monkeypatch
):
    def interrupt(data, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr("datamodules.base.SegmentationDataModule.prepare_data", interrupt)
    path = write_config(tmp_path / "run.yaml", tiny_config())
    assert command(path, tmp_path / "run") == 130
    assert capsys.readouterr().err.endswith("interrupted\n")


def test_a_second_interrupt_counts_also_after_another_signal(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    SIGNALS.note(signal.SIGTERM, None)
    SIGNALS.note(signal.SIGINT, None)
    assert not ended
    SIGNALS.note(signal.SIGINT, None)
    assert ended == [130]
