"""Pictures of single objects drawn by diffusers' own pipelines, and how far they show what was asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from torch import Tensor
from tqdm import tqdm

from datamodules.mini_world.captions import article
from datamodules.mini_world.objects import BACKGROUNDS, CATEGORIES, COLORS, VANISHING, render_objects
from scripts.mini_diffusion.intervals import Interval, bootstrap
from scripts.mini_diffusion.judges import SIZE, ObjectClassifier, ObjectSegmenter, mask_iou
from scripts.train_mini_controlnet import CONTROLS

BATCH = 32


class Thing(NamedTuple):
    """The one object of a picture and its ground."""

    category: str
    color: str
    background: str

    @property
    def prompt(self) -> str:
        return f"a photo of {article(f'{self.color} {self.category}')} on {self.background}"


@dataclass
class Samples:
    """N generated pictures and what each was asked to show."""

    image: Tensor  # [N, 3, 64, 64] in [0, 1]
    things: list[Thing]
    label: Tensor | None = None  # uint8 [N, 64, 64], which controlled it


def things_to_ask(count: int, seed: int) -> list[Thing]:
    """All categories and all pairs of colour and ground in turn, without those that are never drawn."""
    rng = np.random.default_rng(seed)
    pairs = [(color, ground) for ground in BACKGROUNDS for color in COLORS if VANISHING[ground] != color]
    order = rng.permutation(len(pairs))
    return [Thing(CATEGORIES[i % len(CATEGORIES)], *pairs[order[i % len(pairs)]]) for i in range(count)]


def draw(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    guidance: float,
    seeds: Sequence[int],
    steps: int = 30,
    control: Tensor | None = None,
) -> Tensor:
    """Images [N, 3, 64, 64] in [0, 1], on the CPU, by deterministic DDIM from the noise of the seeds in turn.

    Args:
        pipeline: as it was loaded; its scheduler is replaced.
        control: pictures [N, 3, 64, 64] in [0, 1] for a pipeline with a ControlNet.
    """
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    generators, images = [torch.Generator().manual_seed(seed) for seed in seeds], []
    for first in tqdm(range(0, len(prompts), BATCH), desc=f"samples, guidance {guidance:g}"):
        part = slice(first, first + BATCH)
        numbers = range(first, min(first + BATCH, len(prompts)))
        images += pipeline(
            prompts[part],
            **({} if control is None else {"image": control[part]}),
            height=SIZE,
            width=SIZE,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[generators[i % len(generators)] for i in numbers],
            output_type="pt",
        ).images.cpu()
    return torch.stack(images)


def sample_objects(folder: Path, count: int, guidance: float, seeds: Sequence[int]) -> Samples:
    """Ask the model in `folder` for single objects of all categories and colours."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    things = things_to_ask(count, seeds[0])
    return Samples(draw(pipeline, [thing.prompt for thing in things], guidance, seeds), things)


def sample_controlled(
    folder: Path,
    controlnet_folder: Path,
    kind: Literal["mask", "edge"],
    count: int,
    guidance: float,
    seeds: Sequence[int],
) -> Samples:
    """Draw the first single-object scenes of the split test anew, from their labels and their full captions.

    Args:
        kind: what the ControlNet was trained to read, a key of CONTROLS.
    """
    controlnet = ControlNetModel.from_pretrained(controlnet_folder, dtype=torch.float32)
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        folder, controlnet=controlnet, dtype=torch.float32
    )
    scenes = [render_objects("test", i, size=SIZE, count=1) for i in range(count)]
    label = torch.from_numpy(np.stack([scene["label"] for scene in scenes]))
    things = [Thing(*scene["objects"][0], scene["caption_facts"]["background"]) for scene in scenes]
    prompts = [thing.prompt for thing in things]
    return Samples(draw(pipeline, prompts, guidance, seeds, control=CONTROLS[kind](label)), things, label)


# ----------------------------------------------------------------------------------------------------- scores


def score_samples(classifier: ObjectClassifier, samples: Samples) -> dict[str, float | Interval]:
    """Shares of the samples whose category and colour are those asked for, and what chance gives."""
    category, color = classifier.name(samples.image)
    asked_category = torch.tensor([CATEGORIES.index(thing.category) for thing in samples.things])
    asked_color = torch.tensor([list(COLORS).index(thing.color) for thing in samples.things])
    return {
        "samples": len(samples.things),
        "category %": bootstrap(100 * (category == asked_category).numpy()),
        "category by chance %": 100 / len(CATEGORIES),
        "color %": bootstrap(100 * (color == asked_color).numpy()),
        "color by chance %": 100 / len(COLORS),
    }


def score_controlled(segmenter: ObjectSegmenter, samples: Samples) -> dict[str, float | Interval]:
    """IoU of the object in each sample with its control mask, and by chance with another scene's."""
    found, mask = segmenter.find(samples.image), samples.label > 0
    return {
        "samples": len(samples.things),
        "IoU %": bootstrap(mask_iou(found, mask).numpy()),
        "IoU by chance %": bootstrap(mask_iou(found, mask.roll(1, 0)).numpy()),
    }
