"""A plain convolutional segmenter and a synthetic data set: all that the training base needs to run."""

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from datamodules.base import SegmentationDataModule
from datamodules.transforms import RandomCropFlipJitter
from lightning_modules.supervised import Supervised

SIZE, NUM_CLASSES = 16, 11


class TinyDataset(torch.utils.data.Dataset):
    def __init__(self, length: int, offset: int = 0):
        self.length, self.offset = length, offset

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng([self.offset, index])
        label = rng.integers(0, NUM_CLASSES, (4, 4), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        label[:2] = 255
        image = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        return {"image": image, "label": label, "name": f"tiny-{self.offset}-{index}"}


class TinyDataModule(SegmentationDataModule):
    classes = "deliver11"

    def __init__(self, batch_size: int = 2, num_workers: int = 0, seed: int = 0, length: int = 7):
        super().__init__(batch_size, 2, num_workers, seed, RandomCropFlipJitter((SIZE, SIZE)))
        self.length = length

    def train_dataset(self):
        return TinyDataset(self.length)

    def eval_datasets(self, split: str):
        first = {"val": 1, "test": 11}[split]
        return {"day": TinyDataset(3, first), "night": TinyDataset(2, first + 1)}


class StopAt(Callback):
    """Ends a training after a step, as an interruption does."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step == self.step


class TinyNetwork(nn.Module):
    """Frozen features, batch norm, dropout and a head."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 8, 3, padding=1).requires_grad_(False)
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Conv2d(8, NUM_CLASSES, 1)

    def forward(self, image):
        return self.head(self.dropout(self.norm(self.features(image)).relu()))


def tiny_module(seed: int = 0, **arguments) -> Supervised:
    torch.manual_seed(seed)
    return Supervised(TinyNetwork(), **{"classes": "deliver11", "lr": 1e-2, **arguments})


def tiny_trainer(folder, max_steps: int, callbacks=(), logger=False, **arguments) -> Trainer:
    """A silent CPU Trainer that validates only where asked."""
    defaults = {
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "accelerator": "cpu",
        "devices": 1,
    }
    return Trainer(
        default_root_dir=folder,
        max_steps=max_steps,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        callbacks=list(callbacks),
        logger=logger,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **{**defaults, **arguments},
    )


def training_state(path) -> dict:
    """All of a checkpoint that the next step depends on."""
    checkpoint = torch.load(path, weights_only=True)
    data = {
        key: value
        for key, value in checkpoint.items()
        if isinstance(value, dict) and "batches_drawn" in value
    }
    assert len(data) == 1
    parts = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
    rng = checkpoint["callbacks"]["Checkpoints"]["rng"]
    return {key: checkpoint[key] for key in parts} | {"data": data, "rng": rng}


def assert_equal(a, b):
    """Bit for bit, through nested containers."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b
