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
from PIL import Image


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


def resize(pixels: np.ndarray, size: tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    """Resize uint8 [H, W, 3] or [H, W] to (height, width) with Pillow.

    Its bilinear filter is anti-aliased on reduction, as the published loaders' is; OpenCV's is not.
    """
    height, width = size
    return np.array(Image.fromarray(pixels).resize((width, height), resample))


class ResizeCropFlip:
    """MADM's training augmentation: resize (bilinear, label nearest), uniform random crop, horizontal flip.

    Args:
        crop_size: height and width of the result.
        resize: height and width before the crop; None keeps the file's.
        flip: probability of the flip.
        grey: take the colours (Rec. 601 luma in all three channels), which MADM does not do: for a source
            whose target's sensor sees none, lest colour tell source from target and with it the classes.
    """

    def __init__(
        self,
        crop_size: tuple[int, int],
        resize: tuple[int, int] | None = None,
        flip: float = 0.5,
        grey: bool = False,
    ):
        self.crop_size, self.resize, self.flip, self.grey = crop_size, resize, flip, grey

    def __call__(self, image: np.ndarray, label: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        if self.resize is not None:
            image = resize(image, self.resize, Image.Resampling.BILINEAR)
            label = resize(label, self.resize, Image.Resampling.NEAREST)
        rng = np.random.default_rng(seed)
        (rows, columns), (height, width) = label.shape, self.crop_size
        if height > rows or width > columns:
            raise ValueError(
                f"The crop is larger than the image: found {rows}x{columns} pixels for crop_size "
                f"{height}x{width}. Set a smaller crop_size or a larger resize."
            )
        top, left = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
        step = -1 if rng.random() < self.flip else 1
        view = np.s_[top : top + height, left : left + width]
        image, label = image[view][:, ::step], label[view][:, ::step]
        if self.grey:
            luma = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
            image = cv2.cvtColor(luma, cv2.COLOR_GRAY2RGB)
        return image, label
