"""DiffSegmenter: masks of named classes from the attention of a frozen diffusion model (arXiv 2309.02773).

Symbols: eps is `noise`, A^x the attention that WordAttention holds by level, F_c `fuse_levels`, S F_c
`complete_by_layers`, s_c a score map, tau the `threshold` of label_map. Where paper and released code differ,
the defaults are the code's.
"""

from collections.abc import Sequence
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from functional.attention_maps import (
    LEVEL_WEIGHTS,
    complete_by_layers,
    fuse_levels,
    level_size,
    sharpen,
    stretch,
)
from functional.classes import ClassTable
from functional.noise import named_generator, named_noise
from models.diffusion.attention import attend_to_words
from models.diffusion.stable_diffusion import StableDiffusion
from models.prompts import Prompt, PromptStyle


class DiffSegmenter(nn.Module):
    """Score maps of classes that are named for each image; nothing is trained.

    Args:
        diffusion: with unet, vae_encoder and text_encoder.
        prompt: how a class is asked for.
        size: height and width to which images are resized for the network (bilinear, ratio not kept),
            multiples of the diffusion model's stride.
        timesteps, noises: the maps of each of these timesteps, with each of so many noises, are averaged
            before they are resized. A noise is shared by all classes and timesteps of an image.
        seed: of the noises, which depend on it and the image's name only.
        level_weights: share of the levels of the cross-attention, fine to coarse.
        self_power: p of S^p; 0 leaves self-attention out.
        contrast: (gain, centre) of functional.attention_maps.sharpen; None leaves the maps as they are.
        normalize: stretch each class's map to [0, 1], or those of an image together ("joint").
        sample_posterior: draw the latent from the autoencoder's posterior, as the released code does, instead
            of taking its mean.
        max_rows: rows (a row is one class at one timestep with one noise) of a U-Net call.

    Raises:
        ValueError: size or level_weights does not fit the model; timesteps, noises, self_power or max_rows is
            out of range.
    """

    def __init__(
        self,
        diffusion: StableDiffusion,
        prompt: PromptStyle | None = None,
        size: tuple[int, int] = (512, 512),
        timesteps: Sequence[int] = (100,),
        noises: int = 1,
        seed: int = 4307,
        level_weights: Sequence[float] = LEVEL_WEIGHTS,
        self_power: int = 1,
        contrast: tuple[float, float] | None = None,
        normalize: Literal["per_class", "joint"] = "per_class",
        sample_posterior: bool = False,
        max_rows: int = 8,
    ):
        super().__init__()
        if any(side < 1 or side % diffusion.stride for side in size):
            raise ValueError(
                f"size has to be in multiples of {diffusion.stride}, the stride of the diffusion model: "
                f"found {list(size)}. Set network.size."
            )
        steps = len(diffusion.alpha_bars)
        if not timesteps or any(not 0 <= t < steps for t in timesteps):
            raise ValueError(f"timesteps lie in 0..{steps - 1}: found {list(timesteps)}. Set at least one.")
        if len(level_weights) != len(diffusion.unet.up_blocks) or not any(level_weights):
            raise ValueError(
                f"level_weights has one number for each of the {len(diffusion.unet.up_blocks)} levels of the "
                f"U-Net, not all 0: found {list(level_weights)}."
            )
        if noises < 1 or max_rows < 1 or self_power < 0:
            raise ValueError(
                f"noises and max_rows are at least 1, self_power at least 0: found noises {noises}, max_rows "
                f"{max_rows}, self_power {self_power}."
            )
        self.diffusion, self.prompt, self.size = diffusion, prompt or PromptStyle(), tuple(size)
        self.timesteps, self.noises, self.seed = tuple(timesteps), noises, seed
        self.level_weights, self.self_power, self.contrast = tuple(level_weights), self_power, contrast
        self.normalize, self.sample_posterior, self.max_rows = normalize, sample_posterior, max_rows

    def prompts(self, words: Sequence[str], captions: Sequence[str] | None = None) -> list[Prompt]:
        """The prompt of each class; captions begin with self.prompt.start(word)."""
        captions = [None] * len(words) if captions is None else captions
        tokenizer = self.diffusion.tokenizer
        return [self.prompt.prompt(tokenizer, *pair) for pair in zip(words, captions, strict=True)]

    @torch.no_grad()
    def score_maps(
        self,
        image: Tensor,
        name: str,
        words: Sequence[str],
        captions: Sequence[str] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Score maps s_c of the classes of one image.

        Args:
            image: [3, H, W] in [0, 1].
            name: of the image, which the noise is drawn for.
            words: how each of the n classes is called.
            captions: of the image for each class, beginning with self.prompt.start(word).
            size: of the maps; None for that of the image.

        Returns:
            [n, *size] in [0, 1], float32; a map depends on no other class (unless normalize is "joint").
        """
        size = tuple(size or image.shape[-2:])
        if not words:
            return image.new_zeros((0, *size))
        prompts = self.prompts(words, captions)
        texts = self.prompt.encode(self.diffusion, prompts, keep=captions is None)
        maps = self.latent_maps(self.encode(image, name), name, prompts, texts)
        maps = F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]
        maps = stretch(maps.flatten(0, 1) if self.normalize == "joint" else maps)
        return (maps if self.contrast is None else sharpen(maps, *self.contrast)).view(-1, *size)

    def encode(self, image: Tensor, name: str) -> Tensor:
        """Latent [1, C, h, w] of an image [3, H, W]."""
        image = F.interpolate(image[None], self.size, mode="bilinear", align_corners=False)
        generator = [named_generator(f"{name} posterior", self.seed)] if self.sample_posterior else None
        return self.diffusion.encode(image, generator)

    def latent_maps(self, latent: Tensor, name: str, prompts: list[Prompt], texts: Tensor) -> Tensor:
        """Completed maps G_c [n, h, w], means over timesteps and noises, of an image's latent [1, C, h, w].

        Args:
            texts: embeddings of the prompts, [n, tokens, width].
        """
        names = [name, *(f"{name} noise {k}" for k in range(1, self.noises))]
        noise = named_noise(names, latent.shape[1:], self.seed)
        views = list(product(self.timesteps, range(self.noises)))
        rows = list(product(range(len(prompts)), range(len(views))))
        maps = []
        for start in range(0, len(rows), self.max_rows):
            some = rows[start : start + self.max_rows]
            timestep = torch.tensor([views[v][0] for _, v in some])
            noised = self.diffusion.add_noise(
                latent.expand(len(some), -1, -1, -1), noise[[views[v][1] for _, v in some]], timestep
            )
            of = [i for i, _ in some]
            maps.append(self.completed(noised, timestep, texts[of], [prompts[i] for i in of]))
        return torch.cat(maps).unflatten(0, (len(prompts), len(views))).mean(1)

    def completed(self, noised: Tensor, timestep: Tensor, texts: Tensor, prompts: list[Prompt]) -> Tensor:
        """Completed maps [B, h, w] of one call of the U-Net."""
        words = torch.zeros(len(prompts), self.diffusion.num_tokens)
        for row, one in zip(words, prompts, strict=True):
            row[list(one.tokens)] = 1 / len(one.tokens)
        arguments = self.diffusion.unet_arguments(noised, timestep.to(noised.device), texts)
        levels = [level for level, weight in enumerate(self.level_weights) if weight]
        found = attend_to_words(
            self.diffusion.unet, words, *arguments, levels, keep_queries=self.self_power > 0
        )
        size = noised.shape[-2:]
        maps = {level: one.unflatten(1, level_size(size, level)) for level, one in found.maps.items()}
        return complete_by_layers(found.finest, fuse_levels(maps, size, self.level_weights), self.self_power)


def best_class(maps: Tensor, ids: Sequence[int], table: ClassTable) -> tuple[Tensor, Tensor]:
    """The highest of the score maps at each pixel, [H, W], and the id of its class.

    Args:
        maps: [n, H, W] of the candidates. ids: their class ids.
        table: without a candidate the score is 0 and the class the background, if the table has one.

    Raises:
        ValueError: there is no candidate, and the table has no background.
    """
    if ids:
        score, index = maps.max(0)
        return score, torch.tensor(ids, device=maps.device)[index]
    if table.has_background:
        score = maps.new_zeros(maps.shape[-2:])
        return score, torch.zeros_like(score, dtype=torch.int64)
    raise ValueError(
        f"An image has no candidate class, and the class table {table.name!r} no background. Choose other "
        "candidates."
    )


def label_map(maps: Tensor, ids: Sequence[int], table: ClassTable, threshold: float) -> Tensor:
    """Class ids [H, W] by the highest of the score maps; see best_class.

    Args:
        threshold: if the table has a background, this is where no map is above it.
    """
    return with_background(*best_class(maps, ids, table), table, threshold)


def with_background(score: Tensor, label: Tensor, table: ClassTable, threshold: float) -> Tensor:
    """Class ids of best_class; a table's background is where no score is above the threshold."""
    return torch.where(score > threshold, label, 0) if table.has_background else label
