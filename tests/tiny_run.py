"""A network of one convolution and a DataModule of random images: a whole training run in a second."""

from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn
from torch.utils.data import Dataset

from datamodules.base import SegmentationDataModule


class TinyNetwork(nn.Module):
    """Logits of one convolution, by default 1x1; `width` hidden channels in front of it, frozen."""

    def __init__(self, num_classes: int = 11, width: int = 4, kernel: int = 1):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 1)
        with torch.no_grad():
            self.stem.weight.copy_(torch.linspace(-1, 1, self.stem.weight.numel()).view_as(self.stem.weight))
            self.stem.bias.zero_()
        self.stem.requires_grad_(False)
        self.head = nn.Conv2d(width, num_classes, kernel, padding=kernel // 2)

    def forward(self, image):
        return self.head(self.stem(image))


class RandomImages(Dataset):
    def __init__(self, length: int, size: int, num_classes: int, offset: int):
        self.length, self.size, self.num_classes, self.offset = length, size, num_classes, offset

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng = np.random.default_rng(self.offset + index)
        image = rng.integers(0, 256, (self.size, self.size, 3), np.uint8)
        label = rng.integers(0, self.num_classes, (self.size, self.size), np.uint8)
        return {"image": image, "label": label, "name": f"random-{self.offset + index}"}


class TinyData(SegmentationDataModule):
    def __init__(
        self,
        root: str | None = None,
        classes: str = "deliver11",
        batch_size: int = 2,
        size: int = 8,
        api_key: str | None = None,
        url: str | None = None,
        eval_batch_size: int = 2,
        num_workers: int = 0,
    ):
        super().__init__(batch_size, eval_batch_size, num_workers)
        if root is not None and not Path(root).is_dir():
            raise FileNotFoundError(f"TinyData has no folder {root}. Set data.init_args.root (now {root!r}).")
        self.classes, self.size = classes, size

    def train_dataset(self):
        return RandomImages(6, self.size, 11, 0)

    def eval_datasets(self, split):
        offset = {"val": 100, "test": 200}[split]
        return {
            name: RandomImages(3, self.size, 11, offset + 10 * i) for i, name in enumerate(("day", "night"))
        }


def tiny_config(**data) -> dict:
    """The config of a run of two steps with a validation after each."""
    network = {"class_path": "tests.tiny_run.TinyNetwork", "init_args": {"num_classes": 11}}
    return {
        "model": {
            "class_path": "lightning_modules.supervised.Supervised",
            "init_args": {"network": network, "classes": "${data.init_args.classes}", "lr": 0.01},
        },
        "data": {"class_path": "tests.tiny_run.TinyData", "init_args": {"classes": "deliver11", **data}},
        "trainer": {
            "max_steps": 2,
            "val_check_interval": 1,
            "log_every_n_steps": 1,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "wandb": {"mode": "disabled"},
    }


def write_config(path: Path, config: dict) -> Path:
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path
