"""Support images of few-shot episodes: real ones, and auxiliary ones that share the mask of a real one.

DifFSS (arXiv 2307.00773) puts images made by a diffusion model beside each real support; the network is not
told. Two controls separate "more supports" from "generated content": copies of the real support as it is, and
with other colours.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import cv2
import numpy as np

from datamodules.photometric import distort, draw_distortion
from datamodules.reading import read_image
from functional.classes import IGNORE_INDEX
from functional.support_images import SUFFIXES, support_name


class FewShotImages(Protocol):
    """Labelled images that episodes are drawn from.

    Attributes:
        dataset: name in paths of auxiliary images: "pascal", "coco", "mini20i", "fss", ...
        class_names: by id of the data set (from 1; never 255), the name that prompts use.
        areas: of each image, the pixels of each class in it at full size; without 0 and 255.
    """

    dataset: str
    class_names: dict[int, str]
    areas: Sequence[dict[int, int]]

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return image uint8 [H, W, 3] and label [H, W] in ids of the data set; 0 is none, 255 void."""
        ...

    def name(self, index: int) -> str:
        """Return the lasting name of an image, by which frozen episodes know it."""
        ...

    def aux_key(self, index: int, class_id: int) -> tuple[str, int]:
        """Return stem and class number in the names of an image's auxiliary files."""
        ...


@dataclass(frozen=True)
class Auxiliary:
    """Auxiliary images of real supports: files <stem>_<class>_<k>.jpg or .png, k = 0 .. num - 1.

    Args:
        root: they lie in root/<dataset>/<control>/<profile>.
        control: what the diffusion model was guided by, such as "seg", "hed", "scribble", "mask".
        profile: settings that made them; None for the only folder there is, "" for files directly in root.
        num: images for each real support that has some.
        use_in: whether training and evaluation see them, evaluation alone, or neither.
        anchor: whether the first real support has them, as in the published code, or all do.
        missing: what a file that is not there means: an error; the real support in its place; or an image
            of weight 0, for networks whose parameters do not depend on the number of supports.
        weight: how much an auxiliary image counts; a real one counts 1.
        dropout_p: probability in training that the real support stands in an auxiliary image's place.
        source: "generated" reads files; "duplicate" and "jitter" (other colours, always the same for one
            support) copy the real support and read none.
    """

    root: str | Path = ""
    control: str = "mask"
    profile: str | None = None
    num: int = 4
    use_in: Literal["both", "test", "none"] = "both"
    anchor: Literal["first", "all"] = "first"
    missing: Literal["error", "duplicate", "drop"] = "error"
    weight: float = 1.0
    dropout_p: float = 0.0
    source: Literal["generated", "duplicate", "jitter"] = "generated"

    def __post_init__(self):
        if self.num < 0 or self.weight < 0 or not 0 <= self.dropout_p <= 1:
            raise ValueError(
                "Auxiliary images need num >= 0, weight >= 0 and dropout_p in 0..1: found "
                f"{self.num}, {self.weight} and {self.dropout_p}. Correct aux in data.init_args.supports."
            )

    def used_in(self, split: str) -> bool:
        """Whether the episodes of "train", or of "val" and "test", have auxiliary images."""
        return self.num > 0 and (self.use_in == "both" or (self.use_in == "test" and split != "train"))

    def anchors(self, supports: Sequence[int]) -> Sequence[int]:
        """Return those of an episode's real supports that have auxiliary images."""
        return supports if self.anchor == "all" else supports[:1]

    def folder(self, dataset: str) -> Path:
        """Return the folder of a data set's files.

        Raises:
            FileNotFoundError: there is none.
            ValueError: several profiles are there, and none is chosen.
        """
        parent = Path(self.root) / dataset / self.control
        if self.profile == "":
            folders = [Path(self.root)]
        elif self.profile is None:
            folders = sorted(path for path in parent.glob("*") if path.is_dir())
        else:
            folders = [parent / self.profile]
        if len(folders) > 1:
            raise ValueError(
                f"{parent} holds auxiliary images of several profiles: found "
                f"{', '.join(path.name for path in folders)}. Set aux.profile to one of them."
            )
        if not folders or not folders[0].is_dir():
            raise FileNotFoundError(
                f"There are no auxiliary images: looked for {folders[0] if folders else parent / '*'} and "
                "found no folder. Set aux.root, or write them with scripts/generate_support_images.py."
            )
        return folders[0]


@dataclass(frozen=True)
class Supports:
    """The supports of an episode: `shot` real ones, then auxiliary ones."""

    shot: int = 1
    aux: Auxiliary | None = None

    def __post_init__(self):
        if self.shot < 1:
            raise ValueError(f"An episode needs a real support: found shot {self.shot}. Set it to 1 or more.")

    def aux_in(self, split: str) -> Auxiliary | None:
        """Return the auxiliary images that episodes of a split have."""
        return self.aux if self.aux is not None and self.aux.used_in(split) else None


class Support(NamedTuple):
    """Image uint8 [H, W, 3], mask uint8 [H, W] (1 object, 0 else, 255 void), how much it counts, its kind."""

    image: np.ndarray
    mask: np.ndarray
    weight: float
    is_aux: bool


def object_mask(label: np.ndarray, class_id: int) -> np.ndarray:
    """1 where a label has this class, 255 where it is void, 0 elsewhere; uint8 [H, W]."""
    return np.where(label == IGNORE_INDEX, IGNORE_INDEX, label == class_id).astype(np.uint8)


def neighbours(root: Path, names: Iterable[str]) -> set[str]:
    """All files in the folders of these paths below a root, as such paths themselves.

    Each folder is listed, where asking for each file would take long: there may be a million.
    """
    found = set()
    for folder in {"".join(name.rpartition("/")[:2]) for name in names}:
        if (root / folder).is_dir():
            with os.scandir(root / folder) as entries:
                found.update(folder + entry.name for entry in entries if entry.is_file())
    return found


def auxiliary_file(folder: Path, stem: str, number: int, k: int) -> Path | None:
    """Return the file of an auxiliary image, or None."""
    paths = [folder / f"{support_name(stem, number, k)}{suffix}" for suffix in SUFFIXES]
    return next((path for path in paths if path.is_file()), None)


class SupportReader:
    """Reads the supports of the episodes of one split.

    Args:
        images: where real supports come from.
        supports: how many, and which auxiliary ones.
        split: "train", "val" or "test".
    """

    def __init__(self, images: FewShotImages, supports: Supports, split: str):
        self.images, self.shot, self.aux = images, supports.shot, supports.aux_in(split)
        reads_files = self.aux is not None and self.aux.source == "generated"
        self.folder = self.aux.folder(images.dataset) if reads_files else None

    def missing(self, pairs: Iterable[tuple[int, int]]) -> tuple[list[str], int]:
        """Return the auxiliary files that these (image, class) pairs lack, and how many they should have.

        Raises:
            FileNotFoundError: some are missing, and aux.missing is "error".
        """
        if self.folder is None:
            return [], 0
        keys = [self.images.aux_key(*pair) for pair in pairs]
        names = [support_name(*key, k) for key in keys for k in range(self.aux.num)]
        files = map(os.path.splitext, neighbours(self.folder, names))
        there = {name for name, suffix in files if suffix in SUFFIXES}
        lacking = [name for name in names if name not in there]
        if lacking and self.aux.missing == "error":
            raise FileNotFoundError(
                f"{len(lacking)} of {len(names)} auxiliary images are missing: looked for "
                f"{self.folder / lacking[0]}.jpg or .png first. Write them with "
                "scripts/generate_support_images.py, or set aux.missing to duplicate or drop."
            )
        return lacking, len(names)

    def read(
        self, class_id: int, indices: Sequence[int], rng: np.random.Generator | None = None
    ) -> list[Support]:
        """Read an episode's real supports (the first `shot` of `indices`), then the auxiliary ones.

        Args:
            rng: decides which auxiliary images are dropped; None drops none, as in evaluation.
        """
        real = {index: self.images.read(index) for index in indices[: self.shot]}
        found = [Support(image, object_mask(label, class_id), 1.0, False) for image, label in real.values()]
        if self.aux is None:
            return found
        for support, index in zip(list(found), self.aux.anchors(list(real)), strict=False):
            for k in range(self.aux.num):
                dropped = rng is not None and rng.random() < self.aux.dropout_p
                found.append(self.auxiliary(support, index, class_id, k, dropped))
        return found

    def auxiliary(self, real: Support, index: int, class_id: int, k: int, dropped: bool) -> Support:
        """Return the k-th auxiliary support of a real one, at its size and with its mask."""
        stem, number = self.images.aux_key(index, class_id)
        image, weight = real.image, self.aux.weight
        if dropped or self.aux.source == "duplicate":
            pass
        elif self.aux.source == "jitter":
            # As if it came from a file: the same colours whenever this support is used.
            rng = np.random.default_rng(list(support_name(stem, number, k).encode()))
            image = distort(image, draw_distortion(rng))
        elif path := auxiliary_file(self.folder, stem, number, k):
            height, width = real.mask.shape
            image = cv2.resize(read_image(path), (width, height), interpolation=cv2.INTER_LINEAR)
        elif self.aux.missing == "error":
            self.missing([(index, class_id)])
        elif self.aux.missing == "drop":
            weight = 0.0
        return Support(image, real.mask, weight, True)
