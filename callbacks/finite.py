"""No silent NaN: a step whose gradient is not finite is left out and kept to look at; too many end a run."""

import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Checkpoint

from callbacks.checkpoints import dump, rng_state, write_checkpoint
from functional.gradients import gradient_norm, trained


class NotFiniteError(RuntimeError):
    """Too many steps in a row had a gradient that was not finite."""


class Finite(Checkpoint):
    """Leaves out optimiser steps whose gradient is not finite, and logs the norm of every gradient.

    A step that is left out changes neither weights nor the optimiser's state, the schedule or a teacher; its
    batch is dropped. One number is read off the device a step, the norm that clipping uses too; gradients are
    averaged over processes by then, so all of them decide alike.

    The first such step of a row is kept in <run folder>/non_finite: rank-0.ckpt is a checkpoint, from which
    `python -m scripts.replay_step FILE` runs this step again, with its batches and random numbers; the file
    rank-<R>.ckpt of each further process holds its batches and random numbers alone.

    To Lightning it is one of the checkpoint callbacks, which come last: the random numbers of a resumed run
    are restored before it notes them.

    Args:
        budget: steps in a row that may be left out; one more ends the run with a NotFiniteError. A gradient
            scaler of float16 training searches its scale by such steps: they count once the scale is 1.
    """

    def __init__(self, budget: int = 10):
        if budget < 0:
            raise ValueError(
                f"finite.budget is a number of steps: found {budget}. Give 0, which allows none, or more."
            )
        self.budget = budget
        self.in_a_row = self.skipped = 0
        self.step_skipped = False
        self.batches: list[Any] = []  # of the optimiser step that is being made
        self.rng: dict[str, Any] = {}  # at its start

    def on_train_start(self, trainer, pl_module) -> None:
        pl_module.step_skipped = self.step_skipped
        self.batches, self.stepped_at = [], trainer.global_step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx: int) -> None:
        if not self.batches:
            self.rng = rng_state()
        self.batches.append(batch)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        parameters = trained(optimizer)
        pl_module.gradient_norm = norm = gradient_norm(parameters)
        self.step_skipped = pl_module.step_skipped = not torch.isfinite(norm).item()
        if self.step_skipped:
            self.leave_out(trainer, parameters)
        else:
            self.in_a_row = 0
        pl_module.log("train/skipped_steps", float(self.skipped))

    def leave_out(self, trainer, parameters: list[torch.nn.Parameter]) -> None:
        """Take the gradients away, without which an optimiser does nothing, and keep what led to them."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        folder = Path(trainer.default_root_dir) / "non_finite"
        if scaler is None or scaler.get_scale() <= 1:
            if not self.in_a_row:
                self.capture(trainer, folder / f"rank-{trainer.global_rank}.ckpt")
            self.in_a_row += 1
        for parameter in parameters:
            parameter.grad = None
        self.skipped += 1
        if self.in_a_row > self.budget:
            raise NotFiniteError(
                f"The gradient was not finite in {self.in_a_row} steps in a row, up to step "
                f"{trainer.global_step}, and finite.budget allows {self.budget}.\n"
                "See what happens in the first of them by: python -m scripts.replay_step "
                f"{folder}/rank-0.ckpt{' (and other ranks)' if trainer.world_size > 1 else ''}\n"
                "The weights are finite. A lower learning rate, trainer.gradient_clip_val or "
                "trainer.precision bf16-mixed may help."
            )

    def capture(self, trainer, path: Path) -> None:
        """Write the state before this step with its batches; all processes must call this."""
        state = dump(trainer)
        step = {"batches": self.batches, "rng": self.rng, "rank": trainer.global_rank}
        try:
            write_checkpoint({**(state if trainer.is_global_zero else {}), "replay": step}, path)
        except (OSError, RuntimeError) as error:
            warnings.warn(
                f"{path}, to replay a step that was left out, was not written: {error}", stacklevel=2
            )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        if trainer.global_step != self.stepped_at:
            self.batches, self.stepped_at = [], trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row, "skipped": self.skipped, "step_skipped": self.step_skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.in_a_row, self.skipped = state["in_a_row"], state["skipped"]
        self.step_skipped = state["step_skipped"]
