"""What data sets of image and label files share: finding the files, reading them, refusing what is wrong."""

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from datamodules.base import SegmentationDataModule
from datamodules.label_maps import TRAIN_IDS, UNKNOWN, check_ids, lookup_table
from datamodules.reading import read_image, read_label
from datamodules.transforms import Transform, resize, resize_to_fit
from functional.classes import IGNORE_INDEX


class Pair(NamedTuple):
    """Paths of an image and of its label below the root, with "/"; without a label, None."""

    image: str
    label: str | None


class FileDataset(Dataset):
    """Samples {"image": uint8 [H, W, 3], "label": uint8 [H, W], "name": str}; no "label" where none is known.

    Args:
        root: folder that the paths of `pairs` start from.
        pairs: the samples, in order.
        table: class ids by stored id, see lookup_table.
        size: height and width of the samples (image bilinear, label nearest, each resized alone, as MADM's
            code does); None for those of the files, which must then be equal for an image and its label.
        rescale_16_bit, first_channel: see read_image and read_label.
        fit: height and width of a box that images alone are resized to fit, see resize_to_fit; or None.
        same_size: False takes labels of another size than their image.
    """

    def __init__(
        self,
        root: Path,
        pairs: Sequence[Pair],
        table: np.ndarray,
        size: tuple[int, int] | None = None,
        rescale_16_bit: bool = False,
        first_channel: bool = False,
        fit: tuple[int, int] | None = None,
        same_size: bool = True,
    ):
        self.root, self.pairs, self.table, self.size = root, list(pairs), table, size
        self.fit, self.same_size = fit, same_size
        self.rescale_16_bit, self.first_channel = rescale_16_bit, first_channel
        self.label_map = np.where(table == UNKNOWN, IGNORE_INDEX, table).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def image_names(self) -> list[str]:
        """Paths of the images below the root, in order."""
        return [pair.image for pair in self.pairs]

    @property
    def label_names(self) -> list[str | None]:
        """Paths of the labels below the root, in order."""
        return [pair.label for pair in self.pairs]

    def read_image(self, index: int) -> np.ndarray:
        """Image at the file's size, uint8 [H, W, 3]."""
        return read_image(self.root / self.pairs[index].image, self.rescale_16_bit)

    def read_label(self, index: int) -> np.ndarray:
        """Label at the file's size in the data set's own ids, all of them known, uint8 [H, W]."""
        path = self.root / self.pairs[index].label
        ids = read_label(path, self.first_channel)
        check_ids(ids, self.table, path)
        return ids

    def __getitem__(self, index: int) -> dict:
        pair, image = self.pairs[index], self.read_image(index)
        sample = {"image": image, "name": str(PurePosixPath(pair.image).with_suffix(""))}
        if pair.label is not None:
            label = self.label_map[self.read_label(index)]
            if self.size is None and self.same_size:
                check_sizes(self.root, pair, image, label)
            sample["label"] = label
        if self.size is not None:
            sample["image"] = resize(image, self.size, Image.Resampling.BILINEAR)
            if pair.label is not None:
                sample["label"] = resize(label, self.size, Image.Resampling.NEAREST)
        if self.fit is not None:
            sample["image"] = resize_to_fit(image, self.fit)
        return sample


def check_sizes(root: Path, pair: Pair, image: np.ndarray, label: np.ndarray) -> None:
    """Refuse a label [H, W] of another size than its image [H, W, 3].

    Raises:
        ValueError: names the file and both sizes.
    """
    if image.shape[:2] != label.shape:
        found = " and ".join("{1}x{0}".format(*pixels.shape) for pixels in (image, label))
        raise ValueError(
            f"{root / pair.label} does not fit its image {pair.image}: found {found} pixels. "
            "Give files of the same view; for scoring alone, eval_size resizes both to one size."
        )


@dataclass(frozen=True)
class Layout:
    """What is where in a published data set, and how much of it.

    Args:
        title: name in messages.
        images: by split ("train", and one that is scored), pattern of the image files below the root.
        labelled: the splits whose images have labels.
        counts: by split, the number of images in each folder of the second level (where there are no such
            folders, their sum counts); without a split whose number is not known.
        size: height and width of the files; None where they vary.
        stored_names: by class table, the classes of the stored ids (see lookup_table).
        list_keys: section and key of the images in MADM's JSON files.
        first_channel: whether labels are colour files with the ids in their first channel.
        other_images: by split, the pattern in another layout of the set, where only this one finds files.
        same_size: False where published labels have not quite the size of their image.
    """

    title: str
    images: dict[str, str]
    labelled: tuple[str, ...]
    counts: dict[str, dict[str, int]]
    size: tuple[int, int] | None
    stored_names: dict[str, Sequence[str | None]] = field(default_factory=lambda: {"cityscapes19": TRAIN_IDS})
    list_keys: tuple[str, str] = ("target_data", "second_modality")
    first_channel: bool = False
    other_images: dict[str, str] = field(default_factory=dict)
    same_size: bool = True

    @property
    def name(self) -> str:
        """Name of the data set in commands, and of its evaluation set."""
        return self.title.lower().replace(" ", "_")


class FileDataModule(SegmentationDataModule):
    """A data set of files in one folder; validation and test score the same published set.

    A subclass gives its `layout` and `label_of`. Training samples keep the size of their files (the
    transform resizes). Where training images have no labels, as those of an adaptation's target, their
    samples have no "label".

    Args:
        root: folder of the data set; docs/datasets.md shows the layouts.
        classes: name of the class table; None for the first that the data set knows.
        eval_size: height and width to which images and labels, of whatever sizes, are resized for scoring;
            None for those of the files, which must then be equal.
        eval_fit: instead of eval_size, height and width of a box that images are resized to fit, keeping
            their ratio (see resize_to_fit); labels keep the file's size, in which it is scored. Sizes in a
            batch must be equal: a set of several sizes needs eval_batch_size 1.
        train_list, test_list: MADM's JSON files instead of all files in the folders.
        rescale_16_bit: whether images of 16 bits are brought to 8, see read_image; else they are an error.
        batch_size, eval_batch_size, num_workers, seed, transform: see SegmentationDataModule.
    """

    layout: Layout

    def __init__(
        self,
        root: str | Path,
        classes: str | None = None,
        eval_size: tuple[int, int] | None = None,
        eval_fit: tuple[int, int] | None = None,
        train_list: str | Path | None = None,
        test_list: str | Path | None = None,
        rescale_16_bit: bool = False,
        batch_size: int = 1,
        eval_batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        transform: Transform | None = None,
    ):
        super().__init__(batch_size, eval_batch_size, num_workers, seed, transform)
        self.root, self.classes = Path(root), classes or next(iter(self.layout.stored_names))
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"{self.layout.title} has no folder {self.root}. Set root to where the data set lies; "
                "docs/datasets.md shows the layout and where to get it."
            )
        if self.classes not in self.layout.stored_names:
            raise ValueError(
                f"{self.layout.title} has no labels for the class table {classes!r}. "
                f"Set classes to {' or '.join(self.layout.stored_names)}."
            )
        if eval_size is not None and eval_fit is not None:
            raise ValueError(
                f"{self.layout.title} can be scored at one size: found eval_size {list(eval_size)} and "
                f"eval_fit {list(eval_fit)}. Leave one of them out."
            )
        self.eval_size, self.eval_fit, self.rescale_16_bit = eval_size, eval_fit, rescale_16_bit
        self.eval_split = next((split for split in self.layout.images if split != "train"), "val")
        self.lists = {"train": train_list, self.eval_split: test_list}
        self.complete: dict[str, FileDataset] = {}

    @abstractmethod
    def label_of(self, image: str) -> str:
        """Return the path of an image's label; both below the root, with "/"."""

    def wanted(self, split: str, image: str) -> bool:
        """Whether an image of the split's folders belongs to the published split."""
        return True

    def train_dataset(self) -> FileDataset:
        return self.complete_dataset("train")

    def eval_datasets(self, split: str) -> dict[str, FileDataset]:
        return {self.layout.name: self.complete_dataset(self.eval_split)}

    def train_dataloader(self) -> DataLoader:
        if "train" in self.layout.images and "train" not in self.layout.labelled:
            raise ValueError(
                f"{self.layout.title} has no training labels here: it can be the target of an adaptation. "
                "Set data to datamodules.adaptation.AdaptationDataModule with this as its target."
            )
        return super().train_dataloader()

    def pattern(self, split: str) -> str:
        """Return the pattern of a split's image files in the layout that the folder has."""
        patterns = [self.layout.images[split], *filter(None, [self.layout.other_images.get(split)])]
        return next((pattern for pattern in patterns if any(self.root.glob(pattern))), patterns[0])

    def find(self, split: str) -> FileDataset:
        """Return the samples of a split at the size in which they are used; their files may be missing."""
        if self.lists[split] is not None:
            pairs = self.listed_pairs(split, Path(self.lists[split]))
        else:
            paths = self.root.glob(self.pattern(split))
            found = sorted(path.relative_to(self.root).as_posix() for path in paths)
            labelled = split in self.layout.labelled
            pairs = [
                Pair(image, self.label_of(image) if labelled else None)
                for image in found
                if self.wanted(split, image)
            ]
        table = lookup_table(self.layout.stored_names[self.classes], self.classes)
        size, fit = (None, None) if split == "train" else (self.eval_size, self.eval_fit)
        first_channel, same_size = self.layout.first_channel, self.layout.same_size
        return FileDataset(
            self.root, pairs, table, size, self.rescale_16_bit, first_channel, fit=fit, same_size=same_size
        )

    def complete_dataset(self, split: str) -> FileDataset:
        """Find the samples of a split, once.

        Raises:
            ValueError: the data set has no such split here.
            FileNotFoundError: there are none, or some of their files are missing.
        """
        if split in self.complete:
            return self.complete[split]
        if split not in self.layout.images:
            role, known = ("one of its targets", "val") if split == "train" else ("its source", "train")
            raise ValueError(
                f"{self.layout.title} has no {split} images here: found those of {known} alone. "
                f"Set data to datamodules.generalization.GeneralizationDataModule with this as {role}."
            )
        dataset = self.find(split)
        if not len(dataset):
            raise FileNotFoundError(
                f"{self.layout.title} has no {split} images: looked for "
                f"{self.root / self.pattern(split)} and found none. Set root (now {str(self.root)!r}); "
                "docs/datasets.md shows the layout."
            )
        files = [file for pair in dataset.pairs for file in pair if file is not None]
        if missing := [file for file in files if not (self.root / file).is_file()]:
            raise FileNotFoundError(
                f"{self.layout.title} lacks {len(missing)} of {len(files)} {split} files: the first is "
                f"{self.root / missing[0]}. Complete the folder; docs/datasets.md says how to check it."
            )
        self.complete[split] = dataset
        return dataset

    def listed_pairs(self, split: str, path: Path) -> list[Pair]:
        """Read the pairs of a split from one of MADM's JSON files, {section: {key: [path, ...]}}.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not such a list, or an entry leaves the root.
        """
        section, key = self.layout.list_keys
        if not path.is_file():
            raise FileNotFoundError(
                f"{self.layout.title} has no file list {path}. Set {split}_list to one, or leave it out to "
                "take all files in the folders."
            )
        try:
            lists = json.loads(path.read_text("utf-8"))[section]
            images = lists[key]
            labels = lists["label"] if split in self.layout.labelled else [None] * len(images)
            pairs = [Pair(*files) for files in zip(images, labels, strict=True)]
            entries = [PurePosixPath(file) for pair in pairs for file in pair if file is not None]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no list of {self.layout.title}'s {split} files: found {type(error).__name__} "
                f"({error}). It must hold {section}.{key} and, where there are labels, {section}.label, of "
                "equal length."
            ) from error
        if outside := [entry for entry in entries if entry.is_absolute() or ".." in entry.parts]:
            raise ValueError(
                f"{path} names files outside the data set: found {str(outside[0])!r}. "
                "Give paths below the root."
            )
        return pairs
