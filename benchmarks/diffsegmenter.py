"""Time and memory of DiffSegmenter against the released order of work (benchmarks.plain_diffsegmenter).

    python -m benchmarks.diffsegmenter --pairs 10 --output benchmarks/results/diffsegmenter_cpu.json

Both orders take turns on one image, with the same weights, noise and prompts, so that a machine whose speed
drifts slows both. They begin with the image and end with the score maps; all texts are encoded anew each
time, as captions ask for. Before they are timed their score maps must agree, and the peak of their memory
above the weights is measured (LiveMemory on the CPU, benchmarks.memory on CUDA). Ours is measured once more
where it completes by one of the finest self-attention layers instead of all: what the further layers add,
next to what their probabilities would take.

The first part runs the network of a config on the CPU in float32, on 256x256 pixels: the mini model's latents
are then as large as those of Stable Diffusion on 512x512. The second, left out without CUDA, runs random
weights of Stable Diffusion 1.5's sizes in fp16 on 512x512 pixels. There the score maps are compared too, but
need only be numbers: random self-attention is all but uniform, so the last stretch enlarges what fp16 rounds.
"""

import argparse
import math
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.diff import alternate
from benchmarks.memory import ActivationMemory
from benchmarks.plain_diffsegmenter import plain_maps
from benchmarks.random_models import random_model
from benchmarks.record import provenance, report
from cli import build, resolve
from functional.attention_maps import level_of
from models.diffsegmenter import DiffSegmenter
from models.diffusion.attention import attention_layers
from models.diffusion.stable_diffusion import StableDiffusion

TOLERANCE = 1e-3  # of the difference of score maps, which reach from 0 to 1, in float32
CLASSES = (1, 5, 20)  # in an image
SIZE = 256  # of the image on the CPU
TEXT_ENCODER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
}  # of Stable Diffusion 1.5
MIB = 2**20


class LiveMemory(TorchDispatchMode):
    """Measures what runs inside the block on the CPU: afterwards `peak` has the bytes.

    A storage counts once from the operation that makes it until it is freed, which is exact and repeatable.
    Left out is what lives within one operation.

    Args:
        module: whose parameters and buffers do not count.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        own = [*module.parameters(), *module.buffers()]
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in own)
        self.held = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self.known:
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        self.known.add(storage)
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self.release, storage.nbytes())

    def release(self, size: int) -> None:
        self.held -= size


def peak_mib(network: DiffSegmenter, function: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Peak of a function's memory above the weights, and its result."""
    memory = ActivationMemory if network.diffusion.device.type == "cuda" else LiveMemory
    with memory(network) as found:
        result = function()
    return found.peak / MIB, result


def finest_layers(unet: nn.Module) -> list[str]:
    """The self-attention layers by which maps are completed."""
    return [name for name in attention_layers(unet, "self") if level_of(name, len(unet.up_blocks)) == 0]


@contextmanager
def completed_by(count: int):
    """Inside the block DiffSegmenter keeps and completes by the first `count` of the finest layers only."""

    def some(unet: nn.Module, kind: str) -> list[str]:
        return attention_layers(unet, kind) if kind == "cross" else finest_layers(unet)[:count]

    with patch("models.diffusion.attention.attention_layers", some):
        yield


def explicit_mib(network: DiffSegmenter, layers: list[str], classes: int) -> float:
    """What the probabilities of some of the finest layers take for the rows of our largest U-Net call."""
    diffusion = network.diffusion
    places = math.prod(side // diffusion.vae_factor for side in network.size)
    heads = sum(diffusion.unet.get_submodule(layer).heads for layer in layers)
    return min(classes, network.max_rows) * heads * places**2 * diffusion.dtype.itemsize / MIB


def our_maps(network: DiffSegmenter, image: Tensor, name: str, words: list[str]) -> Tensor:
    """Score maps [n, H, W] for prompts that are new, as captions make them."""
    network.diffusion.text_cache.clear()
    return network.score_maps(image, name, words)


def measure(
    network: DiffSegmenter, image: Tensor, name: str, words: list[str], pairs: int, tolerance: float
) -> dict:
    """Score maps, memory and time of an image in both orders, see DiffSegmenter.score_maps.

    Raises:
        RuntimeError: the score maps of the two orders are not the same, or no numbers.
    """
    ours, plain = (partial(order, network, image, name, words) for order in (our_maps, plain_maps))
    our_mib, found = peak_mib(network, ours)
    plain_mib, expected = peak_mib(network, plain)
    difference = (found - expected).abs().max().item()
    if not difference <= tolerance:
        raise RuntimeError(
            f"The two orders do not give the same score maps of {len(words)} classes: found a difference of "
            f"{difference:.1e}, allowed is {tolerance:.0e}. Their times say nothing."
        )
    with completed_by(1):
        one_mib, _ = peak_mib(network, ours)
    layers = finest_layers(network.diffusion.unet)
    return {
        "map_difference": difference,
        "memory_mib": {"ours": our_mib, "plain": plain_mib},
        "times_less_memory": plain_mib / our_mib,
        "finest_layers": {
            "all": len(layers),
            "all_mib": our_mib,
            "one_mib": one_mib,
            "growth_mib": our_mib - one_mib,
            "explicit_growth_mib": explicit_mib(network, layers[1:], len(words)),
        },
        **alternate(ours, plain, pairs, f"{len(words)} classes"),
    }


def measure_counts(
    network: DiffSegmenter, image: Tensor, name: str, words: list[str], counts: list[int], **options
) -> dict:
    """The first of the words, so many at a time; options as in measure."""
    first = {f"classes_{n}": measure(network, image, name, words[:n], **options) for n in counts}
    return {"image": list(image.shape), "max_rows": network.max_rows, **first}


def load(config: Path) -> tuple[DiffSegmenter, Tensor, str, list[str]]:
    """The network of a config, the first image [3, H, W] of its test set with its name, and all words."""
    experiment = resolve([config])
    network = experiment["model"]["init_args"]["network"]["init_args"]
    network["size"] = [SIZE, SIZE]
    network.pop("max_rows", None)  # it was chosen for small images
    experiment["data"]["init_args"] |= {"size": SIZE, "eval_length": 1, "num_workers": 0}
    module, datamodule = build(experiment)
    batch = next(iter(datamodule.test_dataloader()[0]))
    words = module.classes.words[1:] if module.classes.has_background else module.classes.words
    return module.network.eval(), batch["image"][0], batch["name"][0], list(words)


def measure_sd15(network: DiffSegmenter, name: str, words: list[str], counts: list[int], pairs: int) -> dict:
    """Random weights of Stable Diffusion 1.5's sizes in fp16 on CUDA, for prompts as the given network's."""
    torch.manual_seed(0)
    # 1.4 and 1.5 differ in their weights only.
    diffusion = random_model("sd-1.4", "cuda", dtype="float16")
    add_text_encoder(diffusion, network.diffusion.tokenizer)
    large = DiffSegmenter(diffusion, network.prompt)
    image = torch.rand(3, *large.size).to(diffusion.device)
    found = measure_counts(large, image, name, words, counts, pairs=pairs, tolerance=math.inf)
    return {"machine": torch.cuda.get_device_name(), **found}


def add_text_encoder(diffusion: StableDiffusion, tokenizer: CLIPTokenizer) -> None:
    """Give a model without one a random text encoder for the tokens of another model."""
    config = CLIPTextConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **TEXT_ENCODER)
    with diffusion.device:
        encoder = CLIPTextModel(config).to(diffusion.dtype)
    diffusion.text_encoder, diffusion.tokenizer = encoder.requires_grad_(False).eval(), tokenizer
    diffusion.parts += ("text_encoder",)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    config = Path("conf/mini/diffsegmenter_objects.yaml")
    parser.add_argument("--config", type=Path, default=config, help="experiment of the first part")
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES, help="numbers of classes")
    parser.add_argument("--pairs", type=int, default=10, help="pairs of images that are timed")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    args = parser.parse_args(argv)
    if args.pairs < 2:
        parser.error(f"--pairs {args.pairs}: quartiles need at least 2.")
    network, image, name, words = load(args.config)
    if not all(1 <= count <= len(words) for count in args.classes):
        given = " ".join(map(str, args.classes))
        parser.error(f"--classes {given}: {args.config} has {len(words)} classes; ask for 1 to all of them.")
    counted = {"counts": args.classes, "pairs": args.pairs}
    result = {
        "config": str(args.config),
        **provenance(),
        "pairs": args.pairs,
        "cpu": measure_counts(network, image, name, words, tolerance=TOLERANCE, **counted),
        "cuda, Stable Diffusion 1.5": measure_sd15(network, name, words, **counted)
        if torch.cuda.is_available()
        else "left out: there is no CUDA device",
    }
    report(result, args.output)


if __name__ == "__main__":
    main()
