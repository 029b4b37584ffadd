"""Small parts, a few scenes and a clock of steps: scripts/train_mini_diffusion.py in a second."""

from dataclasses import dataclass

import numpy as np
from diffusers import AutoencoderKL, UNet2DConditionModel

from scripts.mini_diffusion.layout import WIDTH
from scripts.mini_diffusion.scenes import VaeImages


def small_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=1,
        norm_num_groups=4,
    )


def small_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=1.0,
        sample_size=64,
    )


def few_images(*_) -> VaeImages:
    rng = np.random.default_rng(0)
    street, sensor = rng.integers(0, 256, (2, 4, 128, 128, 3), dtype=np.uint8)
    return VaeImages(street, sensor, rng.integers(0, 256, (4, 64, 64, 3), dtype=np.uint8))


def few_scenes(count: int) -> dict:
    rng = np.random.default_rng(0)

    def pictures(size: int, captions=("a photo of a red car", "a blue boat")) -> list:
        captions = list(captions)
        return [(rng.integers(0, 256, (size, size, 3), dtype=np.uint8), captions) for _ in range(count)]

    return {
        "objects": pictures(64),
        "crops": pictures(64),
        "sensors": pictures(64, [""]),
        "whole": pictures(128),
    }


@dataclass
class StepClock:
    """Stands for Clock: each look at the share, of which a step takes two, is a second."""

    budget: float
    spent: float = 0.0
    started: float = 0.0

    @property
    def seconds(self) -> float:
        return self.spent

    @property
    def share(self) -> float:
        share, self.spent = min(self.spent / self.budget, 1.0), self.spent + 1
        return share
