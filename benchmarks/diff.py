"""Time of DIFF's training step and evaluation against the released code's order (benchmarks.plain_diff).

    python -m benchmarks.diff --pairs 20 --output benchmarks/results/diff_cpu.json

Both orders take turns on the same network, image and noise, so that a machine whose speed drifts slows both.
A training step is one image whose label shows one prompted class: both branches, three losses, backward pass,
clipping, AdamW. An evaluation is one image without a label, and four at once: a call of a small U-Net with
one row takes more than half of the time that two rows take.

The first part runs the network of a config on the CPU, with the published path of 37 steps; before it is
timed the logits of both orders must agree, with fresh noise in the path and without. The second, left out
without CUDA, runs random weights of Stable Diffusion 2.1's sizes in bf16, on 512x512 and 1024x512 pixels,
with PyTorch's attention and with that of xformers where it is installed.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate, mse_loss
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from benchmarks.madm import H200_TFLOP_PER_S
from benchmarks.plain_diff import plain_branches, plain_features, plain_logits
from benchmarks.random_models import random_model
from benchmarks.record import provenance, report
from benchmarks.throughput import now
from cli import build, resolve
from functional.losses import weighted_cross_entropy
from models.diff import CITYSCAPES_PROMPTS, DIFF, DIFFBackbone, Draw
from models.diffusion.attention import use_attention_backend

TOLERANCE = 1e-3  # of the difference of logits, over their largest value, in float32
# Of one image, 2 FLOP per multiply-add: the U-Net's pass, the VAE's encoder, and all that is trained; at
# 512x512 and at 1024x512 pixels. A backward pass counts twice.
TFLOP = {"train": (0.804, 1.117, 0.561), "eval": (1.850, 2.302, 1.123)}
SIZES = {"train": 512, "eval": 1024}  # widths of the images; they are 512 high
STEPS, CLIP = 37, 5.0  # of the path; norm of the gradients


def losses(network: DIFF, branches: tuple[Tensor, Tensor], label: Tensor) -> Tensor:
    """DIFF's three losses of the branches' logits."""
    large = [interpolate(logits, size=label.shape[-2:], mode="bilinear") for logits in branches]
    return sum(weighted_cross_entropy(logits, label) for logits in large) + mse_loss(*branches)


class Turns:
    """One network, image and noise in both orders.

    Args:
        network: in training mode for a step, see step; its dropout must be 0, that both orders may agree.
        image: [B, 3, H, W]; a step wants one. label: [1, H, W] with one prompted class.
    """

    def __init__(self, network: DIFF, image: Tensor, label: Tensor):
        self.network, self.image, self.label = network, image, label
        self.learned = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learned, lr=1e-6)

    def draw(self, step: int, count: int) -> Tensor:
        """The same noise for a step and row in every call, on the device."""
        factor = self.network.backbone.diffusion.vae_factor
        size = [side // factor for side in self.image.shape[-2:]]
        generator = torch.Generator(self.image.device).manual_seed(step + 1)
        return torch.randn(8, 4, *size, generator=generator, device=self.image.device)[:count]

    def step(self, branches: Callable[[Tensor, Tensor, Draw], tuple[Tensor, Tensor]]) -> None:
        """A training step by an order's function of image, label and noise."""
        loss = losses(self.network, branches(self.image, self.label, self.draw), self.label)
        self.optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(self.learned, CLIP)
        self.optimizer.step()

    @torch.no_grad()
    def ours(self) -> Tensor:
        """Logits of an evaluation in the size of the head."""
        backbone = self.network.backbone
        return self.network.head(backbone.fuse(self.image, backbone.views(len(self.image)), self.draw))

    @torch.no_grad()
    def plain(self) -> Tensor:
        """The same in the released order."""
        sample = self.draw(-1, len(self.image))
        fresh = lambda step, prompts: self.draw(step, len(self.image))[None]  # noqa: E731
        return plain_logits(
            self.network, plain_features(self.network.backbone, self.image, None, sample, fresh)
        )

    def differences(self) -> dict[str, float]:
        """Largest difference of both orders' logits over the largest logit, with fresh noise and without."""
        found, eta = {}, self.network.backbone.eta
        for name, value in {"fixed noise": eta, "eta 0": 0.0}.items():
            self.network.backbone.eta = value
            self.network.train()
            with torch.no_grad():
                pairs = [
                    *zip(
                        self.network.branches(self.image, self.label, self.draw),
                        plain_branches(self.network, self.image, self.label, self.draw),
                        strict=True,
                    ),
                    (self.ours(), self.plain()),
                ]
            found[name] = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
        self.network.backbone.eta = eta
        return found


def alternate(ours: Callable, plain: Callable, pairs: int, title: str) -> dict:
    """Time two functions in turn, the first pair untimed: medians, ratio pair by pair and its quartiles."""
    seconds = {ours: [], plain: []}
    for _ in tqdm(range(1 + pairs), desc=title, unit="pair"):
        for function, times in seconds.items():
            start = now()
            function()
            times.append(now() - start)
    a, b = seconds[ours][1:], seconds[plain][1:]
    ratios = [y / x for x, y in zip(a, b, strict=True)]
    return {
        "ours_s": statistics.median(a),
        "plain_s": statistics.median(b),
        "times_faster": statistics.median(ratios),
        "times_faster_quartiles": statistics.quantiles(ratios, n=4)[::2],
    }


def measure(turns: Turns, evaluated: dict[str, Turns], pairs: int) -> dict:
    """Training steps of one image and evaluations of others, in both orders."""
    network = turns.network.train()
    train = alternate(
        partial(turns.step, network.branches),
        partial(turns.step, partial(plain_branches, network)),
        pairs,
        "training",
    )
    network.eval()
    scored = {name: alternate(e.ours, e.plain, pairs, name) for name, e in evaluated.items()}
    return {"training": train, **scored}


def measure_config(config: Path, pairs: int) -> dict:
    """The network of a config with the published path on the CPU: a training crop and an image to be scored.

    Raises:
        RuntimeError: the logits of the two orders are not the same.
    """
    experiment = resolve([config])
    network = experiment["model"]["init_args"]["network"]["init_args"]
    network["dropout"] = 0.0
    network["backbone"]["init_args"]["steps"] = STEPS
    experiment["data"]["init_args"] |= {"batch_size": 1, "num_workers": 0, "rare_class_sampling": None}
    torch.manual_seed(0)
    module, datamodule = build(experiment)
    batches = next(iter(datamodule.train_dataloader())), next(iter(datamodule.test_dataloader()[0]))
    crop, scored = (batch["image"] for batch in batches)
    label = one_class(module.network, crop)
    turns = Turns(module.network, crop, label)
    differences = turns.differences()
    if not max(differences.values()) <= TOLERANCE:
        raise RuntimeError(
            f"The two orders do not give the same logits: found differences {differences}, allowed is "
            f"{TOLERANCE:.0e}. Their times say nothing."
        )
    evaluated = {
        "evaluation": Turns(module.network, scored[:1], label),
        "evaluation of four": Turns(module.network, scored[:4], label),
    }
    shapes = {"crop": list(crop.shape), "scored": list(scored.shape[1:])}
    return {**shapes, "logit_differences": differences, **measure(turns, evaluated, pairs)}


def one_class(network: DIFF, image: Tensor) -> Tensor:
    """A label [1, H, W] whose left half shows the first prompted class, the rest one without a prompt."""
    prompted = network.backbone.prompted.tolist()
    other = next(c for c in range(len(prompted) + 1) if c not in prompted)
    label = torch.full((1, *image.shape[-2:]), other, device=image.device)
    label[..., : image.shape[-1] // 2] = prompted[0]
    return label


def measure_sd21(pairs: int) -> dict:
    """Random weights of Stable Diffusion 2.1's sizes in bf16 on CUDA, with each attention that is there."""
    torch.manual_seed(0)
    diffusion = random_model("sd-2.1", "cuda", ["", *CITYSCAPES_PROMPTS.values()], "bfloat16")
    network = DIFF(DIFFBackbone(diffusion), 19, dropout=0.0).cuda()
    found = {"machine": torch.cuda.get_device_name()}
    for attention in ["sdpa", *(["xformers"] if find_spec("xformers") else [])]:
        use_attention_backend(diffusion.unet, attention)
        images = {name: torch.rand(1, 3, 512, width, device="cuda") for name, width in SIZES.items()}
        turns = {name: Turns(network, image, one_class(network, image)) for name, image in images.items()}
        part = measure(turns["train"], {"evaluation": turns["eval"]}, pairs)
        part["memory_bytes"] = {
            "training": peak_bytes(partial(turns["train"].step, network.train().branches)),
            "evaluation": peak_bytes(turns["eval"].ours),
        }
        part["percent_of_h200_roofline"] = {
            "training": 100 * roofline_seconds(network, "train") / part["training"]["ours_s"],
            "evaluation": 100 * roofline_seconds(network, "eval") / part["evaluation"]["ours_s"],
        }
        found[attention] = part
    return found


def roofline_seconds(network: DIFF, kind: str) -> float:
    """Least time of an H200: one image, in training with one prompted class (three rows, two branches)."""
    unet, encode, fusion = TFLOP[kind]
    passes = max(network.backbone.path.saved) + 1
    rows, fusions = (3, 2 * 3) if kind == "train" else (1, 1)
    return (passes * rows * unet + encode + fusions * fusion) / H200_TFLOP_PER_S


def peak_bytes(function: Callable) -> int:
    """Peak of CUDA's memory while a function runs, weights included."""
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    config = Path("conf/mini/diff_game2real.yaml")
    parser.add_argument("--config", type=Path, default=config, help="experiment of the first part")
    parser.add_argument("--pairs", type=int, default=20, help="pairs of steps, and of evaluations, timed")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    args = parser.parse_args(argv)
    if args.pairs < 2:
        parser.error(f"--pairs {args.pairs}: quartiles need at least 2.")
    cuda = torch.cuda.is_available()
    result = {
        "config": str(args.config),
        **provenance(),
        "cpu": measure_config(args.config, args.pairs),
        "cuda, Stable Diffusion 2.1": measure_sd21(args.pairs)
        if cuda
        else "left out: there is no CUDA device",
    }
    report(result, args.output)


if __name__ == "__main__":
    main()
