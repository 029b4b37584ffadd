"""A tiny DIFF on the tiny random model, and noise that a test can name."""

from collections.abc import Callable

import torch
from torch import Tensor

from models.diff import DIFF, DIFFBackbone
from models.diffusion.stable_diffusion import StableDiffusion

PROMPTS = {"car": "a red car", "person": "a photo of a person"}  # ids 8 and 3 of deliver11
CHANNELS = (128, 64, 64, 32)


def tiny_backbone(folder, dtype: str = "float32", **options) -> DIFFBackbone:
    """The same backbone at each call; options over those of five steps."""
    torch.manual_seed(0)
    options = {"steps": 5, "prompts": PROMPTS, "channels": CHANNELS, **options}
    return DIFFBackbone(StableDiffusion(str(folder), dtype=dtype), "deliver11", **options)


def tiny_diff(folder, dropout: float = 0.0, num_classes: int = 11, **options) -> DIFF:
    backbone = tiny_backbone(folder, **options)
    return DIFF(backbone, num_classes, embed_channels=16, channels=16, dropout=dropout)


def images(count: int = 2, size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0))


def labels(*classes: int, size: tuple[int, int] = (32, 32)) -> Tensor:
    """An image per class: its left half shows it, the rest is road (5) with an ignored row."""
    label = torch.full((len(classes), *size), 5)
    label[:, :, : size[1] // 2] = torch.tensor(classes)[:, None, None]
    label[:, 3] = 255
    return label


def noise_of(seed: int, size: tuple[int, int] = (8, 8)) -> Callable[[int, int], Tensor]:
    """Noise that depends on the step, the row and the seed, however many rows are asked for."""

    def draw(step: int, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + step + 1)
        return torch.randn(64, 4, *size, generator=generator)[:count]

    return draw
