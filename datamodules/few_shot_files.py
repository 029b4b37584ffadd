"""Few-shot data sets of files: images with their labels, areas of classes counted once, lists of images."""

import hashlib
import re
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from datamodules.auxiliary import Supports, neighbours
from datamodules.episode_lists import Protocol, write_json
from datamodules.few_shot import PUBLISHED_SEEDS, FewShotDataModule
from datamodules.files import Pair, check_sizes
from datamodules.label_maps import check_ids
from datamodules.rare_classes import count_pixels, counts_document, read_counts
from datamodules.reading import read_image, read_label
from datamodules.transforms import Transform


class FileImages:
    """Images and labels in files, see FewShotImages.

    Args:
        root: folder that the paths of `pairs` start from; the areas of classes are kept in it as well.
        dataset, class_names: see FewShotImages.
        pairs: paths of images and labels.
        stems: of each image, its name in those of auxiliary images.
        table: by stored id, the known ids as they are, see lookup_table.
        num_workers: processes that count the areas, which reads all labels once.

    Raises:
        FileNotFoundError: files are missing.
    """

    def __init__(
        self,
        root: Path,
        dataset: str,
        class_names: dict[int, str],
        pairs: Sequence[Pair],
        stems: Sequence[str],
        table: np.ndarray,
        num_workers: int = 0,
    ):
        self.root, self.dataset, self.class_names = root, dataset, class_names
        self.pairs, self.stems, self.table, self.num_workers = list(pairs), list(stems), table, num_workers
        files = [file for pair in pairs for file in pair]
        there = neighbours(root, files)
        if missing := [file for file in files if file not in there]:
            raise FileNotFoundError(
                f"The few-shot set {dataset!r} lacks {len(missing)} of {len(files)} files: the first is "
                f"{root / missing[0]}. Complete the folder, or set another root; see docs/datasets.md."
            )

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return self.stems[index]

    def aux_key(self, index: int, class_id: int) -> tuple[str, int]:
        return self.stems[index], class_id

    @property
    def label_names(self) -> list[str]:
        """Paths of the labels below the root, in order."""
        return [pair.label for pair in self.pairs]

    def read_label(self, index: int) -> np.ndarray:
        """Label in the ids of its file, all of them known, uint8 [H, W]."""
        path = self.root / self.pairs[index].label
        ids = read_label(path)
        check_ids(ids, self.table, path)
        return ids

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        pair = self.pairs[index]
        image, label = read_image(self.root / pair.image), self.read_label(index)
        check_sizes(self.root, pair, image, label)
        return image, label

    @cached_property
    def areas(self) -> list[dict[int, int]]:
        """See FewShotImages; kept in the root's class_areas_*.json, written anew where it does not fit."""
        names = hashlib.sha256("\n".join(self.label_names).encode()).hexdigest()[:8]
        path = self.root / f"class_areas_{self.dataset}_{names}.json"
        try:
            pixels = read_counts(path, self)
        except (FileNotFoundError, ValueError):
            pixels = count_pixels(self, self.num_workers)
            try:
                write_json(path, counts_document(self, pixels))
            except OSError as error:
                warnings.warn(f"Areas of classes are counted at each start: {error}.", stacklevel=2)
        shown = [[c for c in np.flatnonzero(row).tolist() if c] for row in pixels]
        return [
            {self.class_of(i, number): int(pixels[i, number]) for number in numbers}
            for i, numbers in enumerate(shown)
        ]

    def class_of(self, index: int, number: int) -> int:
        """Return the id of the data set that a number in a label file stands for."""
        return number


class Listed(NamedTuple):
    """A line of a list: name of an image without folder and suffix, and a class where one is given."""

    name: str
    class_id: int | None


def read_lines(path: Path, option: str) -> list[str]:
    """Read the lines of a list that are not empty.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no list {path}. Put the published one there or set {option}; see docs/datasets.md."
        )
    lines = path.read_text("utf-8", errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


def read_list(path: Path, option: str) -> list[Listed]:
    """Read a list of images: names, "image label" paths, or HSNet's "name__class", one a line.

    Folders are dropped: published lists start with those of their authors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such list, or names an image, or with its class, twice.
    """
    words = [line.split() for line in read_lines(path, option)]
    found = []
    for line in words:
        match = re.fullmatch(r"([\w-]+?)(?:__(\d+))?", PurePosixPath(line[0]).stem)
        entry = match and Listed(match[1], int(match[2]) if match[2] else None)
        if entry is None or len(line) > 2:
            raise ValueError(
                f"{path} is no list of images: found the line {' '.join(line)[:80]!r}. Each must hold "
                f"a name, the paths of an image and its label, or name and class, as x__01; correct {option}."
            )
        found.append(entry)
    if not found or len(set(found)) < len(found):
        raise ValueError(
            f"{path} is no list of images: found {len(found)} lines, {len(set(found))} different ones. "
            f"Each must be there once; correct {option}."
        )
    return found


class FileFewShotDataModule(FewShotDataModule):
    """A few-shot data set of files; validation and test take the same images.

    Args:
        root: folder of the data set; docs/datasets.md shows the layouts.
        train_list, test_list: text files of images, see read_list, in place of the data set's own.
        fold, supports, eval_supports, protocol, size, episodes, val_seed, test_seeds, min_pixels, skip_rare,
            original_size, exact_unpad, episode_file, batch_size, eval_batch_size, num_workers, seed,
            transform: see FewShotDataModule.
    """

    def __init__(
        self,
        root: str | Path,
        fold: int = 0,
        supports: Supports | None = None,
        eval_supports: dict[str, Supports] | None = None,
        train_list: str | Path | None = None,
        test_list: str | Path | None = None,
        protocol: Protocol = "bam",
        size: int = 473,
        episodes: int | None = 1000,
        val_seed: int = 321,
        test_seeds: Sequence[int] = PUBLISHED_SEEDS,
        min_pixels: int | None = None,
        skip_rare: bool = False,
        original_size: bool = False,
        exact_unpad: bool = False,
        episode_file: str | Path | None = None,
        batch_size: int = 1,
        eval_batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        transform: Transform | None = None,
    ):
        drawn = (fold, supports, eval_supports, protocol, size, episodes, val_seed, test_seeds)
        options = (min_pixels, skip_rare, original_size, exact_unpad, episode_file)
        super().__init__(*drawn, *options, batch_size, eval_batch_size, num_workers, seed, transform)
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"There is no folder {self.root}. Set root to where the data set lies; docs/datasets.md "
                "shows the layout and where to get it."
            )
        self.lists = {"train_list": train_list, "test_list": test_list}

    def list_path(self, option: str, own: Path) -> Path:
        """Return the path of an option's list, or without one that of the data set's own."""
        return own if self.lists[option] is None else Path(self.lists[option])
