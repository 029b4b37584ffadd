"""Augmentations of an image and its label, each call seeded by its sample."""

import os
import random
from typing import Protocol

os.environ.setdefault(
    "NO_ALBUMENTATIONS_UPDATE", "1"
)  # the import would ask the internet for a newer version

import albumentations
import cv2
import numpy as np


class Transform(Protocol):
    """Changes a training sample; the same seed gives the same bytes, in whichever process."""

    def __call__(self, image: np.ndarray, label: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Take and return image uint8 [H, W, 3] RGB and label uint8 [H, W] (255 ignored)."""
        ...


class RandomCropFlipJitter:
    """Random resized crop, horizontal flip and colour jitter.

    Args:
        crop_size: height and width of the result.
        scale: range of the crop's area, as a share of the image's.
        ratio: range of the crop's width over height before it is resized.
        flip: probability of a horizontal flip.
        brightness, contrast, saturation: half width of the range around 1 from which the factor is drawn.
        jitter: probability that the three colour factors are applied at all.
    """

    def __init__(
        self,
        crop_size: tuple[int, int],
        scale: tuple[float, float] = (0.25, 1.0),
        ratio: tuple[float, float] = (0.75, 4 / 3),
        flip: float = 0.5,
        brightness: float = 0.3,
        contrast: float = 0.3,
        saturation: float = 0.3,
        jitter: float = 0.5,
    ):
        self.pipeline = albumentations.Compose(
            [
                albumentations.RandomResizedCrop(
                    size=tuple(crop_size),
                    scale=scale,
                    ratio=ratio,
                    interpolation=cv2.INTER_LINEAR,
                    mask_interpolation=cv2.INTER_NEAREST,
                    area_for_downscale="image",
                ),
                albumentations.HorizontalFlip(p=flip),
                albumentations.ColorJitter(
                    brightness=brightness, contrast=contrast, saturation=saturation, hue=0.0, p=jitter
                ),
            ]
        )

    def __call__(self, image: np.ndarray, label: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        # Compose.set_random_seed gives the same seed to every part: flip and jitter, both drawn against their
        # probability from the first number of that stream, would then always happen together. One shared
        # stream does not have this flaw.
        self.pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        changed = self.pipeline(image=image, mask=label)
        return changed["image"], changed["mask"]
