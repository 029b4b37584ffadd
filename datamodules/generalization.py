"""Training on one data set and scoring on several others that it never saw (domain generalisation)."""

from torch.utils.data import Dataset

from datamodules.base import SegmentationDataModule, TrainingSamples
from datamodules.rare_classes import RareClassSampling, source_samples


class GeneralizationDataModule(SegmentationDataModule):
    """Labelled training batches of the source; validation and test score each target under its own name.

    Batch sizes, workers and seed are those given here, the transform that of the source.

    Args:
        source: its training set is learned from.
        targets: their evaluation sets are scored, in this order.
        rare_class_sampling: how source samples are drawn; None takes each image once in a pass.
        batch_size: source samples per process and batch.
        eval_batch_size, num_workers, seed: see SegmentationDataModule.

    Raises:
        ValueError: there is no target, or class tables differ; when sets are asked for, two have one name.
    """

    def __init__(
        self,
        source: SegmentationDataModule,
        targets: list[SegmentationDataModule],
        rare_class_sampling: RareClassSampling | None = None,
        batch_size: int = 1,
        eval_batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(batch_size, eval_batch_size, num_workers, seed, source.transform)
        tables = [part.classes for part in (source, *targets)]
        if not targets or len(set(tables)) > 1:
            raise ValueError(
                f"Source and targets need one class table, and one target at least: found {len(targets)}, "
                f"tables {', '.join(map(repr, tables))}. Set data.init_args.targets and their classes."
            )
        self.source, self.targets, self.classes = source, targets, source.classes
        self.rare_class_sampling = rare_class_sampling

    def train_dataset(self) -> Dataset:
        return self.source.train_dataset()

    def training_samples(self) -> TrainingSamples:
        return source_samples(self.source, self.seed, self.rare_class_sampling, self.num_workers)

    def eval_datasets(self, split: str) -> dict[str, Dataset]:
        found = [item for target in self.targets for item in target.eval_datasets(split).items()]
        names = [name for name, _ in found]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"Two targets have evaluation sets of one name: found {', '.join(twice)} twice. "
                "Leave one of data.init_args.targets out."
            )
        return dict(found)
