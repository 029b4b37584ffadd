"""Support images per minute: a batch against one at a time (DifFSS, arXiv 2307.00773, stage A).

    python -m benchmarks.difffss --pairs 10 --output benchmarks/results/difffss_cpu.json

N images of one class and control are drawn, with the same weights and noise, as one batch, one at a time by
the same code, and in the order of the released code (benchmarks.plain_difffss): one at a time, each prompt
anew, and the two prompts one after the other. They take turns, so that a machine whose speed drifts slows
all; from the encoding of prompts to images on the CPU. Before they are timed their images must agree.

The first part draws with the mini models on the CPU in float32, at 64x64 pixels. The second, left out without
CUDA, has random weights of Stable Diffusion 1.5's sizes in fp16, at 512x512 pixels, where images are compared
too, but need only be numbers: guidance enlarges what fp16 rounds.
"""

import argparse
import math
from functools import partial
from pathlib import Path

import torch
from diffusers import ControlNetModel
from torch import Tensor

from benchmarks.diff import alternate
from benchmarks.diffsegmenter import add_text_encoder
from benchmarks.plain_difffss import plain_images
from benchmarks.random_models import random_model
from benchmarks.record import provenance, report
from datamodules.mini_world.objects import render_objects
from functional.classes import MINI_OBJECTS
from functional.control_images import mask_image
from models.difffss import SupportGenerator, load_controlnet
from models.diffusion.stable_diffusion import StableDiffusion

TOLERANCE = 2 / 255  # of the difference of two images
PROMPTS = ("a photo of a car", "")


def one_at_a_time(generator: SupportGenerator, *arguments) -> Tensor:
    """As SupportGenerator, in batches of one."""
    *rest, seeds = arguments
    return torch.cat([generator(*rest, [seed]) for seed in seeds])


def batched(generator: SupportGenerator, *arguments) -> Tensor:
    """As SupportGenerator; prompts are encoded anew."""
    generator.diffusion.text_cache.clear()
    return generator(*arguments)


def measure(generator: SupportGenerator, control: Tensor, number: int, pairs: int, tolerance: float) -> dict:
    """Images per minute of the three orders.

    Raises:
        RuntimeError: they do not draw the same images, or no numbers.
    """
    arguments = (generator, *PROMPTS, control, list(range(number)))
    ours, single, plain = (partial(order, *arguments) for order in (batched, one_at_a_time, plain_images))
    expected, found = plain(), {}
    for name, order in {"batch": ours, "one at a time": single}.items():
        found[name] = (order() - expected).abs().max().item()
        if not found[name] <= tolerance:
            raise RuntimeError(
                f"{name} does not draw the images of the released order: found a difference of "
                f"{found[name]:.1e}, allowed is {tolerance:.1e}. Their times say nothing."
            )
    result = {"size": list(control.shape[1:]), "images": number, "steps": generator.steps}
    result |= {"guidance": generator.guidance, "largest_difference": found}
    for name, other in {"one at a time": single, "released order": plain}.items():
        times = alternate(ours, other, pairs, name)
        rates = {
            key: 60 * number / times[f"{order}_s"] for key, order in (("batch", "ours"), (name, "plain"))
        }
        result[f"against {name}"] = {"images_per_minute": rates, **times}
    return result


def load(steps: int) -> tuple[SupportGenerator, Tensor]:
    """The mini models, and the mask of a car as control."""
    parts = ("unet", "vae_decoder", "text_encoder")
    diffusion = StableDiffusion("assets/mini-diffusion", parts)
    controlnet = load_controlnet("assets/mini-controlnet-mask")
    scenes = (render_objects("test", i, size=64, count=1) for i in range(1000))
    car = MINI_OBJECTS.names.index("car")
    label = next(scene["label"] for scene in scenes if (scene["label"] == car).any())
    control = mask_image(torch.from_numpy(label), MINI_OBJECTS.colors)[0]
    return SupportGenerator(diffusion, controlnet, steps=steps, guidance=4.0), control


def load_sd15(mini: SupportGenerator) -> tuple[SupportGenerator, Tensor]:
    """Random weights of Stable Diffusion 1.5's sizes in fp16 on CUDA; 1.4 and 1.5 differ in weights only."""
    torch.manual_seed(0)
    diffusion = random_model("sd-1.4", "cuda", dtype="float16")
    add_text_encoder(diffusion, mini.diffusion.tokenizer)
    with diffusion.device:
        controlnet = ControlNetModel.from_unet(diffusion.unet).to(diffusion.dtype)
    return SupportGenerator(diffusion, controlnet, steps=mini.steps), torch.rand(3, 512, 512)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--number", type=int, default=4, help="images of a pair, N")
    parser.add_argument("--steps", type=int, default=20, help="of DDIM")
    parser.add_argument("--pairs", type=int, default=10, help="pairs of batches that are timed")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    args = parser.parse_args(argv)
    if args.pairs < 2 or args.number < 1 or 1000 % args.steps:
        parser.error("--pairs is at least 2, --number at least 1, and --steps divides 1000.")
    mini, control = load(args.steps)
    options = {"number": args.number, "pairs": args.pairs}
    result = {
        **provenance(),
        "pairs": args.pairs,
        "cpu": measure(mini, control, tolerance=TOLERANCE, **options),
        "cuda, Stable Diffusion 1.5": {
            "machine": torch.cuda.get_device_name(),
            **measure(*load_sd15(mini), tolerance=math.inf, **options),
        }
        if torch.cuda.is_available()
        else "left out: there is no CUDA device",
    }
    report(result, args.output)


if __name__ == "__main__":
    main()
