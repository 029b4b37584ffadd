"""Bringing images of few-shot episodes to one size: HSNet's square, BAM's padded fit, BAM's augmentation."""

from typing import Protocol

import cv2
import numpy as np
from PIL import Image

from datamodules.transforms import pad, resize
from functional.classes import IGNORE_INDEX

IMAGENET_MEAN = (124, 116, 104)  # of 8-bit RGB
STRIDE = 8  # to a multiple of which BAM's resize cuts the sides
RECROPS = 31  # further crops where one has lost too much of the object


class Fit(Protocol):
    """Brings images and masks of any size to that of the network."""

    size: int

    def __call__(self, image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take image uint8 [H, W, 3] and mask uint8 [H, W]; return them with sides `size`."""
        ...

    def target(self, mask: np.ndarray) -> np.ndarray:
        """Return the mask at the size to which predictions are resized for scoring at full size."""
        ...


class SquareResize:
    """HSNet's resize (arXiv 2104.01538): both sides to `size`, whatever the ratio.

    Pillow's bilinear filter, which is anti-aliased; masks nearest. At full size the mask is scored as it is.
    """

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sides = (self.size, self.size)
        return resize(image, sides, Image.Resampling.BILINEAR), resize(mask, sides, Image.Resampling.NEAREST)

    def target(self, mask: np.ndarray) -> np.ndarray:
        return mask


def fitted_size(shape: tuple[int, int], size: int) -> tuple[int, int]:
    """Height and width of an image of `shape` in BAM's square: longer side `size`, cut to multiples of 8.

    The cut changes the scale by up to a percent beside that of the square, as in the published code.
    """
    longer = max(shape)
    return tuple(max(side * size // longer // STRIDE, 1) * STRIDE for side in shape)


class FitAndPad:
    """BAM's resize (arXiv 2203.07615): see fitted_size; the rest of the square is black, in masks 255.

    OpenCV's bilinear filter, which is not anti-aliased; masks nearest. At full size the mask is padded to a
    square of its longer side, onto which the published code stretches the whole predicted square.
    """

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        height, width = fitted_size(mask.shape, self.size)
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
        sides = (self.size, self.size)
        return pad(image, sides, 0), pad(mask, sides, IGNORE_INDEX)

    def target(self, mask: np.ndarray) -> np.ndarray:
        return pad(mask, (max(mask.shape),) * 2, IGNORE_INDEX)


class ScaleRotateBlurFlipCrop:
    """BAM's training augmentation of an image and its mask; PFENet's and HDMNet's too.

    A crop with less than `keep` of the object's pixels (id 1 of the mask) is drawn again, 31 times at most.
    What lies outside the image has ImageNet's mean colour and is ignored.

    Args:
        crop_size: height and width of the result.
        scale: range of the factor; published 0.9..1.1 (PASCAL), 0.8..1.25 (COCO).
        degrees: largest rotation either way, with probability 0.5.
        blur: probability of a Gaussian blur of 5x5 pixels.
        flip: probability of a horizontal flip.
        keep: share of the object's pixels that a crop must show.
    """

    def __init__(
        self,
        crop_size: tuple[int, int],
        scale: tuple[float, float] = (0.9, 1.1),
        degrees: float = 10.0,
        blur: float = 0.5,
        flip: float = 0.5,
        keep: float = 0.85,
    ):
        self.crop_size, self.scale, self.degrees = crop_size, scale, degrees
        self.blur, self.flip, self.keep = blur, flip, keep

    def __call__(self, image: np.ndarray, label: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        scale = rng.uniform(*self.scale)
        sides = [max(round(side * scale), 1) for side in label.shape[::-1]]
        image = cv2.resize(image, sides, interpolation=cv2.INTER_LINEAR)
        label = cv2.resize(label, sides, interpolation=cv2.INTER_NEAREST)
        angle, rotates = rng.uniform(-self.degrees, self.degrees), rng.random() < 0.5
        if rotates and angle:
            image, label = rotate(image, label, angle)
        if rng.random() < self.blur:
            image = cv2.GaussianBlur(image, (5, 5), 0)
        if rng.random() < self.flip:
            image, label = image[:, ::-1], label[:, ::-1]
        image, label = pad_around(image, label, self.crop_size)
        wanted = self.keep * np.count_nonzero(label == 1)
        for _ in range(1 + RECROPS):
            starts = [rng.integers(a - b + 1) for a, b in zip(label.shape, self.crop_size, strict=True)]
            view = tuple(slice(at, at + side) for at, side in zip(starts, self.crop_size, strict=True))
            if np.count_nonzero(label[view] == 1) >= wanted:
                break
        return np.ascontiguousarray(image[view]), np.ascontiguousarray(label[view])


def rotate(image: np.ndarray, label: np.ndarray, degrees: float) -> tuple[np.ndarray, np.ndarray]:
    """Turn an image and its label about their middle; corners from outside are mean colour and ignored."""
    height, width = label.shape
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1)
    image = cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=IMAGENET_MEAN)
    label = cv2.warpAffine(label, matrix, (width, height), flags=cv2.INTER_NEAREST, borderValue=IGNORE_INDEX)
    return image, label


def pad_around(image: np.ndarray, label: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Fill an image and its label up to (height, width) at all sides; mean colour, ignored."""
    missing = [max(wanted - found, 0) for wanted, found in zip(size, label.shape, strict=True)]
    (top, bottom), (left, right) = ((n // 2, n - n // 2) for n in missing)
    borders = (top, bottom, left, right, cv2.BORDER_CONSTANT)
    image = cv2.copyMakeBorder(np.ascontiguousarray(image), *borders, value=IMAGENET_MEAN)
    return image, cv2.copyMakeBorder(np.ascontiguousarray(label), *borders, value=IGNORE_INDEX)
