"""Where the attention of the mini model says that a word is, against the mask of what the word names."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from callbacks.pictures import to_uint8
from datamodules.mini_world.captions import article, named_classes
from datamodules.mini_world.objects import CATEGORIES, render_objects
from datamodules.mini_world.street import render_street
from functional.attention_maps import (
    complete,
    fuse_levels,
    level_size,
    mean_by_level,
    stretch,
    word_map,
)
from functional.classes import DELIVER11
from functional.palette import heat
from models.diffusion.attention import attention_layers, record_attention
from models.diffusion.conditioning import token_positions
from models.diffusion.stable_diffusion import StableDiffusion
from scripts.gallery import enlarge, grid
from scripts.mini_diffusion.intervals import bootstrap
from scripts.mini_diffusion.scenes import to_tensor

THRESHOLDS = torch.arange(0.02, 1, 0.02)
LEVELS = 4


@dataclass
class Words:
    """N pairs of a picture and a word that names something in it."""

    image: Tensor  # [N, 3, H, W] in [0, 1]
    mask: Tensor  # bool [N, H, W], where the named thing is
    name: list[str]
    scene: np.ndarray  # number of the scene, [N]


def stack_words(rows: Sequence[tuple[np.ndarray, np.ndarray, str, int]]) -> Words:
    """Words of rows (picture [H, W, 3] uint8, mask [H, W], name, scene)."""
    pictures, masks, names, scenes = zip(*rows, strict=True)
    return Words(to_tensor(pictures), torch.from_numpy(np.stack(masks)), list(names), np.array(scenes))


def object_words(split: str, scenes: int) -> Words:
    """Each named object of the first object scenes of a split."""
    rows = []
    for index in range(scenes):
        scene = render_objects(split, index)
        for name, _ in scene["objects"]:
            mask = scene["label"] == 1 + CATEGORIES.index(name)
            if mask.any():  # an object may be hidden behind another one
                rows.append((scene["rgb"], mask, name, index))
    return stack_words(rows)


def street_words(split: str, scenes: int) -> Words:
    """Each class that a caption would name in the first street scenes (style `real`) of a split."""
    rows = []
    for index in range(scenes):
        scene = render_street(split, index)
        for name in named_classes(scene["label"]):
            rows.append((scene["rgb"], scene["label"] == DELIVER11.names.index(name), name, index))
    return stack_words(rows)


@torch.no_grad()
def word_maps(
    diffusion: StableDiffusion, words: Words, timestep: int, seed: int, batch: int = 16
) -> tuple[Tensor, Tensor]:
    """Maps of each word by level, stretched to [0, 1]: of the cross-attention, and completed.

    Each word has a prompt of its own, "a photo of a {name}", and each scene one noise, as its words share it.
    Fusing and completing are linear in the weights, so the levels can be weighed afterwards.

    Returns:
        two tensors [N, levels, h, w] of the latent's size.
    """
    unet, generator = diffusion.unet, torch.Generator().manual_seed(seed)
    cross, own = attention_layers(unet, "cross"), attention_layers(unet, "self")
    own = [layer for layer in own if layer.startswith(("down_blocks.0", f"up_blocks.{LEVELS - 1}"))]
    places, place = np.unique(words.scene, return_inverse=True)
    size = [side // diffusion.vae_factor for side in words.image.shape[-2:]]
    noise = torch.randn(len(places), diffusion.latent_channels, *size, generator=generator)
    plain, completed = [], []
    for start in tqdm(range(0, len(words.name), batch), desc=f"attention at t = {timestep}", unit="batch"):
        names = words.name[start : start + batch]
        prompts = [f"a photo of {article(name)}" for name in names]
        tokens = [
            token_positions(diffusion.tokenizer, prompt, name)
            for prompt, name in zip(prompts, names, strict=True)
        ]
        latent = diffusion.encode(words.image[start : start + batch])
        noised = diffusion.add_noise(latent, noise[place[start : start + batch]], timestep)
        with record_attention(unet, [*cross, *own]) as weights:
            diffusion.predict_noise(noised, timestep, diffusion.encode_text(prompts))
        affinity = mean_by_level({layer: weights[layer] for layer in own}, LEVELS)[0]
        size, maps = latent.shape[-2:], []
        for level, mean in mean_by_level({layer: weights[layer] for layer in cross}, LEVELS).items():
            one = word_map(mean, tokens, level_size(size, level))
            maps.append(fuse_levels({level: one}, size, weights=[1] * LEVELS))
        plain.append(torch.stack(maps, 1))
        completed.append(torch.stack([complete(affinity, one) for one in maps], 1))
    return torch.cat(plain), torch.cat(completed)


def mixed(maps: Tensor, weights: Sequence[float], size: Sequence[int]) -> Tensor:
    """Maps by level [N, levels, h, w], weighed, summed, resized and stretched: [N, H, W] in [0, 1]."""
    fused = torch.einsum("nlhw,l->nhw", maps, torch.tensor(weights, dtype=maps.dtype))
    return stretch(F.interpolate(fused[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0])


def intersection_over_union(maps: Tensor, mask: Tensor, thresholds: Tensor) -> Tensor:
    """IoU [N, T] of `map > threshold` with the mask; both [N, H, W]."""
    columns = []
    for threshold in thresholds:
        found = maps > threshold
        columns.append((found & mask).flatten(1).sum(1) / (found | mask).flatten(1).sum(1))
    return torch.stack(columns, 1)


def area_under_curve(maps: Tensor, mask: Tensor) -> Tensor:
    """Probability [N] that a pixel of the mask has a higher value than one outside; a tie counts one half."""
    areas = []
    for one, inside in zip(maps.flatten(1), mask.flatten(1), strict=True):
        others, own = one[~inside].sort().values, one[inside]
        below = torch.searchsorted(others, own) + torch.searchsorted(others, own, right=True)
        areas.append(below.double().mean() / (2 * max(len(others), 1)))
    return torch.stack(areas)


def finds_its_own(maps: Tensor, words: Words) -> np.ndarray:
    """Whether a word's map [H, W] is higher on its object than on each other one, of scenes with several.

    A map that finds objects of any kind passes in half of the cases where there are two, a third for three.

    Returns:
        0 or 1 for each word, NaN where its object is alone, [N].
    """
    found = np.full(len(words.name), np.nan)
    for i, scene in enumerate(words.scene):
        others = [j for j in np.flatnonzero(words.scene == scene) if j != i]
        if others:
            elsewhere = max(maps[i][words.mask[j]].mean() for j in others)
            found[i] = float(maps[i][words.mask[i]].mean() > elsewhere)
    return found


@dataclass(frozen=True)
class Settings:
    """What is chosen on scenes of the split `val`."""

    timestep: int
    weights: tuple[float, ...]
    threshold: float


def weight_choices(steps: int = 5) -> list[tuple[float, ...]]:
    """All weights of the four levels in steps of 1 / `steps` that sum to one."""
    counts = (c for c in product(range(steps + 1), repeat=LEVELS) if sum(c) == steps)
    return [tuple(count / steps for count in c) for c in counts]


def choose(maps: dict[int, Tensor], words: Words, choices: Sequence[tuple[float, ...]]) -> Settings:
    """The settings of the highest mean IoU.

    Args:
        maps: {timestep: [N, levels, h, w]}.
        choices: weights of the levels to choose from.
    """
    best, settings = -1.0, None
    pairs = list(product(maps.items(), choices))
    for (timestep, one), weights in tqdm(pairs, desc="choosing timestep and levels"):
        found = intersection_over_union(
            mixed(one, weights, words.mask.shape[-2:]), words.mask, THRESHOLDS
        ).mean(0)
        if found.max() > best:
            best = found.max().item()
            settings = Settings(timestep, weights, round(THRESHOLDS[found.argmax()].item(), 2))
    return settings


def score(maps: Tensor, words: Words, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """IoU in percent, area under the curve and finds_its_own of each word, [N] each."""
    final = mixed(maps, settings.weights, words.mask.shape[-2:])
    iou = intersection_over_union(final, words.mask, torch.tensor([settings.threshold]))[:, 0]
    return 100 * iou, area_under_curve(final, words.mask), torch.from_numpy(finds_its_own(final, words))


def position_prior(scenes: int = 500) -> dict[str, Tensor]:
    """How often each pixel [H, W] is of a class on streets of the split `train`, by the class's name."""
    labels = np.stack([render_street("train", i, sensors=())["label"] for i in range(scenes)])
    shares = ((labels == i).mean(0, dtype=np.float32) for i in range(len(DELIVER11)))
    return {name: torch.from_numpy(share) for name, share in zip(DELIVER11.names, shares, strict=True)}


# ----------------------------------------------------------------------------------------------------- report


def averaged(scores: Sequence[tuple[Tensor, ...]]) -> tuple[np.ndarray, ...]:
    """Each measure of each word [N], averaged over the noise seeds."""
    return tuple(torch.stack(one).double().mean(0).numpy() for one in zip(*scores, strict=True))


def object_attention_report(
    diffusion: StableDiffusion,
    scenes: int,
    seeds: Sequence[int],
    timesteps: Sequence[int] = (50, 100, 150, 200, 300, 500),
) -> dict[str, dict]:
    """How well the maps of named objects find them, for the cross-attention alone and completed.

    Timestep, weights of the levels and threshold are those that are best on scenes of `val`.
    """
    held_out, words = object_words("val", scenes), object_words("test", scenes)
    found = {t: word_maps(diffusion, held_out, t, seed=max(seeds) + 1) for t in timesteps}
    kinds = dict(enumerate(("cross-attention", "completed")))
    best = {k: choose({t: maps[k] for t, maps in found.items()}, held_out, weight_choices()) for k in kinds}
    chosen = {settings.timestep for settings in best.values()}
    drawn = {t: [word_maps(diffusion, words, t, seed) for seed in seeds] for t in chosen}
    report = {}
    for kind, name in kinds.items():
        settings = best[kind]
        iou, area, own = averaged([score(maps[kind], words, settings) for maps in drawn[settings.timestep]])
        several, chance = ~np.isnan(own), 1 / np.bincount(words.scene)[words.scene]
        report[name] = {
            "settings": f"t {settings.timestep}, levels {settings.weights}, threshold {settings.threshold}",
            "IoU %": bootstrap(iou, words.scene),
            "AUC": bootstrap(area, words.scene),
            "finds its own of several %": bootstrap(100 * own[several], words.scene[several]),
            "the same by chance %": float(100 * chance[several].mean()),
        }
    return report


def street_attention_report(
    diffusion: StableDiffusion, scenes: int, seeds: Sequence[int], timestep: int = 150
) -> dict:
    """IoU and area under the curve by class on streets, of the completed maps and of the position prior.

    Each class's threshold is the best on scenes of `val`, for the maps and for the prior alike; the weights
    of the levels are chosen there for all classes together.
    """
    held_out, words = street_words("val", scenes), street_words("test", scenes)
    found = {timestep: word_maps(diffusion, held_out, timestep, seed=max(seeds) + 1)[1]}
    settings = choose(found, held_out, weight_choices())
    maps = [word_maps(diffusion, words, timestep, seed)[1] for seed in seeds]
    frequency = position_prior()
    known_prior, prior = (torch.stack([frequency[name] for name in of.name]) for of in (held_out, words))
    kinds = {
        "attention": (mixed(found[timestep], settings.weights, (128, 128)), settings.weights, maps),
        "prior": (stretch(known_prior), (1.0,), [prior[:, None]]),
    }
    report = {"settings": f"t {timestep}, levels {settings.weights}"}
    for name in sorted(set(words.name) & set(held_out.name), key=DELIVER11.names.index):
        own, known = np.array(words.name) == name, np.array(held_out.name) == name
        part = Words(words.image[own], words.mask[own], [name] * own.sum(), words.scene[own])
        report[f"{name} scenes"] = len(part.name)
        for kind, (on_val, weights, tested) in kinds.items():
            ious = intersection_over_union(on_val[known], held_out.mask[known], THRESHOLDS).mean(0)
            best = Settings(timestep, weights, THRESHOLDS[ious.argmax()].item())
            iou, area, _ = averaged([score(one[own], part, best) for one in tested])
            report[f"{name} {kind} IoU %"] = bootstrap(iou, part.scene)
            report[f"{name} {kind} AUC"] = bootstrap(area, part.scene)
    return report


def attention_sheet(diffusion: StableDiffusion, count: int, seed: int, timestep: int = 150) -> np.ndarray:
    """Named objects in columns: picture, mask, cross-attention and completed map of the finest level."""
    words = object_words("test", count)
    kept = np.unique(words.scene, return_index=True)[1][:count]  # the largest object of each scene
    words = Words(words.image[kept], words.mask[kept], [words.name[i] for i in kept], words.scene[kept])
    plain, completed = word_maps(diffusion, words, timestep, seed)
    finest = (1.0,) + (0.0,) * (LEVELS - 1)
    tiles = [to_uint8(image) for image in words.image]
    tiles += [np.repeat(255 * mask.numpy().astype(np.uint8)[..., None], 3, 2) for mask in words.mask]
    for maps in (plain, completed):
        tiles += [heat(one.numpy()) for one in mixed(maps, finest, words.mask.shape[-2:])]
    return enlarge(grid(tiles, count, gap=0), 2)
