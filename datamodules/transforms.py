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

from datamodules.photometric import distort, draw_distortion
from functional.classes import IGNORE_INDEX

RECROPS = 10  # further crops of an image whose crop shows too much of one class


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


def fit_size(size: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
    """Largest (height, width) of a size's ratio that fits into a box, as mmcv has it.

    Sides are rounded to whole pixels; the box gives a long and a short side and turns with an upright image.
    """
    scale = min(max(box) / max(size), min(box) / min(size))
    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


def resize_to_fit(
    pixels: np.ndarray, box: tuple[int, int], interpolation: int = cv2.INTER_LINEAR
) -> np.ndarray:
    """Resize uint8 [H, W, 3] or [H, W] to fit_size with OpenCV, whose filters are not anti-aliased."""
    height, width = fit_size(pixels.shape[:2], box)
    return cv2.resize(pixels, (width, height), interpolation=interpolation)


def pad(pixels: np.ndarray, size: tuple[int, int], value: int) -> np.ndarray:
    """Fill uint8 [H, W, 3] or [H, W] up to (height, width), at the right and below."""
    missing = [(0, max(wanted - found, 0)) for wanted, found in zip(size, pixels.shape[:2], strict=True)]
    return np.pad(pixels, [*missing, *[(0, 0)] * (pixels.ndim - 2)], constant_values=value)


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


class FitCropFlipDistort:
    """DIFF's training augmentation: resize to fit a box, crop, horizontal flip, photometric distortion.

    Image (bilinear) and label (nearest) are resized each alone, as in the published code, which so takes the
    labels of GTA5 that differ from their image by a few pixels. Where a crop is larger than its image, the
    rest is ignored, and grey: 128, to which the published 0 after a normalisation by 127.5 comes nearest.

    Args:
        crop_size: height and width of the result.
        fit: height and width of the box, see fit_size; None keeps the file's size.
        max_class_share: a crop of one class, or in which one has this share of the labelled pixels or more,
            is drawn again, ten times at most.
        flip: probability of the flip.
        distort: whether the colours change, see draw_distortion.
    """

    def __init__(
        self,
        crop_size: tuple[int, int],
        fit: tuple[int, int] | None = None,
        max_class_share: float = 0.75,
        flip: float = 0.5,
        distort: bool = True,
    ):
        self.crop_size, self.fit, self.max_class_share = crop_size, fit, max_class_share
        self.flip, self.distort = flip, distort

    def __call__(self, image: np.ndarray, label: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        if self.fit is not None:
            image = resize_to_fit(image, self.fit)
            label = resize_to_fit(label, self.fit, cv2.INTER_NEAREST)
        rng = np.random.default_rng(seed)
        view = self.draw_view(image.shape[:2], rng)
        for _ in range(RECROPS):
            if self.is_mixed(label[view]):
                break
            view = self.draw_view(image.shape[:2], rng)
        step = -1 if rng.random() < self.flip else 1
        image, label = np.ascontiguousarray(image[view][:, ::step]), label[view][:, ::step]
        if self.distort:
            image = distort(image, draw_distortion(rng))
        return pad(image, self.crop_size, 128), pad(label, self.crop_size, IGNORE_INDEX)

    def draw_view(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[slice, slice]:
        """Draw rows and columns of a crop of an image of (height, width)."""
        starts = (rng.integers(max(a - b, 0) + 1) for a, b in zip(size, self.crop_size, strict=True))
        return tuple(slice(start, start + side) for start, side in zip(starts, self.crop_size, strict=True))

    def is_mixed(self, label: np.ndarray) -> bool:
        """Whether a label shows several classes and none of them too much."""
        counts = np.bincount(label.ravel(), minlength=256)[:IGNORE_INDEX]
        return np.count_nonzero(counts) > 1 and counts.max() < self.max_class_share * counts.sum()
