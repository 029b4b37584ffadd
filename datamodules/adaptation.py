"""Labelled source and unlabelled target in one batch, for adaptation (MADM, arXiv 2410.21708)."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import DataLoader, Dataset

from datamodules.base import SegmentationDataModule, TrainingSamples, to_tensors
from datamodules.rare_classes import RareClassSampling, source_samples
from datamodules.samplers import StepBatchSampler, sample_seed
from datamodules.workers import WorkerLoader
from functional.classes import IGNORE_INDEX


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
        source = source_samples(self.source, source_seed, self.rare_class_sampling, self.num_workers)
        target = UnlabelledSamples(self.target.train_dataset(), self.target.transform, target_seed)
        return PairedSamples(self.readable(source), self.readable(target))

    def eval_datasets(self, split: str) -> dict[str, Dataset]:
        return self.target.eval_datasets(split)

    def train_dataloader(self) -> DataLoader:
        pairs = self.train_dataset()
        rank, world_size = self.rank_and_world_size()
        samplers = [
            StepBatchSampler(len(part), self.batch_size, part.seed, rank, world_size, self.batches_drawn)
            for part in (pairs.source, pairs.target)
        ]
        self.drawn_from = {"source ": (samplers[0], pairs.source), "target ": (samplers[1], pairs.target)}
        return WorkerLoader(pairs, batch_sampler=PairedBatches(*samplers), **self.loader_options())
