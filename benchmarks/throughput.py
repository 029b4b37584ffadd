"""What the training loop costs: waiting for data, and Lightning with callbacks against a bare PyTorch loop.

    python -m benchmarks.throughput --pairs 200 --output benchmarks/results/throughput_cpu.json

Both loops train a copy of the same model on the same data with one loader worker each. Their steps take
turns in one process, so that a machine whose speed drifts slows both: quoted are medians over pairs of
neighbouring steps. On a CUDA device the U-Net's forward is also timed with both attention back ends.
"""

import argparse
import copy
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback
from tqdm import tqdm

from benchmarks.record import provenance, report
from cli import SegmentationCLI
from datamodules.base import SegmentationDataModule
from models.diffusion.stable_diffusion import StableDiffusion


class BareLoop:
    """The same step without Lightning: loader, loss, backward, AdamW (one rate for all), schedule."""

    def __init__(self, model, datamodule: SegmentationDataModule, max_steps: int):
        self.model = model.train()
        self.batches = iter(datamodule.train_dataloader())
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=model.lr, weight_decay=model.weight_decay)
        rate = (lambda step: model.schedule(step, max_steps)) if model.schedule else (lambda step: 1.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        model.log = lambda *args, **kwargs: None  # nothing listens

    def step(self) -> None:
        """Draw the next batch and update the weights by it."""
        batch = next(self.batches)
        batch = {k: v.to(self.model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        loss = self.model.training_step(batch, 0)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()


def now() -> float:
    """Seconds of a clock that is read when the device has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Interleave(Callback):
    """After each step of the Trainer runs one of the bare loop, and times both.

    The Trainer's time runs from the end of a bare step to the end of the Trainer's next batch, so all of its
    work between two batches (fetching, hooks, callbacks, logging) counts. The first batch is not timed.

    Attributes:
        ours, plain: seconds of each pair's step of the Trainer and of the bare loop.
        waits: the part of `ours` before the batch is there.
    """

    def __init__(self, bare: BareLoop, pairs: int):
        self.bare = bare
        self.ours: list[float] = []
        self.plain: list[float] = []
        self.waits: list[float] = []
        self.resumed: float | None = None
        self.progress = tqdm(total=pairs, unit="pair")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx: int) -> None:
        if self.resumed is not None:
            self.waits.append(now() - self.resumed)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        end = now()
        if self.resumed is not None:
            self.ours.append(end - self.resumed)
        self.bare.step()
        self.resumed = now()
        if self.ours:
            self.plain.append(self.resumed - end)
            self.progress.update()

    def on_train_end(self, trainer, pl_module) -> None:
        self.progress.close()


def measure_loop(config: Path, pairs: int, warmup: int) -> dict:
    """Median step times, their ratio pair by pair, and the share of a step before its batch is there."""
    with tempfile.TemporaryDirectory() as folder:
        steps = str(warmup + pairs + 1)
        words = ["--config", str(config), "--output", folder, "--wandb.mode", "disabled", "--overwrite"]
        words += ["--data.num_workers", "1", "--trainer.max_steps", steps, "--trainer.limit_val_batches", "0"]
        words += ["--checkpoints.every_n_steps", steps]
        command = SegmentationCLI(words)
        bare = BareLoop(copy.deepcopy(command.model), command.datamodule, int(steps))
        timing = Interleave(bare, warmup + pairs)
        command.trainer.callbacks.append(timing)
        bare.model.to(command.trainer.strategy.root_device)
        command.fit()
    ours, plain, waits = (times[warmup:] for times in (timing.ours, timing.plain, timing.waits))
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    return {
        "pairs": len(ratios),
        "ours_s": statistics.median(ours),
        "bare_s": statistics.median(plain),
        "ours_over_bare": statistics.median(ratios),
        "ours_over_bare_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "data_wait_share": statistics.median(w / a for w, a in zip(waits, ours, strict=True)),
    }


def measure_attention(model: str, repeats: int) -> dict:
    """Seconds of one U-Net forward in fp16 at batch 4, per attention back end (CUDA only)."""
    seconds = {}
    for backend in ("sdpa", "xformers"):
        diffusion = StableDiffusion(model, parts=("unet",), dtype="float16", attention=backend).cuda()
        size = diffusion.unet.config.sample_size
        latent = torch.randn(4, diffusion.latent_channels, size, size, device="cuda")
        context = torch.randn(1, diffusion.num_tokens, diffusion.context_width, device="cuda")
        times = []
        for _ in range(repeats + 5):
            start = now()
            with torch.no_grad():
                diffusion.predict(latent, 100, context)
            times.append(now() - start)
        seconds[backend] = statistics.median(times[5:])
    return seconds


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", type=Path, default=Path("conf/mini/supervised_street.yaml"), help="experiment"
    )
    parser.add_argument("--model", default="assets/mini-diffusion", help="for the attention back ends")
    parser.add_argument("--pairs", type=int, default=200, help="pairs of steps that are measured")
    parser.add_argument("--warmup", type=int, default=10, help="pairs before them that are left out")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    args = parser.parse_args(argv)
    if args.pairs < 2 or args.warmup < 0:
        parser.error(
            f"--pairs {args.pairs} --warmup {args.warmup}: quartiles need at least 2 pairs, after 0 or more."
        )
    result = {
        "config": str(args.config),
        **provenance(),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "loop": measure_loop(args.config, args.pairs, args.warmup),
    }
    if torch.cuda.is_available():
        result["attention_s"] = measure_attention(args.model, repeats=50)
    report(result, args.output)


if __name__ == "__main__":
    main()
