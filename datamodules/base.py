"""What every segmentation DataModule shares: resumable training batches, evaluation sets in order."""

from abc import ABC, abstractmethod
from typing import Protocol

import cv2
import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from datamodules.samplers import StepBatchSampler, sample_seed
from datamodules.transforms import Transform

WORKER_TIMEOUT = 300  # seconds without a batch after which a hung worker is an error


def to_tensors(image: np.ndarray, label: np.ndarray) -> dict[str, Tensor]:
    """Image uint8 [H, W, 3] to float32 [3, H, W] in [0, 1], label uint8 [H, W] to int64."""
    # Pillow's arrays cannot be written to, which torch warns of.
    image, label = (np.require(pixels, requirements=["C", "W"]) for pixels in (image, label))
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    return {
        "image": pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255),
        "label": torch.from_numpy(label).long(),
    }


class LabelledDataset(Protocol):
    """What rare class sampling asks of a training dataset, besides its items.

    Attributes:
        label_names: of each sample the path of its label below the data root, or another lasting name.
        label_map: uint8 [256], from the ids of the label files to those of the class table. `__getitem__`
            looks it up anew each time: a copy with the identity in its place gives labels in their own ids.
    """

    label_names: list[str]
    label_map: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...

    def read_label(self, index: int) -> np.ndarray:
        """Read a label alone, uint8 [H, W], in the ids of its file."""
        ...


class TrainingSamples(Dataset):
    """Samples of a dataset by (index, draw), augmented with a seed of their own."""

    def __init__(self, dataset: Dataset, transform: Transform | None, seed: int):
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, int]) -> dict:
        index, draw = item
        sample = self.dataset[index]
        seed = sample_seed(self.seed, draw)
        return {**sample, **to_tensors(*self.augment(sample["image"], sample["label"], seed))}

    def augment(self, image: np.ndarray, label: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Apply the transform, if there is one."""
        return (image, label) if self.transform is None else self.transform(image, label, seed=seed)


class EvaluationSamples(Dataset):
    """Samples of a dataset by index, unchanged."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        sample = self.dataset[index]
        return {**sample, **to_tensors(sample["image"], sample["label"])}


def one_opencv_thread(worker: int) -> None:
    """Keep a loader's worker on one core: it would start as many OpenCV threads as the machine has cores."""
    cv2.setNumThreads(0)


class SegmentationDataModule(LightningDataModule, ABC):
    """Batches of "image" float32 [B, 3, H, W] RGB in [0, 1], "label" int64 [B, H, W] (255 ignored), "name".

    A subclass names its class table in `classes` and gives datasets whose items are {"image": uint8
    [H, W, 3], "label": uint8 [H, W], "name": str, ...}; what else an item holds travels along. Training has
    no epochs: its loader goes on for ever, so the Trainer needs max_steps; and use_distributed_sampler=False,
    because the samplers here already know their rank.

    Args:
        batch_size: training samples per process and batch.
        eval_batch_size: samples per batch of validation and test.
        num_workers: processes that load data; results do not depend on their number.
        seed: of the order and of the augmentation.
        transform: augmentation of training samples; None leaves them as they are.
    """

    classes: str

    def __init__(
        self,
        batch_size: int = 1,
        eval_batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        transform: Transform | None = None,
    ):
        super().__init__()
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers, self.seed, self.transform = num_workers, seed, transform
        self.batches_drawn = 0

    @abstractmethod
    def train_dataset(self) -> Dataset:
        """Return the training samples."""

    @abstractmethod
    def eval_datasets(self, split: str) -> dict[str, Dataset]:
        """Return the sets of "val" or "test" by name; each is scored on its own, in this order."""

    @property
    def val_set_names(self) -> list[str]:
        return list(self.eval_datasets("val"))

    @property
    def test_set_names(self) -> list[str]:
        return list(self.eval_datasets("test"))

    def training_samples(self) -> TrainingSamples:
        """Return the training samples as they are drawn and augmented."""
        return TrainingSamples(self.train_dataset(), self.transform, self.seed)

    def train_dataloader(self) -> DataLoader:
        dataset = self.training_samples()
        rank, world_size = self.rank_and_world_size()
        sampler = StepBatchSampler(
            len(dataset), self.batch_size, self.seed, rank, world_size, start_batch=self.batches_drawn
        )
        return DataLoader(dataset, batch_sampler=sampler, **self.loader_options())

    def val_dataloader(self) -> list[DataLoader]:
        return self.eval_dataloaders("val")

    def test_dataloader(self) -> list[DataLoader]:
        return self.eval_dataloaders("test")

    def eval_dataloaders(self, split: str) -> list[DataLoader]:
        rank, world_size = self.rank_and_world_size()
        loaders = []
        for name, dataset in self.eval_datasets(split).items():
            samples = EvaluationSamples(dataset)
            if len(samples) < world_size:
                raise ValueError(
                    f"The {split} set {name!r} is too small: found {len(samples)} images for {world_size} "
                    "processes, and each needs one. Make the set larger or set trainer.devices lower."
                )
            # No padding to equal lengths: each image counts once whatever the number of processes.
            own = Subset(samples, range(rank, len(samples), world_size))
            loaders.append(DataLoader(own, batch_size=self.eval_batch_size, **self.loader_options()))
        return loaders

    def rank_and_world_size(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def loader_options(self) -> dict:
        workers = self.num_workers > 0
        return {
            "num_workers": self.num_workers,
            "persistent_workers": workers,
            "timeout": WORKER_TIMEOUT if workers else 0,
            "worker_init_fn": one_opencv_thread,
            "pin_memory": torch.cuda.is_available(),
            # Without a generator of its own an iterator draws from the global one, and dropout would change
            # with the number of validation runs.
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def on_before_batch_transfer(self, batch, dataloader_idx: int):
        # Called when a batch is used, not when a worker prepares it: what is prefetched is not counted.
        if self.trainer is not None and self.trainer.training:
            self.batches_drawn += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        """Batches that training has used: micro-batches, when gradients are accumulated."""
        return {"batches_drawn": self.batches_drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches_drawn = state["batches_drawn"]
