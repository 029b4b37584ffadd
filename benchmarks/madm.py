"""Time and memory of MADM's training step against the released code's order of work (benchmarks.plain_madm).

    python -m benchmarks.madm --pairs 50 --output benchmarks/results/madm_cpu.json

The Trainer's step (two calls of the VAE's encoder, the source's graph freed before the mixed one is built)
and a plain one (five calls, both graphs alive until the one backward pass) take turns on the same module,
optimiser and batch, so that a machine whose speed drifts slows both. At the first pair both start from the
same weights and random numbers: their gradients must agree, and their memory is measured (benchmarks.memory).

The first part runs the experiment of a config on the CPU in float32. The second, left out without CUDA, runs
random weights of Stable Diffusion 1.4's sizes on 512x512 images under bf16 autocast. There the gradients are
compared too, but need not agree: the plain order adds those of the two images in bf16, ours in float32.
"""

import argparse
import statistics
from contextlib import ExitStack
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from benchmarks.memory import ActivationMemory
from benchmarks.plain_madm import plain_backward
from benchmarks.random_models import random_model
from benchmarks.record import provenance, report
from benchmarks.throughput import now
from cli import build, resolve
from lightning_modules.madm import MADMTraining
from models.madm import MADM

TOLERANCE = 1e-3  # of gradient_difference in float32
# A forward pass of one image of 512x512, 2 FLOP per multiply-add of convolutions, linear layers, attention; a
# backward pass counts twice.
TFLOP = {"unet": 0.803, "adapter": 1.913, "encode": 1.117, "decode": 2.515}
H200_TFLOP_PER_S, H200_BYTES_PER_S = 790, 4.8e12  # attained bf16 peak; memory


def gradient_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest distance of a parameter's two gradients over the norm of the expected one.

    A norm below a thousandth of that of all gradients counts as this much: some are zero but for rounding.
    """
    norms = torch.stack([gradient.norm() for gradient in expected])
    distances = torch.stack([(a - b).norm() for a, b in zip(found, expected, strict=True)])
    return (distances / norms.clamp(min=norms.norm() / 1000)).max().item()


class Turns(Callback):
    """Has a plain step follow each of the Trainer's, on its module and optimiser; compares the first two.

    Attributes:
        ours, plain: seconds of the Trainer's and of the plain steps.
        memory: peak bytes of both, see ActivationMemory. difference: see gradient_difference.
    """

    def __init__(self):
        self.ours: list[float] = []
        self.plain: list[float] = []
        self.memory: dict[str, ActivationMemory] = {}
        self.difference = float("nan")
        self.compared = ExitStack()  # of our gradients in the first step

    def on_train_batch_start(self, trainer, pl_module: MADMTraining, batch: dict, batch_idx: int) -> None:
        if batch_idx == 0:
            torch.manual_seed(0)  # for dropout
            with ActivationMemory(pl_module) as self.memory["plain"]:
                self.backward(trainer, pl_module, batch)
            self.expected = [parameter.grad for parameter in trained(trainer.optimizers[0])]
            trainer.optimizers[0].zero_grad()
            torch.manual_seed(0)
            self.memory["ours"] = self.compared.enter_context(ActivationMemory(pl_module))
        self.start = now()

    def on_before_optimizer_step(self, trainer, pl_module: MADMTraining, optimizer) -> None:
        if not self.ours:
            self.compared.close()
            found = [parameter.grad for parameter in trained(optimizer)]
            self.difference = gradient_difference(found, self.expected)
            del self.expected

    def on_train_batch_end(
        self, trainer, pl_module: MADMTraining, outputs, batch: dict, batch_idx: int
    ) -> None:
        end = now()
        self.ours.append(end - self.start)
        optimizer = trainer.optimizers[0]
        pl_module.network.update_teacher(trainer.global_step, pl_module.max_alpha)
        optimizer.zero_grad()
        self.backward(trainer, pl_module, batch)
        clip_grad_norm_(trained(optimizer), pl_module.max_gradient_norm)
        optimizer.step()
        self.plain.append(now() - end)

    def backward(self, trainer: Trainer, module: MADMTraining, batch: dict) -> None:
        with trainer.precision_plugin.train_step_context():
            plain_backward(module, batch)


def trained(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def measure(module: MADMTraining, batch: dict, pairs: int, warmup: int, **trainer) -> dict:
    """Median times, their ratio pair by pair, memory, and how far the gradients of the first pair differ.

    Args:
        batch: of every step.
        warmup: pairs before those that are timed, at least the one that is compared.
        trainer: its accelerator and precision.
    """
    turns, steps = Turns(), warmup + pairs
    Trainer(
        max_steps=steps,
        max_epochs=-1,
        devices=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[turns],
        **trainer,
    ).fit(module, tqdm([batch] * steps, unit="pair"))
    ratios = [a / b for a, b in zip(turns.ours[warmup:], turns.plain[warmup:], strict=True)]
    memory = {name: found.peak for name, found in turns.memory.items()}
    return {
        "images": list(batch["source"]["image"].shape),
        "pairs": len(ratios),
        "ours_s": statistics.median(turns.ours[warmup:]),
        "plain_s": statistics.median(turns.plain[warmup:]),
        "ours_over_plain": statistics.median(ratios),
        "ours_over_plain_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "memory_bytes": memory,
        "memory_ours_over_plain": memory["ours"] / memory["plain"],
        "gradient_difference": turns.difference,
    }


def measure_config(config: Path, pairs: int, warmup: int) -> dict:
    """The experiment of a config on the CPU, its first batch in each step.

    Raises:
        RuntimeError: the gradients of the two orders are not the same.
    """
    experiment = resolve([config])
    # Where no pseudo label is trusted yet, the comparison would not see them.
    experiment["model"]["init_args"]["threshold"] = 0.2
    experiment["data"]["init_args"] |= {"rare_class_sampling": None, "num_workers": 0}
    torch.manual_seed(0)
    module, datamodule = build(experiment)
    batch = next(iter(datamodule.train_dataloader()))
    result = measure(module, batch, pairs, warmup, accelerator="cpu")
    if not result["gradient_difference"] <= TOLERANCE:
        raise RuntimeError(
            f"The two orders do not give the same gradients: found a difference of "
            f"{result['gradient_difference']:.1e}, allowed is {TOLERANCE:.0e}. Their times say nothing."
        )
    return result


def roofline_seconds(module: MADMTraining) -> float:
    """Least time of an H200 for a step of one pair, at 512x512 and 1.4's sizes.

    The student passes twice with a backward pass and the teacher once; five images are encoded and three
    decoded. Norm and clipping read, read and write the gradients; AdamW reads weights, gradients and two
    moments and writes all but the gradients: ten float32 numbers for each trained one.
    """
    work = 7 * (TFLOP["unet"] + TFLOP["adapter"]) + 5 * TFLOP["encode"] + 3 * TFLOP["decode"]
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return work / H200_TFLOP_PER_S + 10 * 4 * trained / H200_BYTES_PER_S


def measure_sd14(pairs: int, warmup: int) -> dict:
    """Random weights of Stable Diffusion 1.4's sizes on one pair of random images, in bf16 on CUDA."""
    torch.manual_seed(0)
    module = MADMTraining(MADM(random_model("sd-1.4", "cuda"), 11), "deliver11")
    label = torch.randint(11, (1, 16, 16)).repeat_interleave(32, 1).repeat_interleave(32, 2)
    batch = {
        "source": {"image": torch.rand(1, 3, 512, 512), "label": label},
        "target": {"image": torch.rand(1, 3, 512, 512)},
    }
    result = measure(module, batch, pairs, warmup, accelerator="gpu", precision="bf16-mixed")
    percent = 100 * roofline_seconds(module) / result["ours_s"]
    return {"machine": torch.cuda.get_device_name(), **result, "percent_of_h200_roofline": percent}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    config = Path("conf/mini/madm_rgb2depth.yaml")
    parser.add_argument("--config", type=Path, default=config, help="experiment of the first part")
    parser.add_argument("--pairs", type=int, default=50, help="pairs of steps that are timed")
    parser.add_argument("--warmup", type=int, default=3, help="pairs before them, the compared one included")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    args = parser.parse_args(argv)
    if args.pairs < 2 or args.warmup < 1:
        parser.error(
            f"--pairs {args.pairs} --warmup {args.warmup}: quartiles need at least 2 pairs, after 1 or more."
        )
    left_out = "left out: there is no CUDA device"
    cuda = torch.cuda.is_available()
    result = {
        "config": str(args.config),
        **provenance(),
        "cpu": measure_config(args.config, args.pairs, args.warmup),
        "cuda, Stable Diffusion 1.4": measure_sd14(args.pairs, args.warmup) if cuda else left_out,
    }
    report(result, args.output)


if __name__ == "__main__":
    main()
