"""COCO-20i: the 80 objects of COCO 2014 in four folds of 20 (FWB, arXiv 1909.13140); and MiniCOCO-20i."""

import numpy as np

from datamodules.few_shot_files import FileFewShotDataModule, FileImages, read_list
from datamodules.files import Pair
from datamodules.label_maps import lookup_table
from functional.classes import COCO81, FOLDS

PROMPTS = {"mouse": "computer mouse", "remote": "remote controller"}  # in place of the published names
MINI_SHARE, MINI_SEED = 10, 0  # one training image in so many, and the seed by which they are chosen


class COCO20iDataModule(FileFewShotDataModule):
    """COCO-20i: 82783 training, 40504 validation images of many sizes; 20 novel and 60 base classes a fold.

    Novel is every fourth id. Layout: {train,val}2014/COCO_{train,val}2014_NNNNNNNNNNNN.jpg and, of the same
    names, annotations/{train,val}2014/*.png in ids 0..80. Lists name images by anything that ends in their
    number of 12 digits.
    """

    by_class = True
    mini = False

    def numbers(self, split: str) -> list[str]:
        """Return the last 12 digits of the names of a split's images, in order."""
        option, folder = ("train_list", "train2014") if split == "train" else ("test_list", "val2014")
        if self.lists[option] is not None:
            lines = read_list(self.list_path(option, self.root), option)
            return [line.name[-12:] for line in lines]
        folder = "val2017" if self.mini and split != "train" else folder
        numbers = sorted(path.stem[-12:] for path in (self.root / folder).glob("*.jpg"))
        if not numbers:
            raise FileNotFoundError(
                f"COCO-20i has no {split} images: looked for {self.root / folder}/*.jpg and found none. Set "
                f"root, or {option} to a file with their names; see docs/datasets.md."
            )
        if self.mini and split == "train":
            order = np.random.default_rng(MINI_SEED).permutation(len(numbers))
            numbers = sorted(numbers[i] for i in order[: max(len(numbers) // MINI_SHARE, 1)])
        return numbers

    def load_images(self, split: str) -> FileImages:
        if split == "test":
            return self.images("val")
        folder = "train2014" if split == "train" else "val2014"
        stems = [f"{folder}/COCO_{folder}_{number}" for number in self.numbers(split)]
        pairs = [Pair(f"{stem}.jpg", f"annotations/{stem}.png") for stem in stems]
        names = {c: PROMPTS.get(name, name) for c, name in enumerate(COCO81.names) if c}
        table = lookup_table(COCO81.names, "coco81")
        return FileImages(self.root, "coco", names, pairs, stems, table, self.num_workers)

    def novel_ids(self, split: str) -> list[int]:
        return list(FOLDS["coco20i"][1][self.fold])


class MiniCOCO20iDataModule(COCO20iDataModule):
    """MiniCOCO-20i (DifFSS): a tenth of COCO-20i's training images, and the 5000 that COCO 2017 validates on.

    The tenth is drawn from the sorted numbers with a fixed seed. The authors drew others: give their list as
    `train_list`. The others are named by `test_list`, or by the files in a folder val2017.
    """

    mini = True
