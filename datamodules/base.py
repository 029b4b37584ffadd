"""What every segmentation DataModule shares: resumable training batches, evaluation sets in order."""

import warnings
from abc import ABC, abstractmethod
from operator import itemgetter
from typing import Literal, Protocol

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from datamodules.reading import UnreadableFile
from datamodules.samplers import StepBatchSampler, sample_seed
from datamodules.transforms import Transform
from datamodules.workers import WORKER_TIMEOUT, WorkerLoader

# Of unreadable training samples: more mean that a disk is failing or the wrong data is there.
MOST_IN_A_ROW, MOST_OF_ALL, ALWAYS_ALLOWED = 100, 0.01, 10
REDRAW = 2**40  # distance of a replacement's draw from the replaced one; no run comes so far


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

    def title(self, item: tuple[int, int]) -> str:
        """Name an item in messages: by its file where the data set has `image_names`, else by its index."""
        names = getattr(self.dataset, "image_names", None)
        return names[item[0]] if names else f"sample {item[0]} (draw {item[1]})"


class ReadableSamples(Dataset):
    """Training samples in which another stands where a file cannot be read, with a warning that names it.

    The replacement is that of the next index, drawn anew; so it depends on the item alone. "replaced" is the
    number of samples that could not be read before the one that is given.

    Raises:
        UnreadableFile: more than 100 samples in a row cannot be read.
    """

    def __init__(self, samples: TrainingSamples):
        self.samples, self.seed, self.title = samples, samples.seed, samples.title

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: tuple[int, int]) -> dict:
        index, draw = item
        for failed in range(MOST_IN_A_ROW + 1):
            try:
                sample = self.samples[(index + failed) % len(self), draw + failed * REDRAW]
                return {**sample, "replaced": failed}
            except UnreadableFile as error:
                fault = str(error)
                warnings.warn(f"Another training sample takes the place of one: {fault}", stacklevel=2)
        raise UnreadableFile(
            f"More than {MOST_IN_A_ROW} training samples in a row cannot be read: the last one found is: "
            f"{fault} Check the disk, and the data set with scripts/check_data.py."
        )


def replaced_numbers(batch: dict) -> list[int]:
    """What the samples of a batch and of its parts have as "replaced"; empty where they have none."""
    own = batch["replaced"].tolist() if "replaced" in batch else []
    return own + [n for part in batch.values() if isinstance(part, dict) for n in replaced_numbers(part)]


class EvaluationSamples(Dataset):
    """Samples of a dataset by index, unchanged."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        sample = self.dataset[index]
        return {**sample, **to_tensors(sample["image"], sample["label"])}


def image_shape(batch: dict) -> torch.Size | None:
    """Shape of the images in a batch or in its first part that has any."""
    if "image" in batch:
        return batch["image"].shape
    shapes = [image_shape(part) for part in batch.values() if isinstance(part, dict)]
    return next(filter(None, shapes), None)


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

    Attributes:
        unreadable: what becomes of a training sample whose file cannot be read: "error" names the file;
            "skip" puts another in its place (see ReadableSamples), until it is more than 1 % of all and more
            than 10. The command line sets it. Evaluation skips nothing.
        replaced: training samples that this process could not read so far.
    """

    classes: str
    unreadable: Literal["error", "skip"] = "error"

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
        self.batches_drawn = self.replaced = 0
        self.drawn_from: dict[str, tuple[StepBatchSampler, TrainingSamples]] = {}
        self.last_images: torch.Size | None = None  # shape of the last batch, which out of memory tells

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
        dataset = self.readable(self.training_samples())
        rank, world_size = self.rank_and_world_size()
        sampler = StepBatchSampler(
            len(dataset), self.batch_size, self.seed, rank, world_size, start_batch=self.batches_drawn
        )
        self.drawn_from = {"": (sampler, dataset)}
        return WorkerLoader(dataset, batch_sampler=sampler, **self.loader_options())

    def readable(self, samples: TrainingSamples) -> TrainingSamples | ReadableSamples:
        """Apply `unreadable` to training samples."""
        return ReadableSamples(samples) if self.unreadable == "skip" else samples

    def asked_last(self) -> list[str]:
        """Training samples that the loader was asked for and that were not used yet, oldest first."""
        asked = [
            (step, f"{part}{samples.title(item)}")
            for part, (sampler, samples) in self.drawn_from.items()
            for step, batch in sampler.asked
            for item in batch
        ]
        return [title for step, title in sorted(asked, key=itemgetter(0)) if step >= self.batches_drawn]

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
            loaders.append(WorkerLoader(own, batch_size=self.eval_batch_size, **self.loader_options()))
        return loaders

    def rank_and_world_size(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def loader_options(self) -> dict:
        workers = self.num_workers > 0
        return {
            "num_workers": self.num_workers,
            "persistent_workers": workers,
            "timeout": WORKER_TIMEOUT if workers else 0,
            "pin_memory": torch.cuda.is_available(),
            # Without a generator of its own an iterator draws from the global one, and dropout would change
            # with the number of validation runs.
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def on_before_batch_transfer(self, batch, dataloader_idx: int):
        # Called when a batch is used, not when a worker prepares it: what is prefetched is not counted.
        self.last_images = image_shape(batch)
        if self.trainer is not None and self.trainer.training:
            self.batches_drawn += 1
            self.count_replaced(replaced_numbers(batch))
        return batch

    def count_replaced(self, numbers: list[int]) -> None:
        """Add a batch's numbers to `replaced`.

        Raises:
            UnreadableFile: too many samples cannot be read.
        """
        self.replaced += sum(numbers)
        draws = self.batches_drawn * len(numbers)
        if any(numbers) and self.replaced > max(ALWAYS_ALLOWED, MOST_OF_ALL * draws):
            raise UnreadableFile(
                f"Too many training samples cannot be read: found {self.replaced} among {draws} draws, and "
                f"{MOST_OF_ALL:.0%} are allowed. Repair the files that the warnings name, or find all with "
                "scripts/check_data.py."
            )

    def state_dict(self) -> dict[str, int]:
        """Batches that training has used (micro-batches, when gradients are accumulated), and `replaced`."""
        return {"batches_drawn": self.batches_drawn, "replaced": self.replaced}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches_drawn = state["batches_drawn"]
        self.replaced = state.get("replaced", 0)
