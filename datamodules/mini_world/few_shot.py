"""The mini world's few-shot benchmark, mini-20i: object scenes, four folds of five categories."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from datamodules.auxiliary import FewShotImages, Supports
from datamodules.base import SegmentationDataModule
from datamodules.episode_lists import Protocol
from datamodules.few_shot import FewShotDataModule
from datamodules.mini_world.dataset import MiniObjectsDataset
from datamodules.mini_world.objects import CATEGORIES, FOLDS
from datamodules.transforms import Transform
from functional.classes import FOLDS as FOLD_IDS
from functional.classes import MINI_OBJECTS, base_table


class MiniFewShotImages:
    """Object scenes of the 20 categories of the folds, as FewShotImages; see datamodules.auxiliary.

    Args:
        split: "train", "val" or "test".
        length: number of scenes.
    """

    dataset = "mini20i"

    def __init__(self, split: str, length: int):
        self.scenes = MiniObjectsDataset(split, length, 64, [name for fold in FOLDS for name in fold])
        ids = sorted(c for fold in FOLD_IDS["mini20i"][1] for c in fold)
        self.class_names = {c: MINI_OBJECTS.names[c] for c in ids}

    def __len__(self) -> int:
        return len(self.scenes)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return image uint8 [64, 64, 3] and label uint8 [64, 64] in the ids of mini_objects."""
        scene = self.scenes[index]
        return scene["image"], scene["label"]

    @cached_property
    def areas(self) -> list[dict[int, int]]:
        """Pixels of each class by scene."""
        counts = [np.bincount(self.scenes.read_label(i).ravel()) for i in range(len(self))]
        return [{int(c): int(count[c]) for c in np.flatnonzero(count) if c} for count in counts]

    def name(self, index: int) -> str:
        """Return the scene's name."""
        return self.scenes[index]["name"]

    def aux_key(self, index: int, class_id: int) -> tuple[str, int]:
        """Return the scene's name and the id."""
        return self.name(index), class_id


class Mini20iDataModule(FewShotDataModule):
    """Episodes of mini-20i: scenes of 64 pixels with one to three objects of 20 categories, five novel.

    Validation draws other episodes of the test's scenes, as the published benchmarks do.

    Args:
        train_length, eval_length: numbers of scenes, before those that a fold leaves out.
        others: see FewShotDataModule; the smallest area is 100 pixels, two percent of a scene.
    """

    own_min_pixels = 100

    def __init__(
        self,
        fold: int = 0,
        supports: Supports | None = None,
        eval_supports: dict[str, Supports] | None = None,
        protocol: Protocol = "hsnet",
        size: int = 128,
        episodes: int = 1000,
        val_seed: int = 321,
        test_seeds: Sequence[int] = (510,),
        train_length: int = 1000,
        eval_length: int = 300,
        batch_size: int = 16,
        eval_batch_size: int = 20,
        num_workers: int = 0,
        seed: int = 0,
        transform: Transform | None = None,
    ):
        super().__init__(
            fold,
            supports,
            eval_supports,
            protocol,
            size,
            episodes,
            val_seed,
            test_seeds,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            transform=transform,
        )
        self.lengths = {"train": train_length, "test": eval_length}

    def load_images(self, split: str) -> FewShotImages:
        if split == "val":
            return self.images("test")
        return MiniFewShotImages(split, self.lengths[split])

    def novel_ids(self, split: str) -> list[int]:
        return list(FOLD_IDS["mini20i"][1][self.fold])


class MiniBaseScenes(MiniObjectsDataset):
    """Object scenes labelled as a fold's base learner numbers the categories; novel ones are background.

    Args:
        split, length, offset: see RenderedDataset.
        fold: 0..3.
        size: side in pixels to which scenes of the native 64 are resized.
        with_novel: whether the fold's novel categories are drawn at all.
    """

    def __init__(
        self, split: str, length: int, fold: int, size: int, with_novel: bool = False, offset: int = 0
    ):
        names = base_table("mini20i", fold).names
        super().__init__(split, length, 64, CATEGORIES if with_novel else names[1:], offset)
        self.shown_size = (size, size)
        self.numbers = np.zeros(len(MINI_OBJECTS), np.uint8)
        self.numbers[[MINI_OBJECTS.names.index(name) for name in names]] = np.arange(len(names))

    def render(self, index: int) -> dict:
        scene = super().render(index)
        label = Image.fromarray(self.numbers[scene["label"]])
        image = Image.fromarray(scene["image"])
        return scene | {
            "image": np.asarray(image.resize(self.shown_size, Image.Resampling.BILINEAR)),
            "label": np.asarray(label.resize(self.shown_size, Image.Resampling.NEAREST)),
        }


class MiniBaseDataModule(SegmentationDataModule):
    """What a fold's backbone and base learner are trained on: base categories and the reserve.

    Args:
        fold: 0..3; its categories are in no scene.
        size: side in pixels, that of the few-shot episodes.
        with_novel: draw the fold's categories too, as background: from these scenes BAM's base learner learns
            what it does not know, as its authors train it. They are not for a backbone.
        train_length, eval_length: numbers of scenes.
        batch_size, eval_batch_size, num_workers, seed: see SegmentationDataModule.
    """

    def __init__(
        self,
        fold: int = 0,
        size: int = 128,
        with_novel: bool = False,
        train_length: int = 12000,
        eval_length: int = 200,
        batch_size: int = 16,
        eval_batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        self.classes = base_table("mini20i", fold).name
        self.train_set = MiniBaseScenes("train", train_length, fold, size, with_novel)
        self.eval_sets = {
            split: {"scenes": MiniBaseScenes(split, eval_length, fold, size, with_novel)}
            for split in ("val", "test")
        }

    def train_dataset(self) -> Dataset:
        return self.train_set

    def eval_datasets(self, split: str) -> dict[str, Dataset]:
        return self.eval_sets[split]
