"""FSS-1000: ten images each of 1000 objects, some to train on, others to score (arXiv 1907.12347)."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from datamodules.few_shot_files import FileFewShotDataModule, FileImages, read_lines
from datamodules.files import Pair
from datamodules.reading import read_image
from functional.classes import IGNORE_INDEX

THRESHOLD = 128  # grey from which a mask's pixel is the object
IMAGES = 10  # of each class


class MaskImages(FileImages):
    """Images with the mask of one object each; see FileImages.

    Args:
        root, pairs, stems, num_workers: see FileImages.
        class_names: names of the classes of these images, ten in a row each, by id.
    """

    def __init__(
        self,
        root: Path,
        class_names: dict[int, str],
        pairs: Sequence[Pair],
        stems: Sequence[str],
        num_workers: int,
    ):
        super().__init__(root, "fss", class_names, pairs, stems, np.arange(256), num_workers)
        self.class_ids = [c for c in class_names for _ in range(IMAGES)]

    def read_label(self, index: int) -> np.ndarray:
        """Mask uint8 [H, W], 1 is the object."""
        grey = cv2.cvtColor(read_image(self.root / self.pairs[index].label), cv2.COLOR_RGB2GRAY)
        return (grey >= THRESHOLD).astype(np.uint8)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, mask = super().read(index)
        return image, mask.astype(np.int64) * self.class_ids[index]

    def class_of(self, index: int, number: int) -> int:
        return self.class_ids[index]

    def aux_key(self, index: int, class_id: int) -> tuple[str, int]:
        return self.stems[index], 1  # the published names have 1 whatever the class


class FSS1000DataModule(FileFewShotDataModule):
    """FSS-1000: classes of ten images of 224x224 pixels; 520 to train on, 240 to validate and 240 to test.

    Layout: CLASS/{1..10}.jpg and .png, and lists of the classes: trn.txt, val.txt and test.txt, as HSNet
    publishes them. With `episodes: null` each image of a split is the query once. There is one fold, 0.
    A `train_list` or `test_list` names classes; val.txt is looked for beside the latter.
    """

    folds = 1
    own_min_pixels = 1

    def class_lists(self) -> dict[str, dict[int, str]]:
        """Names of the classes of each split by id: their places in the three sorted lists, from 1."""
        test = self.list_path("test_list", self.root / "test.txt")
        paths = {
            "train": (self.list_path("train_list", self.root / "trn.txt"), "train_list"),
            "val": (test.parent / "val.txt", "test_list"),
            "test": (test, "test_list"),
        }
        lists, first = {}, 1
        for split, (path, option) in paths.items():
            names = sorted(set(read_lines(path, option)))
            # 255 marks void pixels and can be no class.
            ids = [first + n + (first + n >= IGNORE_INDEX) for n in range(len(names))]
            lists[split], first = dict(zip(ids, names, strict=True)), first + len(names)
        return lists

    def load_images(self, split: str) -> MaskImages:
        folders = self.class_lists()[split]
        stems = [f"{folder}/{i}" for folder in folders.values() for i in range(1, IMAGES + 1)]
        pairs = [Pair(f"{stem}.jpg", f"{stem}.png") for stem in stems]
        names = {c: folder.replace("_", " ") for c, folder in folders.items()}
        return MaskImages(self.root, names, pairs, stems, self.num_workers)

    def novel_ids(self, split: str) -> list[int]:
        return list(self.class_lists()[split])
