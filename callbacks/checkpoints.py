"""Checkpoints from which a run goes on bit for bit: written whole or not at all, at an optimiser step."""

import os
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loops import _FitLoop
from lightning.pytorch.utilities import rank_zero_warn

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the target and renames, see write_checkpoint. Loads no code.

    Lightning's own writer first serialises into memory, and moves the file from the system's temporary
    folder, which across file systems is a copy that a crash can cut short.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(path)
        write_checkpoint(checkpoint, path, path.with_name(PREVIOUS) if path.name == LAST else None)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no checkpoint {str(path)!r}. Give the path of a .ckpt file.")
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def write_checkpoint(checkpoint: dict[str, Any], path: Path, previous: Path | None = None) -> None:
    """Write a checkpoint so that a crash at any instant leaves the old file or the new one under its name.

    Args:
        checkpoint: tensors and plain values.
        path: its folder is made where it is missing.
        previous: name under which the old file is kept.

    Raises:
        OSError, RuntimeError: it cannot be written; the old file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            second_name(path, previous)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, must survive a power cut
    finally:
        os.close(folder)


def second_name(path: Path, name: Path) -> None:
    """Give a file a second name, which replaces another file of that name; a copy where links are unknown."""
    temporary = name.with_name(f".{name.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        os.replace(temporary, name)
    finally:
        temporary.unlink(missing_ok=True)


def damage(path: Path) -> str | None:
    """Tell what is wrong with a checkpoint's file, None if nothing: torch.save puts checksums into it."""
    try:
        with zipfile.ZipFile(path) as file:
            part = file.testzip()
    except Exception as error:  # a flipped bit can make the zip reader raise almost anything
        return (str(error) or type(error).__name__).rstrip(".")
    return f"the checksum of its part {part} is wrong" if part else None


def dump(trainer) -> dict[str, Any]:
    """Return the state of a training as a checkpoint; all processes must call this."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def rng_state() -> dict[str, Any]:
    """Return the state of the global generators of python, numpy, torch and this process's CUDA device."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": (version, tuple(numbers), gauss),
        "numpy": (
            str(kind),
            torch.from_numpy(keys.astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what rng_state returned."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def of_all_ranks(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a state of every process, in the order of ranks; all processes must call this."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [state]
    states: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states


class FitLoop(_FitLoop):
    """Begins, with a validation, also where all steps are done and only the last validation is not."""

    validation_due = False

    @property
    def skip(self) -> bool:
        """Whether there is nothing to do."""
        return super().skip and not self.validation_due


class SaveError(RuntimeError):
    """The checkpoint with which a run was to end could not be written."""


class Checkpoints(Checkpoint):
    """Keeps checkpoints/last.ckpt and checkpoints/best.ckpt in the Trainer's default_root_dir.

    `last` is written every n optimiser steps, after each validation and after the last step; `best` after the
    validation with the best monitored score so far. Both hold all that the next step depends on. The `last`
    before stays as previous.ckpt. A run that ends by an error between two steps, such as a dead data worker,
    still writes `last`.

    A write that fails is a warning, and the run goes on with the older file; only the writing with which a
    run ends must succeed.

    Args:
        every_n_steps: optimiser steps between two writings of `last`.
        monitor: logged name of the score; best.ckpt is only written if it is logged.
        mode: whether a higher ("max") or a lower ("min") score is better.
        keep_last: how many of the latest `last` stay under the names step-<N>.ckpt, to average their weights.
    """

    def __init__(
        self,
        every_n_steps: int = 1000,
        monitor: str = "val/mIoU",
        mode: Literal["min", "max"] = "max",
        keep_last: int = 0,
    ):
        if every_n_steps < 1 or mode not in ("min", "max") or keep_last < 0:
            raise ValueError(
                "Checkpoints need every_n_steps >= 1, mode min or max and keep_last >= 0: found "
                f"{every_n_steps}, {mode!r} and {keep_last}. Correct the arguments of the callback."
            )
        self.every_n_steps, self.keep_last = every_n_steps, keep_last
        self.monitor, self.mode = monitor, mode
        self.config_text = ""  # YAML of the run, from which the model can be built again
        self.best_score: float | None = None
        self.stepped_at = 0  # global step after the latest optimiser step
        self.saved_at = 0  # global step of the latest `last`
        self.at_boundary = True
        self.drawn: dict[str, Any] = {}  # state of the DataModule after the latest optimiser step
        self.validation_due = False  # whether a validation belongs to this step and has not ended
        self.rng_to_restore: dict[str, Any] | None = None
        self.world_size: int | None = None  # of the checkpoint that a run goes on from

    def setup(self, trainer, pl_module, stage: str) -> None:
        """Take over writing, reading and the loop, and clear what a killed run left half written."""
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        trainer.fit_loop.__class__ = FitLoop  # it has its data already, so it cannot be another object
        self.folder = Path(trainer.default_root_dir) / "checkpoints"
        if stage == "fit" and trainer.is_global_zero and self.folder.is_dir():
            for leftover in self.folder.glob(".*.ckpt.tmp"):
                leftover.unlink()

    def on_fit_start(self, trainer, pl_module) -> None:
        """Refuse validation between the micro-batches of a step, where pending gradients forbid to save.

        Raises:
            ValueError: that is what val_check_interval asks for.
        """
        trainer.fit_loop.validation_due = self.validation_due
        interval, accumulated = trainer.val_check_interval, trainer.accumulate_grad_batches
        if isinstance(interval, int) and interval % accumulated:
            raise ValueError(
                "Validation must come at the end of an optimiser step: found trainer.val_check_interval "
                f"{interval} (in batches) with trainer.accumulate_grad_batches {accumulated}. "
                "Make the first a multiple."
            )

    def on_train_start(self, trainer, pl_module) -> None:
        """Repeat the validation during which the run was stopped."""
        self.stepped_at = self.saved_at = trainer.global_step
        if self.world_size not in (None, trainer.world_size):
            rank_zero_warn(
                f"The run goes on with {trainer.world_size} processes instead of {self.world_size}: from "
                "here on it draws other samples and random numbers than an unbroken run would."
            )
        if self.validation_due:
            validate(trainer)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx: int) -> None:
        # Only here: the loaders' iterators, which draw random numbers, exist by now.
        if self.rng_to_restore is not None:
            set_rng_state(self.rng_to_restore)
            self.rng_to_restore = None
            # By what Lightning takes from a checkpoint, loggers would be a step behind from here on where the
            # checkpoint is that of a validation to which no validation of this run corresponds.
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        self.at_boundary = trainer.global_step != self.stepped_at
        if not self.at_boundary:
            trainer.should_stop = False  # a limit of time, which asks again, ends a run after a whole step
            return
        self.stepped_at, self.drawn = trainer.global_step, data_state(trainer)
        self.validation_due = validation_follows(trainer)
        last_step = self.stepped_at == trainer.max_steps
        if self.stepped_at % self.every_n_steps == 0 or last_step:
            self.save_last(trainer, must=last_step)

    def on_validation_end(self, trainer, pl_module) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or not self.at_boundary:
            return
        self.validation_due = False
        score = trainer.callback_metrics.get(self.monitor)
        # The first process's, because all have to agree on what is saved, whatever was logged.
        score = trainer.strategy.broadcast(None if score is None else float(score))
        if score is not None and self.improves(score):
            before, self.best_score = self.best_score, score
            if not self.save(trainer, "best"):
                self.best_score = before
        self.save_last(trainer)  # knows the score and that this validation is done

    def on_train_end(self, trainer, pl_module) -> None:
        """Save what a limit of time would lose."""
        if self.stepped_at > self.saved_at:
            self.save_last(trainer, must=True)

    def on_exception(self, trainer, pl_module, exception: BaseException) -> None:
        """Save what an error between two steps would lose; several processes could wait for each other."""
        between_steps = self.at_boundary and self.drawn == data_state(trainer)
        could_not = trainer.world_size > 1 or isinstance(exception, SaveError)
        if between_steps and self.stepped_at > self.saved_at and not could_not:
            self.save_last(trainer)

    def improves(self, score: float) -> bool:
        """Whether a score beats the best so far; NaN never does."""
        if self.best_score is None:
            return score == score
        return score > self.best_score if self.mode == "max" else score < self.best_score

    def save_last(self, trainer, must: bool = False) -> None:
        """Write checkpoints/last.ckpt; all processes must call this.

        Raises:
            SaveError: it `must` be written and cannot.
        """
        if not self.save(trainer, "last", must):
            return
        self.saved_at = trainer.global_step
        for logger in trainer.loggers:
            logger.after_save_checkpoint(self)  # what was logged must not be behind what was saved
        if self.keep_last and trainer.is_global_zero:
            self.keep(self.folder / f"step-{self.saved_at}.ckpt")

    def keep(self, path: Path) -> None:
        """Give `last` this name as well, and delete the oldest of such."""
        try:
            second_name(self.folder / LAST, path)
        except OSError as error:
            rank_zero_warn(f"{path} could not be written: {error}. The run goes on; last.ckpt is whole.")
        kept = sorted(self.folder.glob("step-*.ckpt"), key=lambda path: int(path.stem.split("-")[1]))
        for old in kept[: -self.keep_last]:
            old.unlink()

    def save(self, trainer, name: str, must: bool = False) -> bool:
        """Write checkpoints/<name>.ckpt and return whether all processes went through."""
        path, checkpoint, error = self.folder / f"{name}.ckpt", dump(trainer), None
        try:
            trainer.strategy.save_checkpoint(checkpoint, path)
        except (OSError, RuntimeError) as problem:
            error = problem
        # Also a barrier: no process goes on before the file is complete.
        if trainer.strategy.reduce_boolean_decision(error is None):
            return True
        reason = (str(error).splitlines() or [""])[0] if error else "another process could not write it"
        message = (
            f"{path} could not be written at step {trainer.global_step}: {reason}. The older file stays."
        )
        if must:
            raise SaveError(f"{message} Free space in {self.folder} and go on with --resume.") from error
        rank_zero_warn(f"{message} The run goes on; free space in {self.folder}.")
        return False

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        if self.config_text:
            checkpoint["config"] = self.config_text

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_score": self.best_score,
            "validation_due": self.validation_due,
            # A validation that is repeated before the first step is saved with what this step needs.
            "rng": of_all_ranks(self.rng_to_restore or rng_state()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_score, self.validation_due = state["best_score"], state["validation_due"]
        self.world_size = len(state["rng"])
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        # With more processes than before, the additional ones have no state to go on from.
        self.rng_to_restore = state["rng"][rank] if rank < len(state["rng"]) else None


def data_state(trainer) -> dict[str, Any]:
    """How far training has drawn its data; changes as soon as a batch is taken for the next step."""
    return {} if trainer.datamodule is None else trainer.datamodule.state_dict()


def validation_follows(trainer) -> bool:
    """Whether Lightning validates after this batch, told from its interval in batches."""
    batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
    interval = trainer.val_check_batch
    return trainer.enable_validation and isinstance(interval, int) and batches % interval == 0


def validate(trainer) -> None:
    """Validate as within a training, before its next step."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True
