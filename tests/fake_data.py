"""Two files of each split of each data set, in its true layout: random images, labels with ids of its own."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (32, 48)  # height, width


def write_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def noise(path: Path, *shape: int) -> np.ndarray:
    """Random uint8 pixels that depend on the file's name and folders only."""
    seed = list("/".join(path.parts[-4:]).encode())
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def blocks(path: Path, ids: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """Label [H, W] of 4x4 tiles, each of one of the ids."""
    height, width = size
    tiles = np.array(ids, np.uint8)[noise(path, height // 4 + 1, width // 4 + 1) % len(ids)]
    return tiles.repeat(4, 0).repeat(4, 1)[:height, :width]


def write_cityscapes(root: Path, size: tuple[int, int] = SIZE) -> None:
    """RGB images, single-channel labels in train ids."""
    for split, city in (("train", "aachen"), ("val", "lindau")):
        for frame in (1, 2):
            stem = f"{split}/{city}/{city}_{frame:06d}_000019"
            image = root / f"leftImg8bit/{stem}_leftImg8bit.png"
            label = root / f"gtFine/{stem}_gtFine_labelTrainIds.png"
            write_png(image, noise(image, *size, 3))
            write_png(label, blocks(label, [*range(19), 255], size))


def write_deliver(root: Path, size: tuple[int, int] = SIZE) -> None:
    """RGBA depth images; labels in the first channel of RGBA files; the unused split is there too."""
    for split, place in (("train", "MAP_1_point1"), ("val", "MAP_5_point3"), ("test", "MAP_7_point91")):
        for weather in ("cloud", "sun"):
            image = root / f"depth/{weather}/{split}/{place}/000050_depth_front.png"
            label = root / f"semantic/{weather}/{split}/{place}/000050_semantic_front.png"
            write_png(image, noise(image, *size, 4))
            ids = blocks(label, [*range(26), 255], size)
            write_png(label, np.dstack([ids, 0 * ids + 7, 0 * ids + 9, 0 * ids + 255]))


def write_fmb(root: Path, size: tuple[int, int] = SIZE) -> None:
    """Grey infrared images; single-channel labels, which the training images have as well."""
    for split, numbers in (("train", (1, 2)), ("test", (3, 4))):
        for number in numbers:
            image = root / f"{split}/Infrared/{number:05d}.png"
            label = root / f"{split}/Label/{number:05d}.png"
            write_png(image, noise(image, *size))
            write_png(label, blocks(label, range(15), size))


def write_dsec(root: Path, size: tuple[int, int] = SIZE) -> None:
    """Grey event images, of which training takes every second; labels for testing only."""
    for split, sequence, frames in (
        ("train", "zurich_city_00_a", range(1, 5)),
        ("test", "zurich_city_13_a", range(1, 3)),
    ):
        for frame in frames:
            image = root / f"69mask_{split}_edges/{sequence}/{frame:06d}.png"
            write_png(image, noise(image, *size))
            if split == "test":
                label = root / f"test_semantic_labels/{sequence}/11classes/{frame:06d}.png"
                write_png(label, blocks(label, [*range(11), 255], size))
