"""What the guards of a run cost: steps with them against steps without, in turn, in one training.

    python -m benchmarks.guards --pairs 100 --output benchmarks/results/guards_cpu.json

The guards are the finite check with its gradient norm and notes of random numbers, the bookkeeping of
checkpoints, and the looks at signals. Every second step goes without their callbacks, and
without the norm, unless the method clips by it. Nothing is saved within the timed steps. It is one process:
what several ask each other in every step, one number, is not in it.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from lightning.pytorch import Callback
from tqdm import tqdm

from benchmarks.record import provenance, report
from benchmarks.throughput import now
from callbacks.checkpoints import Checkpoints
from callbacks.finite import Finite
from callbacks.preemption import Preemption
from cli import SegmentationCLI

GUARDS = (Checkpoints, Finite, Preemption)
CONFIGS = ("conf/mini/supervised_street.yaml", "conf/mini/madm_rgb2depth.yaml")


class TakeTurns(Callback):
    """Takes the guards out for every second step, and times each from the end of the one before.

    Attributes:
        seconds: of the steps with guards (True) and of those without (False).
    """

    def __init__(self, steps: int):
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self.guarded, self.resumed = True, 0.0
        self.progress = tqdm(total=steps, unit="step")

    def on_train_start(self, trainer, pl_module) -> None:
        self.all = trainer.callbacks
        self.others = [callback for callback in self.all if not isinstance(callback, GUARDS)]
        self.resumed = now()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        self.seconds[self.guarded].append(now() - self.resumed)
        self.progress.update()
        self.guarded = not self.guarded
        trainer.callbacks = self.all if self.guarded else self.others
        if pl_module.automatic_optimization:  # MADM clips by the norm in any case
            pl_module.__dict__.pop("on_before_optimizer_step", None)
            if not self.guarded:
                pl_module.on_before_optimizer_step = lambda optimizer: None
        self.resumed = now()

    def on_train_end(self, trainer, pl_module) -> None:
        trainer.callbacks = self.all
        self.progress.close()


def measure(config: Path, pairs: int, warmup: int) -> dict:
    """Median step times with and without guards, and the ratio pair by pair."""
    with tempfile.TemporaryDirectory() as folder:
        steps = 2 * (warmup + pairs)
        words = ["--config", str(config), "--output", folder, "--wandb.mode", "disabled", "--overwrite"]
        words += ["--trainer.max_steps", str(steps + 1), "--trainer.limit_val_batches", "0"]
        words += ["--trainer.callbacks", "[]", "--checkpoints.every_n_steps", str(steps + 1)]
        command = SegmentationCLI(words)
        turns = TakeTurns(steps)
        command.trainer.callbacks.append(turns)
        command.fit()
        command.release()
    with_guards, without = (turns.seconds[guarded][warmup : warmup + pairs] for guarded in (True, False))
    ratios = [a / b for a, b in zip(with_guards, without, strict=True)]
    return {
        "pairs": len(ratios),
        "guarded_s": statistics.median(with_guards),
        "unguarded_s": statistics.median(without),
        "guarded_over_unguarded": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, nargs="+", default=[Path(path) for path in CONFIGS])
    parser.add_argument("--pairs", type=int, default=100, help="pairs of steps that are measured")
    parser.add_argument("--warmup", type=int, default=5, help="pairs before them that are left out")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    args = parser.parse_args(argv)
    if args.pairs < 2 or args.warmup < 0:
        parser.error(
            f"--pairs {args.pairs} --warmup {args.warmup}: quartiles need at least 2 pairs, after 0 or more."
        )
    steps = {str(config): measure(config, args.pairs, args.warmup) for config in args.config}
    report({**provenance(), "steps": steps}, args.output)


if __name__ == "__main__":
    main()
