"""Labelled source and unlabelled target in one batch, for adaptation (MADM, arXiv 2410.21708).

Rare class sampling of the source, and files of class counts that it reads, are DAFormer's (arXiv 2111.14887).
"""

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datamodules.base import (
    LabelledDataset,
    SegmentationDataModule,
    TrainingSamples,
    to_tensors,
)
from datamodules.samplers import StepBatchSampler, sample_seed
from datamodules.transforms import Transform
from functional.classes import IGNORE_INDEX

RECROPS = 10  # further crops of an image whose crop shows too little of the drawn class
HASHED_LABELS = 16  # whose pixels go into the hash of a data set's labels

# --- how many pixels of each class the labels have


def pixels_of_label(dataset: LabelledDataset, index: int) -> np.ndarray:
    """Pixels of each id 0..254 in a label at full size, int64 [255]."""
    return np.bincount(dataset.read_label(index).ravel(), minlength=256)[:IGNORE_INDEX]


def count_pixels(dataset: LabelledDataset, num_workers: int = 0) -> np.ndarray:
    """pixels_of_label of a whole training set, [N, 255]; the workers share the labels between them."""
    loader = DataLoader(
        range(len(dataset)),
        batch_size=None,
        collate_fn=partial(pixels_of_label, dataset),  # it is the workers who call it
        num_workers=num_workers,
        generator=torch.Generator(),  # the global one belongs to the training
    )
    return np.stack(list(tqdm(loader, desc="counting labels", unit="label", disable=None, leave=False)))


def labels_sha256(dataset: LabelledDataset) -> str:
    """SHA-256 over the names of all labels and the ids in 16 of them, spread over the set.

    To read all would take as long as to count them; RareClassSamples compares each label that it draws.
    """
    digest = hashlib.sha256("\n".join(dataset.label_names).encode())
    for index in np.linspace(0, len(dataset) - 1, HASHED_LABELS).astype(int).tolist():
        label = dataset.read_label(index)
        digest.update(f"{label.shape}".encode() + label.tobytes())
    return digest.hexdigest()


def counts_document(dataset: LabelledDataset, pixels: np.ndarray) -> dict:
    """What a file of class counts holds: {"sha256", "samples": {label name: {id: pixels}}}."""
    rows = ({str(c): int(row[c]) for c in np.flatnonzero(row)} for row in pixels)
    samples = dict(zip(dataset.label_names, rows, strict=True))
    return {"sha256": labels_sha256(dataset), "samples": samples}


def read_counts(path: str | Path, dataset: LabelledDataset) -> np.ndarray:
    """Read the counts of a training set's labels, int64 [N, 255].

    Args:
        path: file of scripts/count_classes.py, or DAFormer's sample_class_stats.json or
            samples_with_class.json; theirs are matched by the last part of a path, having another root.
        dataset: the set that was counted.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is none of these, or of other labels.
    """
    advice = "Count again: python -m scripts.count_classes --config CONFIG."
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"There is no file of class counts {path}. Write it: python -m scripts.count_classes --config "
            "CONFIG; or leave statistics out, and the labels are counted each time training starts."
        )
    try:
        found = json.loads(Path(path).read_text("utf-8"))
        keys = names = dataset.label_names
        if isinstance(found, dict) and "sha256" in found:
            stored, samples = found["sha256"], found["samples"]
        else:
            stored, samples, keys = None, daformer_counts(found), [Path(name).name for name in names]
        samples = {name: {int(c): int(n) for c, n in counts.items()} for name, counts in samples.items()}
        if wrong := {c for counts in samples.values() for c in counts if not 0 <= c < IGNORE_INDEX}:
            raise ValueError(f"class ids {sorted(wrong)} outside 0..254")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} holds no class counts of ours or DAFormer's: found {type(error).__name__} ({error}). "
            f"{advice}"
        ) from None
    missing = [name for name, key in zip(names, keys, strict=True) if key not in samples]
    if missing or stored not in (None, labels_sha256(dataset)):
        what = f"{len(missing)} of {len(names)} are missing, such as {missing[0]}" if missing else "other ids"
        raise ValueError(f"The class counts in {path} are not of these labels: found {what}. {advice}")
    pixels = np.zeros((len(names), IGNORE_INDEX), np.int64)
    for row, key in zip(pixels, keys, strict=True):
        row[list(samples[key])] = list(samples[key].values())
    return pixels


def daformer_counts(found: list | dict) -> dict[str, dict[str, int]]:
    """{file name: {id: pixels}} of [{"file": path, id: pixels}, ...] or {id: [[path, pixels], ...]}."""
    if isinstance(found, list):
        return {Path(counts.pop("file")).name: counts for counts in map(dict, found)}
    samples: dict[str, dict[str, int]] = {}
    for c, files in found.items():
        for file, count in files:
            samples.setdefault(Path(file).name, {})[c] = count
    return samples


# --- samples


@dataclass(frozen=True)
class RareClassSampling:
    """How source samples are drawn: a class, rare ones often; an image with it; a crop that shows it.

    Classes are those of the label files, before the map to the class table (of Cityscapes the 19 trainIds).

    Args:
        statistics: file of class counts, see read_counts; None counts the labels whenever training starts.
        temperature: T of P(c) = softmax((1 - f_c) / T), f_c being the class's share of all labelled pixels.
        min_pixels: a drawn image has more pixels than this of the class, at full size. For 2048x1024; smaller
            images need less.
        min_crop_pixels: a crop with no more pixels than this is drawn again, ten times at most.
        skip_ignored_classes: leave out classes that the class table ignores; MADM's code draws them too.
    """

    statistics: str | None = None
    temperature: float = 0.01
    min_pixels: int = 3000
    min_crop_pixels: int = 1500
    skip_ignored_classes: bool = False

    def __post_init__(self):
        if self.temperature <= 0 or self.min_pixels < 0 or self.min_crop_pixels < 0:
            raise ValueError(
                f"Rare class sampling needs a temperature > 0 and pixels >= 0: found {self}. Correct "
                "data.init_args.rare_class_sampling."
            )


def class_probabilities(pixels: np.ndarray, temperature: float) -> np.ndarray:
    """P(c) = softmax((1 - f_c) / T) with f_c = n_c / sum n, float64 [C].

    Args:
        pixels: n_c, number of pixels of each class, [C].
        temperature: T; the smaller, the more the rarest class is preferred.
    """
    scores = (1 - pixels / pixels.sum()) / temperature
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


class RareClassSamples(TrainingSamples):
    """Samples by (anything, draw): class, image and crop are a function of (seed, draw).

    Args:
        dataset: the source's training set.
        transform: crops and augments; None makes no crops.
        seed: of the draws.
        options: see RareClassSampling.
        pixels: counts of its labels, [N, 255].

    Raises:
        ValueError: no image has enough pixels of a class; or, when a sample is drawn, its label has not the
            counted number of pixels.
    """

    def __init__(
        self,
        dataset: LabelledDataset,
        transform: Transform | None,
        seed: int,
        options: RareClassSampling,
        pixels: np.ndarray,
    ):
        own_ids = copy.copy(dataset)
        own_ids.label_map = np.arange(256, dtype=np.uint8)
        super().__init__(own_ids, transform, seed)
        self.label_map, self.min_crop_pixels = dataset.label_map, options.min_crop_pixels
        classes = np.flatnonzero(pixels.any(0))
        probabilities = class_probabilities(pixels.sum(0)[classes], options.temperature)
        kept = (self.label_map[classes] != IGNORE_INDEX) | (not options.skip_ignored_classes)
        self.classes = classes[kept].tolist()
        self.probabilities = probabilities[kept] / probabilities[kept].sum()
        self.pixels = pixels[:, self.classes]
        self.images = [np.flatnonzero(column > options.min_pixels) for column in self.pixels.T]
        most = self.pixels.max(0).min()
        if most <= options.min_pixels:
            rare = [c for c, images in zip(self.classes, self.images, strict=True) if not len(images)]
            raise ValueError(
                f"Rare class sampling finds no image with more than {options.min_pixels} pixels of the "
                f"classes {rare}: set data.init_args.rare_class_sampling.min_pixels below {most}."
            )

    def __getitem__(self, item: tuple[int, int]) -> dict:
        seed = sample_seed(self.seed, item[1])
        rng = np.random.default_rng(seed)
        number = int(rng.choice(len(self.classes), p=self.probabilities))
        drawn, index = self.classes[number], int(rng.choice(self.images[number]))
        sample = self.dataset[index]
        found, counted = np.count_nonzero(sample["label"] == drawn), self.pixels[index, number]
        if found != counted:
            raise ValueError(
                f"The class counts are not of these labels: found {found} pixels of class {drawn} in "
                f"{self.dataset.label_names[index]}, counted were {counted}. Count again with "
                "scripts/count_classes.py."
            )
        for crop in range(1 + RECROPS):
            image, label = self.augment(sample["image"], sample["label"], sample_seed(seed, crop))
            if np.count_nonzero(label == drawn) > self.min_crop_pixels:
                break
        return {**sample, **to_tensors(image, self.label_map[label])}


class UnlabelledSamples(TrainingSamples):
    """Samples {"image", "name"} by (index, draw): nothing that tells what an image shows goes along."""

    def __getitem__(self, item: tuple[int, int]) -> dict:
        index, draw = item
        sample = self.dataset[index]
        nothing = np.full(sample["image"].shape[:2], IGNORE_INDEX, np.uint8)
        tensors = to_tensors(*self.augment(sample["image"], nothing, sample_seed(self.seed, draw)))
        return {"image": tensors["image"], "name": sample["name"]}


class PairedSamples(Dataset):
    """{"source": sample, "target": sample} by a pair of items."""

    def __init__(self, source: Dataset, target: Dataset):
        self.source, self.target = source, target

    def __getitem__(self, items: tuple) -> dict:
        return {"source": self.source[items[0]], "target": self.target[items[1]]}


class PairedBatches:
    """Batches of pairs of items from two batch samplers."""

    def __init__(self, source: StepBatchSampler, target: StepBatchSampler):
        self.source, self.target = source, target

    def __iter__(self) -> Iterator[list[tuple]]:
        for batches in zip(self.source, self.target, strict=True):
            yield list(zip(*batches, strict=True))


class AdaptationDataModule(SegmentationDataModule):
    """Training batches {"source": {"image", "label", "name", ...}, "target": {"image", "name"}}.

    A source and a target sample have nothing to do with each other. Validation and test are the target's.
    Batch sizes, workers and seed are those given here, transforms those of the two parts.

    Args:
        source: its training set gives labelled images.
        target: its training set gives images, its evaluation sets are scored.
        rare_class_sampling: how source samples are drawn; None takes each image once in a pass.
        batch_size: pairs per process and batch.
        eval_batch_size, num_workers, seed: see SegmentationDataModule.

    Raises:
        ValueError: source and target have different class tables.
    """

    def __init__(
        self,
        source: SegmentationDataModule,
        target: SegmentationDataModule,
        rare_class_sampling: RareClassSampling | None = None,
        batch_size: int = 1,
        eval_batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        if source.classes != target.classes:
            raise ValueError(
                f"Source and target need one class table: found {source.classes!r} and {target.classes!r}. "
                "Set data.init_args.source.init_args.classes and target.init_args.classes to the same."
            )
        self.source, self.target, self.classes = source, target, target.classes
        self.rare_class_sampling = rare_class_sampling

    def train_dataset(self) -> PairedSamples:
        # Two seeds: with one, sets of equal length would be drawn in the same order.
        source_seed, target_seed = sample_seed(self.seed, 0), sample_seed(self.seed, 1)
        dataset, transform = self.source.train_dataset(), self.source.transform
        if "label" not in dataset[0]:
            raise ValueError(
                f"The source of an adaptation needs labels: found none in the training set of "
                f"{type(self.source).__name__}. Set data.init_args.source to a labelled data set."
            )
        if options := self.rare_class_sampling:
            path = options.statistics
            pixels = read_counts(path, dataset) if path else count_pixels(dataset, self.num_workers)
            source = RareClassSamples(dataset, transform, source_seed, options, pixels)
        else:
            source = TrainingSamples(dataset, transform, source_seed)
        target = UnlabelledSamples(self.target.train_dataset(), self.target.transform, target_seed)
        return PairedSamples(source, target)

    def eval_datasets(self, split: str) -> dict[str, Dataset]:
        return self.target.eval_datasets(split)

    def train_dataloader(self) -> DataLoader:
        pairs = self.train_dataset()
        rank, world_size = self.rank_and_world_size()
        samplers = [
            StepBatchSampler(len(part), self.batch_size, part.seed, rank, world_size, self.batches_drawn)
            for part in (pairs.source, pairs.target)
        ]
        return DataLoader(pairs, batch_sampler=PairedBatches(*samplers), **self.loader_options())
