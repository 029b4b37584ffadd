"""Signals that stop a run: noted when they come, obeyed between two steps, by all processes at once."""

import os
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterable
from types import FrameType

import torch
from lightning.pytorch.callbacks import Checkpoint

from callbacks.checkpoints import Checkpoints

# SIGUSR1 asks to be run again: the exit code is EX_TEMPFAIL of sysexits.h. The others are 128 + the signal.
EXIT_CODES = {signal.SIGUSR1: 75, signal.SIGTERM: 143, signal.SIGINT: 130}


class Preempted(BaseException):
    """A signal has stopped the run at a step from which it can go on.

    Not an Exception, so that nothing which outlives failures, as the logging does, can swallow it.

    Attributes:
        signal_name: such as "SIGTERM".
        exit_code: what the first process ends with.
        step: the step that was saved.
    """

    def __init__(self, number: int, step: int):
        self.signal_name, self.step = signal.Signals(number).name, step
        self.exit_code = EXIT_CODES[signal.Signals(number)]
        super().__init__(f"stopped by {self.signal_name} at step {step}")


class Signals:
    """Notes the signals that stop a run; a second SIGINT ends the process at once.

    A handler may run between any two instructions, so it does no more than that.
    """

    def __init__(self):
        self.received = self.interrupts = 0
        self.before: dict[int, Callable | int | None] = {}

    def remember(self) -> None:
        """Note the handlers that are in place, for when all is over."""
        for number in EXIT_CODES:
            self.before.setdefault(number, signal.getsignal(number))

    def listen(self, numbers: Iterable[int] = EXIT_CODES) -> None:
        """Put the handlers in place, also where a library has put its own over them."""
        for number in numbers:
            signal.signal(number, self.note)

    def restore(self) -> None:
        """Put back the handlers from before, and forget what was received."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
        self.forget()

    def forget(self) -> None:
        """Forget what was received, once the run has ended; handlers stay, so that nothing breaks its end."""
        self.received = self.interrupts = 0

    def note(self, number: int, frame: FrameType | None) -> None:
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            os._exit(EXIT_CODES[signal.SIGINT])  # without saving; the files of before are whole
        self.received = self.received or number
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: the run stops after this step and saves its state.\n".encode())


SIGNALS = Signals()  # one, because a process has one handler for each signal


class Preemption(Checkpoint):
    """Stops a run at the boundary between two steps after a signal: saves `last`, has the job queued again.

    All processes stop at the same step, whichever got the signal. SIGUSR1, which SLURM is asked to send
    before a time limit or a preemption, has the job queued again by `scontrol requeue`, once; SIGTERM, which
    `scancel` sends, and SIGINT do not. A validation is broken off, and repeated when the run goes on.

    To Lightning it is one of the checkpoint callbacks, which come last: `last` may be written already.
    """

    def __init__(self):
        self.number = 0  # of the signal that was obeyed

    def setup(self, trainer, pl_module, stage: str) -> None:
        found = [callback for callback in trainer.callbacks if isinstance(callback, Checkpoints)]
        if not found:
            raise ValueError(
                "Preemption saves by the callback Checkpoints: found none. Give the Trainer one, too."
            )
        self.checkpoints = found[0]
        # Lightning's handlers exchange tensors between processes, or save, in the middle of whatever goes on.
        # It puts back those of before when the training ends, in whatever way.
        connector = trainer._signal_connector
        connector._original_handlers = {number: signal.getsignal(number) for number in EXIT_CODES}
        connector.register_signal_handlers = SIGNALS.listen
        SIGNALS.listen()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        # After the last step the run ends by itself, or goes on to a validation, which is broken off.
        if self.checkpoints.at_boundary and trainer.global_step != trainer.max_steps:
            self.obey(trainer)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx: int) -> None:
        self.stop(trainer)

    def on_validation_start(self, trainer, pl_module) -> None:
        """Count the batches that all processes have: only there may they ask each other."""
        self.stop(trainer)
        self.common = [int(number) for number in trainer.num_val_batches]
        if trainer.world_size > 1:
            counts = torch.tensor(self.common, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MIN)
            self.common = counts.tolist()

    def on_validation_batch_start(
        self, trainer, pl_module, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        within_training = trainer.state.fn == "fit" and not trainer.sanity_checking
        between_steps = within_training and self.checkpoints.at_boundary
        if between_steps and batch_idx < self.common[dataloader_idx]:
            self.obey(trainer)
            self.stop(trainer)

    def obey(self, trainer) -> None:
        """Save if a signal has come to any process; all of them must call this at the same place."""
        self.number = number = self.received_by_any(trainer)
        if not number:
            return
        if self.checkpoints.saved_at != trainer.global_step:
            self.checkpoints.save_last(trainer, must=True)
        if number == signal.SIGUSR1 and trainer.is_global_zero:
            requeue()

    def stop(self, trainer) -> None:
        """End the run after a signal was obeyed: not at once, but when Lightning has logged the step."""
        if self.number:
            raise Preempted(self.number, trainer.global_step)

    def received_by_any(self, trainer) -> int:
        """The signal to obey, the highest number if processes got several; 0 for none."""
        if trainer.world_size == 1:
            return SIGNALS.received
        received = torch.tensor(SIGNALS.received, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
        return int(received)

    def on_exception(self, trainer, pl_module, exception: BaseException) -> None:
        SIGNALS.forget()

    def teardown(self, trainer, pl_module, stage: str) -> None:
        SIGNALS.forget()


def requeue() -> None:
    """Have this SLURM job queued again; without a job, or where that fails, say so."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        problem = (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        warnings.warn(
            f"SLURM did not queue job {job} again: {problem}. Submit it again by hand; --resume goes on.",
            stacklevel=2,
        )
