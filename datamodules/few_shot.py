"""Few-shot episodes: one class, supports that show it with its mask, a query in which it is looked for."""

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.auxiliary import FewShotImages, Support, SupportReader, Supports, object_mask
from datamodules.base import SegmentationDataModule, TrainingSamples, to_tensors
from datamodules.episode_lists import (
    Episode,
    EpisodePool,
    Protocol,
    evaluation_episodes,
    freeze_episodes,
    read_episodes,
    warn_of_rare_classes,
)
from datamodules.few_shot_transforms import Fit, FitAndPad, SquareResize, fitted_size
from datamodules.samplers import sample_seed
from datamodules.transforms import Transform
from functional.classes import IGNORE_INDEX

PUBLISHED_SEEDS = (510, 365, 382, 322, 988)  # BAM's five test runs
# Of every evaluation episode, so that one-shot and five-shot tests ask for the same queries and classes.
STORED_SUPPORTS = 5


def stack(supports: Sequence[Support]) -> dict[str, Tensor]:
    """Supports of one size as "support_image" [K, 3, H, W], "support_label", "support_weight", "is_aux"."""
    pairs = [to_tensors(support.image, support.mask) for support in supports]
    return {
        "support_image": torch.stack([pair["image"] for pair in pairs]),
        "support_label": torch.stack([pair["label"] for pair in pairs]),
        "support_weight": torch.tensor([float(support.weight) for support in supports]),
        "is_aux": torch.tensor([support.is_aux for support in supports]),
    }


def mark_object(label: np.ndarray, class_id: int) -> tuple[np.ndarray, list[int]]:
    """Renumber a label's classes so that the episode's is 1, which a transform may ask for.

    Returns:
        uint8 [H, W] (0 none, 255 void), and by new number the id that it had.
    """
    others = np.setdiff1d(label, (0, class_id, IGNORE_INDEX)).tolist()
    ids = [0, class_id, *others]
    marked = np.full(label.shape, IGNORE_INDEX, np.uint8)
    for number, old in enumerate(ids):
        marked[label == old] = number
    return marked, ids


class TrainingEpisodes(TrainingSamples):
    """Episodes by (query, draw): class, supports and augmentation are a function of (seed, draw).

    Query and supports are augmented each on its own. Besides what all episodes have, these have "base_label"
    and "base_class": the query's classes, and the episode's, as a base learner numbers them.

    Args:
        images: what they are drawn from.
        pool: lists of queries and supports.
        reader: of the supports.
        fit: brings images to the network's size where there is no transform.
        transform: crops and augments instead; in its masks the object is 1.
        seed: of the draws.
        base_ids: ids of the classes that a base learner knows, in its order; all others are background.
        void_is_background: whether void pixels of the query are trained as background, as HSNet's code does.
    """

    def __init__(
        self,
        images: FewShotImages,
        pool: EpisodePool,
        reader: SupportReader,
        fit: Fit,
        transform: Transform | None,
        seed: int,
        base_ids: Sequence[int],
        void_is_background: bool,
    ):
        super().__init__(images, transform, seed)
        self.pool, self.reader, self.fit = pool, reader, fit
        self.base_numbers = {c: number for number, c in enumerate(base_ids, 1)}
        self.void_is_background = void_is_background

    def __len__(self) -> int:
        return len(self.pool)

    def augment(self, image: np.ndarray, label: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        return self.fit(image, label) if self.transform is None else super().augment(image, label, seed)

    def episode(self, item: tuple[int, int]) -> Episode:
        """Return the episode of an item."""
        rng = np.random.default_rng(sample_seed(self.seed, item[1]))
        return self.pool.draw(item[0], rng, self.reader.shot)

    def title(self, item: tuple[int, int]) -> str:
        episode = self.episode(item)
        supports = ", ".join(map(self.dataset.name, episode.supports))
        return f"{self.dataset.name(episode.query)} (supports {supports})"

    def __getitem__(self, item: tuple[int, int]) -> dict:
        draw, seed, episode = item[1], sample_seed(self.seed, item[1]), self.episode(item)
        # Auxiliary images have a generator of their own: without them all else is drawn the same.
        drops = np.random.default_rng([seed, 1])
        supports = self.reader.read(episode.class_id, episode.supports, drops)
        augmented = [
            Support(*self.augment(s.image, s.mask, sample_seed(seed, k)), s.weight, s.is_aux)
            for k, s in enumerate(supports, 1)
        ]
        image, label = self.dataset.read(episode.query)
        marked, ids = mark_object(label, episode.class_id)
        image, marked = self.augment(image, marked, sample_seed(seed, 0))
        numbers = np.full(256, IGNORE_INDEX)
        numbers[: len(ids)] = [self.base_numbers.get(c, 0) for c in ids]
        mask = object_mask(marked, 1)
        if self.void_is_background:
            mask[mask == IGNORE_INDEX] = 0
        return {
            **to_tensors(image, mask),
            **stack(augmented),
            "name": self.dataset.name(episode.query),
            "class_id": episode.class_id,
            "episode": draw,
            "base_label": torch.from_numpy(numbers[marked]),
            "base_class": self.base_numbers.get(episode.class_id, 0),
        }


class EvaluationEpisodes(Dataset):
    """Frozen episodes at the network's size; "label" at that of the scores.

    Args:
        images, reader, fit: see TrainingEpisodes.
        episodes: the list.
        original_size: score at full size: "label" is fit.target of the query's mask.
        exact_unpad: "label" is the query's mask as it is, and "valid_size" (height, width) tells which part
            of the prediction shows it.
    """

    def __init__(
        self,
        images: FewShotImages,
        episodes: Sequence[Episode],
        reader: SupportReader,
        fit: Fit,
        original_size: bool,
        exact_unpad: bool,
    ):
        self.images, self.episodes, self.reader, self.fit = images, episodes, reader, fit
        self.original_size, self.exact_unpad = original_size, exact_unpad

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, index: int) -> dict:
        episode = self.episodes[index]
        image, label = self.images.read(episode.query)
        mask = object_mask(label, episode.class_id)
        image, target = self.fit(image, mask)
        sample = {"name": self.images.name(episode.query), "class_id": episode.class_id, "episode": index}
        if self.exact_unpad:
            target, sample["valid_size"] = mask, torch.tensor(fitted_size(mask.shape, self.fit.size))
        elif self.original_size:
            target = self.fit.target(mask)
        supports = self.reader.read(episode.class_id, episode.supports)
        fitted = [Support(*self.fit(s.image, s.mask), s.weight, s.is_aux) for s in supports]
        return {**sample, **stack(fitted), "image": image, "label": target}


class FewShotDataModule(SegmentationDataModule):
    """Episodes of one fold: training on its base classes, evaluation on its novel ones.

    A batch holds "image" [B, 3, H, W], "label" [B, H, W] (1 the object, 0 else, 255 ignored), "name", of the
    query; "support_image" [B, K, 3, H, W], "support_label" [B, K, H, W], "support_weight" [B, K] and "is_aux"
    [B, K]; "class_id" [B], an id of the data set, and "episode" [B], its position in the list or in training
    its draw; see TrainingEpisodes and EvaluationEpisodes for the rest.

    Evaluation episodes are a function of the data, fold, protocol and seed. All settings of supports see the
    same queries, and fewer real supports are the first of more.

    A subclass gives `load_images` and `novel_ids`.

    Args:
        fold: which classes are novel.
        supports: those of training episodes, and of evaluation if `eval_supports` is None; None for one.
        eval_supports: settings that are scored on the same episodes, by the name of their set.
        protocol: "bam" draws images, then one of their classes, trains on images without novel classes, and
            fits and pads (see FitAndPad); "hsnet" draws pairs of image and class, with novel classes as
            background, and resizes to a square (see SquareResize).
        size: side of images in pixels.
        episodes: of each evaluation set; None takes each query once.
        val_seed: of the episodes of validation.
        test_seeds: of those of test: a set each, with the seed in its name if there are several.
        min_pixels: smallest area of a class in an image that counts; None for the data set's own.
        skip_rare: leave classes out of evaluation that have too few images, that is, no more than five or the
            largest shot; else they are an error.
        original_size: score at the size of the query's file instead of at `size`; needs eval_batch_size 1.
        exact_unpad: there, and with "bam", cut the padding off exactly, which the published code does not.
        episode_file: JSON file of the evaluation episodes: written if it is not there, read if it is.
        batch_size, eval_batch_size, num_workers, seed: see SegmentationDataModule.
        transform: augmentation of queries and supports in training; it gives them their size.
    """

    classes = "few_shot"
    folds = 4
    own_min_pixels = 2048
    by_class = False  # whether "hsnet" draws a class before the query

    def __init__(
        self,
        fold: int = 0,
        supports: Supports | None = None,
        eval_supports: dict[str, Supports] | None = None,
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
        super().__init__(batch_size, eval_batch_size, num_workers, seed, transform)
        if not 0 <= fold < self.folds:
            raise ValueError(
                f"There is no fold {fold}: found folds 0 to {self.folds - 1}. Set data.init_args.fold to one."
            )
        if (exact_unpad and (protocol != "bam" or not original_size)) or (
            original_size and eval_batch_size > 1
        ):
            raise ValueError(
                "Scoring at full size needs eval_batch_size 1, and exact_unpad also original_size and the "
                f"protocol bam: found eval_batch_size {eval_batch_size}, original_size {original_size}, "
                f"exact_unpad {exact_unpad}, protocol {protocol}. Correct data.init_args."
            )
        self.fold, self.protocol = fold, protocol
        self.supports = supports or Supports()
        self.eval_supports = eval_supports or {f"{self.supports.shot}-shot": self.supports}
        self.eval_shot = max(STORED_SUPPORTS, *(s.shot for s in self.eval_supports.values()))
        self.number, self.seeds = episodes, {"val": [val_seed], "test": list(test_seeds)}
        self.min_pixels = self.own_min_pixels if min_pixels is None else min_pixels
        self.skip_rare, self.original_size, self.exact_unpad = skip_rare, original_size, exact_unpad
        self.episode_file = None if episode_file is None else Path(episode_file)
        self.fit = FitAndPad(size) if protocol == "bam" else SquareResize(size)
        self.found_images: dict[str, FewShotImages] = {}
        self.pools: dict[str, EpisodePool] = {}
        self.found_episodes: dict[str, list[list[Episode]]] = {}

    @abstractmethod
    def load_images(self, split: str) -> FewShotImages:
        """Find the images of "train", "val" or "test", once; the same object where splits are the same."""

    @abstractmethod
    def novel_ids(self, split: str) -> list[int]:
        """Return the ids that episodes of "val" or "test" look for."""

    def listed_pairs(self, split: str) -> list[tuple[int, int]] | None:
        """Return the (image, class) pairs of a published list; None where `min_pixels` makes them."""
        return None

    def images(self, split: str) -> FewShotImages:
        """Return the images of "train", "val" or "test"."""
        if split not in self.found_images:
            self.found_images[split] = self.load_images(split)
        return self.found_images[split]

    @property
    def base_classes(self) -> dict[int, str]:
        """Names of the classes that training looks for, by id."""
        novel = set(self.novel_ids("val")) | set(self.novel_ids("test"))
        return {c: name for c, name in self.images("train").class_names.items() if c not in novel}

    def base_learner_ids(self) -> list[int]:
        """Ids of the classes that the fold's base learner knows, in its order; all else is background."""
        return list(self.base_classes)

    def eval_classes(self, split: str) -> dict[int, str]:
        """Names of the classes that episodes of "val" or "test" look for, by id."""
        return {c: self.images(split).class_names[c] for c in self.novel_ids(split)}

    @property
    def novel_classes(self) -> dict[int, str]:
        """The classes of the test."""
        return self.eval_classes("test")

    def pool(self, split: str) -> EpisodePool:
        """Return the lists of a split's queries and supports."""
        if split in self.pools:
            return self.pools[split]
        trains, images = split == "train", self.images(split)
        shot = self.supports.shot if trains else self.eval_shot
        pool = EpisodePool(
            images.areas,
            self.base_classes if trains else self.novel_ids(split),
            self.protocol,
            self.by_class,
            self.min_pixels,
            shot,
            exclusive=trains and self.protocol == "bam",
            pairs=self.listed_pairs(split),
        )
        warn_of_rare_classes(pool.rare, images.class_names, shot, skip=trains or self.skip_rare)
        self.pools[split] = pool
        return pool

    def episodes(self, split: str) -> list[list[Episode]]:
        """Return the episodes of "val" or "test", a list for each seed."""
        if split not in self.found_episodes:
            if self.episode_file is None:
                self.found_episodes[split] = self.draw_episodes(split)
            else:
                self.found_episodes[split] = self.frozen_episodes(split, self.episode_file)
        return self.found_episodes[split]

    def draw_episodes(self, split: str) -> list[list[Episode]]:
        """Draw what `episodes` returns."""
        pool = self.pool(split)
        return [evaluation_episodes(pool, self.number, seed, self.eval_shot) for seed in self.seeds[split]]

    def frozen_episodes(self, split: str, path: Path) -> list[list[Episode]]:
        """Read what `episodes` returns from a file, which is written before if it is not there."""
        images = {name: self.images(name) for name in self.seeds}
        if not path.is_file():
            lists = {
                f"{name}/{seed}": episodes
                for name, seeds in self.seeds.items()
                for seed, episodes in zip(seeds, self.draw_episodes(name), strict=True)
            }
            freeze_episodes(path, self.header(), lists, images)
        options = (images[split], self.novel_ids(split), self.eval_shot)
        return [read_episodes(path, self.header(), f"{split}/{seed}", *options) for seed in self.seeds[split]]

    def header(self) -> dict:
        """What a file of frozen episodes belongs to."""
        return {
            "dataset": self.images("test").dataset,
            "fold": self.fold,
            "protocol": self.protocol,
            "min_pixels": self.min_pixels,
            "number": self.number,
        }

    def train_dataset(self) -> TrainingEpisodes:
        images, pool = self.images("train"), self.pool("train")
        reader = self.checked(SupportReader(images, self.supports, "train"), pool.pairs())
        draws = (self.fit, self.transform, self.seed, self.base_learner_ids())
        return TrainingEpisodes(images, pool, reader, *draws, void_is_background=self.protocol == "hsnet")

    def training_samples(self) -> TrainingSamples:
        return self.train_dataset()

    def eval_datasets(self, split: str) -> dict[str, EvaluationEpisodes]:
        images, sets, sizes = self.images(split), [], (self.original_size, self.exact_unpad)
        for supports in self.eval_supports.values():
            reader = self.checked(SupportReader(images, supports, split), self.anchored(supports, split))
            sets += [EvaluationEpisodes(images, e, reader, self.fit, *sizes) for e in self.episodes(split)]
        return dict(zip(self.set_names(split), sets, strict=True))

    def set_names(self, split: str) -> list[str]:
        """Names of the evaluation sets, for which no file is read."""
        seeds = self.seeds[split]
        suffixes = [f" seed {seed}" for seed in seeds] if len(seeds) > 1 else [""]
        return [f"{name}{suffix}" for name in self.eval_supports for suffix in suffixes]

    @property
    def val_set_names(self) -> list[str]:
        return self.set_names("val")

    @property
    def test_set_names(self) -> list[str]:
        return self.set_names("test")

    def anchored(self, supports: Supports, split: str) -> set[tuple[int, int]]:
        """(image, class) of the real supports in a split's episodes that have auxiliary images."""
        aux = supports.aux_in(split)
        if aux is None:
            return set()
        if split == "train":
            return set(self.pool("train").pairs())
        return {
            (image, episode.class_id)
            for episodes in self.episodes(split)
            for episode in episodes
            for image in aux.anchors(episode.supports[: supports.shot])
        }

    def support_pairs(self, split: str) -> list[tuple[int, int]]:
        """(image, class) of "train", "val" or "test" whose auxiliary image files this configuration reads."""
        return sorted(set().union(*(self.anchored(supports, split) for supports in self.generated(split))))

    def generated(self, split: str) -> list[Supports]:
        """Return the settings of a split's supports that read files of auxiliary images."""
        settings = [self.supports] if split == "train" else list(self.eval_supports.values())
        return [s for s in settings if (aux := s.aux_in(split)) is not None and aux.source == "generated"]

    def checked(self, reader: SupportReader, pairs) -> SupportReader:
        """Refuse, or tell of, missing auxiliary images before the first episode."""
        lacking, total = reader.missing(pairs)
        if lacking:
            warnings.warn(
                f"{len(lacking)} of {total} auxiliary images are missing: the first is {lacking[0]} in "
                f"{reader.folder}. aux.missing: {reader.aux.missing}.",
                stacklevel=2,
            )
        return reader
