"""Labels as colours: pictures of labels, overlays and confusion matrices, and MADM's label palette."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from functional.classes import IGNORE_INDEX

IGNORED_COLOR = (255, 255, 255)


def colorize(label: np.ndarray, colors: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Colour class ids; ignored pixels (255) become white.

    Args:
        label: uint8 ids, [H, W].
        colors: RGB (0..255) of each id.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: an id has no colour.
    """
    table = np.zeros((256, 3), np.uint8)
    table[: len(colors)] = np.asarray(colors, np.uint8)
    table[IGNORE_INDEX] = IGNORED_COLOR
    unknown = np.setdiff1d(np.unique(label), [*range(len(colors)), IGNORE_INDEX])
    if unknown.size:
        raise ValueError(
            f"A label holds ids without a colour: found {unknown.tolist()} with {len(colors)} classes. "
            "Use the class table that the label was made with."
        )
    return table[label]


def overlay(
    image: np.ndarray, label: np.ndarray, colors: Sequence[tuple[int, int, int]], opacity: float = 0.5
) -> np.ndarray:
    """Lay the colours of a label over its image; ignored pixels show the image unchanged.

    Args:
        image: uint8 [H, W, 3].
        label: uint8 ids, [H, W].
        colors: RGB (0..255) of each id.
        opacity: 0 shows the image, 1 the colours.

    Returns:
        uint8 [H, W, 3].
    """
    mixed = (1 - opacity) * image + opacity * colorize(label, colors).astype(np.float32)
    return np.where((label == IGNORE_INDEX)[..., None], image, np.rint(mixed).astype(np.uint8))


def heat(values: np.ndarray) -> np.ndarray:
    """Colour numbers from white (0) to dark blue (1); NaN becomes grey.

    Args:
        values: any shape, in [0, 1].

    Returns:
        uint8, the same shape with three channels behind.
    """
    stops = np.array([[255, 255, 255], [158, 202, 225], [49, 130, 189], [8, 48, 107]], np.float32)
    known = np.nan_to_num(np.clip(values, 0, 1))
    channels = [np.interp(known, np.linspace(0, 1, len(stops)), stops[:, c]) for c in range(3)]
    colored = np.rint(np.stack(channels, -1)).astype(np.uint8)
    return np.where(np.isnan(values)[..., None], np.uint8(200), colored)


def palette_table(colors: Sequence[tuple[int, int, int]]) -> Tensor:
    """Colours (0..255) as float32 [256, 3] in [0, 1] by class id; ignored and unknown ids are black."""
    table = torch.zeros(256, 3)
    table[: len(colors)] = torch.tensor(colors) / 255
    return table


def encode_palette(label: Tensor, table: Tensor) -> Tensor:
    """Colour image [B, 3, H, W] in [0, 1] of a label [B, H, W] (MADM, arXiv 2410.21708)."""
    return table[label].permute(0, 3, 1, 2)


def decode_palette(image: Tensor, colors: Tensor) -> Tensor:
    """Ids [B, H, W] of the nearest colours.

    Args:
        image: [B, 3, H, W]; what lies outside [0, 1] is clipped.
        colors: [C, 3] in [0, 1], such as the first C rows of a palette_table.
    """
    distances = (image.clamp(0, 1)[:, None] - colors[:, :, None, None]).square().sum(2)  # [B, C, H, W]
    return distances.argmin(1)
