"""Rare class sampling (DAFormer, arXiv 2111.14887): counts of classes, their files, samples drawn by them."""

import copy
import hashlib
import json
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from datamodules.base import LabelledDataset, SegmentationDataModule, TrainingSamples, to_tensors
from datamodules.samplers import sample_seed
from datamodules.transforms import Transform
from datamodules.workers import WorkerLoader
from functional.classes import IGNORE_INDEX

RECROPS = 10  # further crops of an image whose crop shows too little of the drawn class
HASHED_LABELS = 16  # whose pixels go into the hash of a data set's labels

# --- how many pixels of each class the labels have


def pixels_of_label(dataset: LabelledDataset, index: int) -> np.ndarray:
    """Pixels of each id 0..254 in a label at full size, int64 [255]."""
    return np.bincount(dataset.read_label(index).ravel(), minlength=256)[:IGNORE_INDEX]


def count_pixels(dataset: LabelledDataset, num_workers: int = 0) -> np.ndarray:
    """pixels_of_label of a whole training set, [N, 255]; the workers share the labels between them."""
    loader = WorkerLoader(
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
            images need less. A class of which no image has as many is not drawn, with a warning.
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
        ValueError: no image has enough pixels of any class; or, when a sample is drawn, its label has not the
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
        wanted = (self.label_map[classes] != IGNORE_INDEX) | (not options.skip_ignored_classes)
        most = pixels[:, classes].max(0)
        kept = wanted & (most > options.min_pixels)
        if len(rare := classes[wanted & ~kept]):
            found = (
                f"no image with more than {options.min_pixels} pixels of the classes {rare.tolist()}. Set "
                f"data.init_args.rare_class_sampling.min_pixels below {most[wanted].min()} to draw all"
            )
            if not kept.any():
                raise ValueError(f"Rare class sampling has nothing to draw: found {found}.")
            warnings.warn(f"Rare class sampling leaves classes out: found {found}.", stacklevel=2)
        self.classes = classes[kept].tolist()
        self.probabilities = probabilities[kept] / probabilities[kept].sum()
        self.pixels = pixels[:, self.classes]
        self.images = [np.flatnonzero(column > options.min_pixels) for column in self.pixels.T]

    def title(self, item: tuple[int, int]) -> str:
        """Name an item in messages: which image it is shows only when it is drawn."""
        return f"draw {item[1]}"

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


def source_samples(
    source: SegmentationDataModule, seed: int, options: RareClassSampling | None, num_workers: int
) -> TrainingSamples:
    """Training samples of a source, drawn by rare classes; without options, each image once in a pass.

    Raises:
        ValueError: the source has no labels.
    """
    dataset, transform = source.train_dataset(), source.transform
    if "label" not in dataset[0]:
        raise ValueError(
            f"The source of a training needs labels: found none in the training set of "
            f"{type(source).__name__}. Set data.init_args.source to a labelled data set."
        )
    if options is None:
        return TrainingSamples(dataset, transform, seed)
    path = options.statistics
    pixels = read_counts(path, dataset) if path else count_pixels(dataset, num_workers)
    return RareClassSamples(dataset, transform, seed, options, pixels)
