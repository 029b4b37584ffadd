"""Training samples in whose worker something goes wrong, and images of which some files are damaged."""

import os
import signal
import time
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from datamodules.base import SegmentationDataModule
from datamodules.reading import read_image
from datamodules.samplers import StepBatchSampler
from tests.tiny_run import RandomImages, TinyData

LENGTH = 40


class FaultySamples(RandomImages):
    """Does something wrong at one of its samples; each process that reads one leaves a file by its id."""

    def __init__(self, folder: Path, at: int, fault: str):
        super().__init__(LENGTH, 8, 11, 0)
        self.folder, self.at, self.fault = folder, at, fault

    def __getitem__(self, index):
        (self.folder / str(os.getpid())).touch()
        if index == self.at:
            (self.folder / "fault").write_text(str(time.time()))
            if self.fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.fault == "sleeps":
                time.sleep(600)
            elif self.fault == "memory":
                raise MemoryError
        return super().__getitem__(index)


class FaultyData(TinyData):
    """TinyData with a fault in the 12th batch, and two seconds until a worker counts as hung."""

    def __init__(self, folder: str, fault: Literal["killed", "sleeps", "memory"], num_workers: int = 2):
        super().__init__(num_workers=num_workers)
        self.folder, self.fault = Path(folder), fault

    def train_dataset(self):
        (*_, batch) = islice(StepBatchSampler(LENGTH, self.batch_size, self.seed), 12)
        return FaultySamples(self.folder, batch[0][0], self.fault)

    def loader_options(self):
        return super().loader_options() | {"timeout": 2 if self.num_workers else 0}


class ImageFolder(Dataset):
    """Images 0.png, 1.png, ... of a folder, each in one colour; some damaged."""

    def __init__(self, folder: Path, length: int, damaged=()):
        self.folder, self.length = Path(folder), length
        self.image_names = [f"{i}.png" for i in range(length)]
        for i, name in enumerate(self.image_names):
            Image.fromarray(np.full((16, 16, 3), 20 * i % 256, np.uint8)).save(self.folder / name)
            if i in damaged:
                (self.folder / name).write_bytes((self.folder / name).read_bytes()[:45])

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        image = read_image(self.folder / self.image_names[index])
        return {"image": image, "label": image[..., 0] % 11, "name": str(index)}


class DamagedFiles(SegmentationDataModule):
    """Trains and scores an ImageFolder."""

    classes = "deliver11"

    def __init__(self, folder: Path, damaged=(), length: int = 12, unreadable: str = "skip", **options):
        super().__init__(**{"batch_size": 2, **options})
        self.files, self.unreadable = ImageFolder(folder, length, damaged), unreadable

    def train_dataset(self):
        return self.files

    def eval_datasets(self, split):
        return {"own": self.files}
