"""Images for episodes: in memory, and as files in the true layout of each few-shot data set."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from datamodules.auxiliary import Auxiliary, Supports
from datamodules.few_shot import FewShotDataModule
from tests.fake_data import SIZE, noise, write_ids, write_png


class FakeImages:
    """`count` images of 8 classes: image i shows class i % 8 + 1, every third one also a corner of the next.

    Colours are random, a ring around the square is void, sizes change with the image.
    """

    dataset = "fake"
    class_names: ClassVar = {c: f"thing {c}" for c in range(1, 9)}

    def __init__(self, count: int = 48, small: tuple[int, ...] = ()):
        self.count, self.small = count, small
        labels = [self.read(i)[1] for i in range(count)]
        self.areas = [
            {c: int((label == c).sum()) for c in np.unique(label).tolist() if c not in (0, 255)}
            for label in labels
        ]

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"image-{index}"

    def aux_key(self, index: int, class_id: int) -> tuple[str, int]:
        return f"folder/{index:03d}", class_id

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        height, width = 24 + 4 * (index % 3), 32
        rng = np.random.default_rng(index)
        label, side = np.zeros((height, width), np.uint8), 2 if index in self.small else 8
        label[5 : 7 + side, 5 : 7 + side] = 255
        label[6 : 6 + side, 6 : 6 + side] = index % 8 + 1
        if index % 3 == 0:
            label[:4, -4:] = (index + 1) % 8 + 1
        return rng.integers(0, 256, (height, width, 3), np.uint8), label


class FakeFewShot(FewShotDataModule):
    """Two classes of FakeImages are novel in each fold."""

    fake_images = FakeImages()
    own_min_pixels = 10

    def load_images(self, split: str) -> FakeImages:
        return self.fake_images

    def novel_ids(self, split: str) -> list[int]:
        return [2 * self.fold + 1, 2 * self.fold + 2]


def fake_few_shot(**options) -> FakeFewShot:
    """A small DataModule with these options."""
    defaults = {"size": 24, "episodes": 12, "test_seeds": [7], "protocol": "bam"}
    return FakeFewShot(**{**defaults, **options})


def jittered(num: int = 2, shot: int = 1, **options) -> Supports:
    """Supports with auxiliary ones that need no files."""
    return Supports(shot, Auxiliary(source="jitter", num=num, **options))


def write_object(image: Path, label: Path, ids: Sequence[int], size: tuple[int, int] = SIZE) -> None:
    """Random image; label with a square of 8x8 pixels of each id, the last one's border void."""
    write_png(image, noise(image, *size, 3))
    pixels = np.zeros(size, np.uint8)
    for number, c in enumerate(ids):
        pixels[2:10, 10 * number + 2 : 10 * number + 10] = c
    pixels[10:12, :] = 255
    write_png(label, pixels)


def write_pascal5i(root: Path, folder: str = "VOCdevkit/VOC2012", validation: int = 40) -> None:
    """Three training and two validation images of each class, with the published lists; one shows two."""
    for split, year, count in (("train", 2007, 60), ("val", 2008, validation)):
        lines = []
        for number in range(count):
            stem, c = f"{year}_{number:06d}", number % 20 + 1
            image, label = f"{folder}/JPEGImages/{stem}.jpg", f"{folder}/SegmentationClassAug/{stem}.png"
            write_object(root / image, root / label, [c, 1] if (split, number) == ("train", 6) else [c])
            lines.append(stem if split == "val" else f"../data/{image} ../data/{label}")
        path = (
            "voc_sbd_merge_noduplicate.txt"
            if split == "train"
            else f"{folder}/ImageSets/Segmentation/val.txt"
        )
        write_ids(root / path, lines)


def write_coco20i(root: Path, count: int = 160) -> None:
    """Two images of each class a split; the last ten of the validation images are COCO 2017's as well."""
    for split in ("train2014", "val2014"):
        for number in range(count):
            stem = f"{split}/COCO_{split}_{number:012d}"
            write_object(root / f"{stem}.jpg", root / f"annotations/{stem}.png", [number % 80 + 1])
    for number in range(count - 10, count):
        write_png(root / f"val2017/{number:012d}.jpg", np.zeros((2, 2, 3), np.uint8))


def write_fss1000(root: Path) -> None:
    """Ten images with grey masks of two classes a split, and HSNet's lists, which are not sorted."""
    for split, names in (("trn", ["zebra", "ab_wheel"]), ("val", ["fox", "egg"]), ("test", ["owl", "cup"])):
        write_ids(root / f"{split}.txt", names)
        for name in names:
            for i in range(1, 11):
                mask = np.full((24, 24), 127, np.uint8)
                mask[4:12, 4 : 12 + i] = 128
                write_png(root / name / f"{i}.jpg", noise(root / name / f"{i}.jpg", 24, 24, 3))
                write_png(root / name / f"{i}.png", np.dstack([mask] * 3))
