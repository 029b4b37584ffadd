"""Run again the step whose gradient was not finite, and tell where that began.

    python -m scripts.replay_step runs/x/non_finite/rank-0.ckpt

The file holds the state before the step, its batches and random numbers; the run's folder is not touched.
"""

import argparse
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks.checkpoints import damage, set_rng_state
from cli import build, for_this_device, load_checkpoint
from config_files import UsageError, parse_yaml, set_environment, short_errors
from functional.gradients import gradient_norm, trained

TRAINER_OPTIONS = ("precision", "accumulate_grad_batches", "sync_batchnorm", "accelerator")


class Batches(LightningDataModule):
    """The batches of one optimiser step."""

    def __init__(self, batches: list):
        super().__init__()
        self.batches = batches

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)


class Replayed(Exception):
    """The step has been run again."""


class Replay(Callback):
    """Restores the random numbers, finds the first module whose output is not finite, ends after the step.

    Attributes:
        first: name and kind of that module, None if all outputs are finite.
        norm: of the gradient.
        names: of the parameters whose gradient is not finite.
        losses: what the step logged under names with "loss".
    """

    def __init__(self, rng: dict):
        self.rng, self.first, self.norm, self.names, self.losses = rng, None, None, [], {}

    def on_train_start(self, trainer, pl_module) -> None:
        pl_module.step_skipped = True  # a teacher was updated before the state was kept
        trainer.fit_loop.epoch_loop.batch_progress.reset()  # the state was kept in the middle of a batch
        for name, module in pl_module.named_modules():
            if not list(module.children()):
                module.register_forward_hook(self.watcher(name))

    def watcher(self, name: str):
        """A forward hook that notes the name if it is the first whose output is not finite."""

        def watch(module: nn.Module, inputs: tuple, output) -> None:
            if self.first is None and isinstance(output, Tensor) and not torch.isfinite(output).all():
                self.first = f"{name} ({type(module).__name__})"

        return watch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx: int) -> None:
        if self.rng is not None:
            set_rng_state(self.rng)
            self.rng = None

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        named = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        self.names = [name for name, gradient in named.items() if not torch.isfinite(gradient).all()]
        self.norm = float(gradient_norm(trained(optimizer)))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        if self.norm is not None:  # all batches of the step have been seen
            self.losses = {k: float(v) for k, v in trainer.callback_metrics.items() if "loss" in k}
            raise Replayed


def replay(path: Path) -> tuple[Replay, list[str]]:
    """Run the step of a file again.

    Returns:
        What was watched, and the names of the step's samples.

    Raises:
        UsageError: the file is none that callbacks.finite.Finite wrote.
    """
    if path.is_file() and (fault := damage(path)):
        raise UsageError(f"{path} is damaged: {fault}.\nGive the file of another rank or step.")
    step = torch.load(path, weights_only=True).get("replay") if path.is_file() else None
    if step is None:
        raise UsageError(f"{path} is no step to replay.\nGive a file of the folder non_finite of a run.")
    path = path.with_name("rank-0.ckpt")  # holds the state, which all processes share
    checkpoint = load_checkpoint(path)
    config = parse_yaml(checkpoint["config"], f"the config in {path}")
    model, _ = build({"model": for_this_device(config["model"])})
    # What a method draws can depend on the number of its process.
    model.__class__ = type(type(model).__name__, (type(model),), {"global_rank": step["rank"]})
    batches = step["batches"]
    watched = Replay(step["rng"])
    options = {k: v for k in TRAINER_OPTIONS if (v := config["trainer"].get(k)) is not None}
    trainer = Trainer(
        max_steps=checkpoint["global_step"] + 1,
        max_epochs=-1,
        logger=False,
        devices=1,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[watched],
        **options,
    )
    with suppress(Replayed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
        warnings.filterwarnings("ignore", message=".*have no `val_dataloader`")
        trainer.fit(model, datamodule=Batches(batches), ckpt_path=path, weights_only=True)
    return watched, [name for batch in batches for name in sample_names(batch)]


def sample_names(batch: dict) -> list[str]:
    """Names of the samples of a batch, also of nested batches."""
    names = list(batch.get("name", []))
    return names + [n for part in batch.values() if isinstance(part, dict) for n in sample_names(part)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="a file of a run's folder non_finite")
    args = parser.parse_args(argv)
    set_environment()
    with short_errors():
        watched, names = replay(args.file)
        print(f"samples: {', '.join(names)}")
        print("\n".join(f"{name}: {value:.6g}" for name, value in watched.losses.items()))
        print(f"first module whose output is not finite: {watched.first or 'none'}")
        more = f" and {len(watched.names) - 10} more" if len(watched.names) > 10 else ""
        listed = ", ".join(watched.names[:10]) or "none"
        print(f"norm of the gradient: {watched.norm}")
        print(f"parameters whose gradient is not finite: {listed}{more}")


if __name__ == "__main__":
    main()
