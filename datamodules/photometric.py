"""Photometric distortion of street images, as mmsegmentation has it: what is drawn, and what that does."""

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class Distortion:
    """Changes to an image's colours; None leaves one out.

    Attributes:
        brightness: added to all channels.
        contrast: factor of all channels.
        contrast_first: whether contrast comes before saturation, or after hue.
        saturation: factor of the saturation.
        hue: added to the hue, which OpenCV counts in steps of two degrees, 0..179.
    """

    brightness: float | None = None
    contrast: float | None = None
    contrast_first: bool = True
    saturation: float | None = None
    hue: int | None = None


def draw_distortion(rng: np.random.Generator) -> Distortion:
    """Draw each change with probability 0.5, and the place of contrast."""

    def sometimes(value):
        return value if rng.random() < 0.5 else None

    return Distortion(
        brightness=sometimes(rng.uniform(-32, 32)),
        contrast=sometimes(rng.uniform(0.5, 1.5)),
        contrast_first=rng.random() < 0.5,
        saturation=sometimes(rng.uniform(0.5, 1.5)),
        hue=sometimes(int(rng.integers(-18, 18))),
    )


def distort(image: np.ndarray, change: Distortion) -> np.ndarray:
    """Change the colours of an image uint8 [H, W, 3] RGB; every step rounds down to whole numbers."""
    if change.brightness is not None:
        image = linear(image, offset=change.brightness)
    if change.contrast is not None and change.contrast_first:
        image = linear(image, change.contrast)
    if change.saturation is not None:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = linear(hsv[..., 1], change.saturation)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if change.hue is not None:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + change.hue) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if change.contrast is not None and not change.contrast_first:
        image = linear(image, change.contrast)
    return image


def linear(pixels: np.ndarray, factor: float = 1.0, offset: float = 0.0) -> np.ndarray:
    """factor * pixels + offset, cut to 0..255 and rounded down, uint8."""
    return np.clip(pixels.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)
