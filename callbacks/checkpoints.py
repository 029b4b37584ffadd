"""Checkpoints from which a run goes on bit for bit: written whole or not at all, at an optimiser step."""

import os
import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the target and renames: a crash leaves the old file or the new one. Loads no code.

    Lightning's own writer first serialises into memory, and moves the file from the system's temporary
    folder, which across file systems is a copy that a crash can cut short.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, must survive a power cut
        finally:
            os.close(folder)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no checkpoint {str(path)!r}. Give the path of a .ckpt file.")
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


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


def rng_states_of_all_ranks() -> list[dict[str, Any]]:
    """Return the generators' states of every process, in the order of ranks; all processes must call this."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [rng_state()]
    states: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, rng_state())
    return states


class Checkpoints(Checkpoint):
    """Keeps checkpoints/last.ckpt and checkpoints/best.ckpt in the Trainer's default_root_dir.

    `last` is written every n optimiser steps, after each validation and after the last step; `best` after the
    validation with the best monitored score so far. Both hold all that the next step depends on.

    Args:
        every_n_steps: optimiser steps between two writings of `last`.
        monitor: logged name of the score; best.ckpt is only written if it is logged.
        mode: whether a higher ("max") or a lower ("min") score is better.
    """

    def __init__(
        self, every_n_steps: int = 1000, monitor: str = "val/mIoU", mode: Literal["min", "max"] = "max"
    ):
        if every_n_steps < 1 or mode not in ("min", "max"):
            raise ValueError(
                f"Checkpoints need every_n_steps >= 1 and mode min or max: found {every_n_steps} and "
                f"{mode!r}. Correct the arguments of the callback."
            )
        self.every_n_steps, self.monitor, self.mode = every_n_steps, monitor, mode
        self.config_text = ""  # YAML of the run, from which the model can be built again
        self.best_score: float | None = None
        self.stepped_at = 0  # global step after the latest optimiser step
        self.at_boundary = True
        self.rng_to_restore: dict[str, Any] | None = None

    def setup(self, trainer, pl_module, stage: str) -> None:
        """Take over writing and reading, and clear what a killed run left half written."""
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        self.folder = Path(trainer.default_root_dir) / "checkpoints"
        if stage == "fit" and trainer.is_global_zero and self.folder.is_dir():
            for leftover in self.folder.glob(".*.ckpt.tmp"):
                leftover.unlink()

    def on_fit_start(self, trainer, pl_module) -> None:
        """Refuse validation between the micro-batches of a step, where pending gradients forbid to save."""
        interval, accumulated = trainer.val_check_interval, trainer.accumulate_grad_batches
        if isinstance(interval, int) and interval % accumulated:
            raise ValueError(
                "Validation must come at the end of an optimiser step: found trainer.val_check_interval "
                f"{interval} (in batches) with trainer.accumulate_grad_batches {accumulated}. "
                "Make the first a multiple."
            )

    def on_train_start(self, trainer, pl_module) -> None:
        self.stepped_at = trainer.global_step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx: int) -> None:
        # Only here: the loaders' iterators, which draw random numbers, exist by now.
        if self.rng_to_restore is not None:
            set_rng_state(self.rng_to_restore)
            self.rng_to_restore = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        self.at_boundary = trainer.global_step != self.stepped_at
        if not self.at_boundary:
            return
        self.stepped_at = trainer.global_step
        if self.stepped_at % self.every_n_steps == 0 or self.stepped_at == trainer.max_steps:
            self.save(trainer, "last")

    def on_validation_end(self, trainer, pl_module) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or not self.at_boundary:
            return
        score = trainer.callback_metrics.get(self.monitor)
        if score is not None and self.improves(score := float(score)):
            self.best_score = score
            self.save(trainer, "best")
        self.save(trainer, "last")  # knows the score and that this validation is done

    def improves(self, score: float) -> bool:
        """Whether a score beats the best so far; NaN never does."""
        if self.best_score is None:
            return score == score
        return score > self.best_score if self.mode == "max" else score < self.best_score

    def save(self, trainer, name: str) -> None:
        """Write checkpoints/<name>.ckpt; all processes must call this."""
        trainer.save_checkpoint(self.folder / f"{name}.ckpt", weights_only=False)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        if self.config_text:
            checkpoint["config"] = self.config_text

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score, "rng": rng_states_of_all_ranks()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_score = state["best_score"]
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        # With more processes than before, the new ones have no state to go on from.
        self.rng_to_restore = state["rng"][rank] if rank < len(state["rng"]) else None
