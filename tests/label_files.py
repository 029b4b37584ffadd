"""A labelled data set of a few small files with ids of their own, and an adaptation from it."""

from itertools import islice

import numpy as np
import torch

from datamodules.adaptation import AdaptationDataModule
from datamodules.base import SegmentationDataModule
from datamodules.rare_classes import RareClassSampling
from datamodules.transforms import RandomCropFlipJitter
from tests.tiny_training import TinyDataModule

SIZE, LENGTH = 16, 12
RARE = RareClassSampling(min_pixels=0, min_crop_pixels=0, temperature=0.5)


class LabelFiles(torch.utils.data.Dataset):
    """Labels in ids 0..5 of their own: 5 in image 3 only, 4 ignored by the class table."""

    def __init__(self, length: int = LENGTH):
        self.label_names = [f"gtFine/train/city/{i:06d}_labelTrainIds.png" for i in range(length)]
        self.label_map = np.arange(256, dtype=np.uint8)
        self.label_map[:6] = [3, 0, 1, 2, 255, 7]

    def __len__(self) -> int:
        return len(self.label_names)

    def read_label(self, index: int) -> np.ndarray:
        label = np.random.default_rng(index).integers(0, 5, (SIZE, SIZE), dtype=np.uint8)
        label[0] = 255
        if index == 3:
            label[8:12, 8:12] = 5
        return label

    def __getitem__(self, index: int) -> dict:
        image = np.random.default_rng([1, index]).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        label = self.label_map[self.read_label(index)]
        return {"image": image, "label": label, "name": f"source-{index}"}


class Source(SegmentationDataModule):
    classes = "deliver11"

    def __init__(self, length: int = LENGTH):
        super().__init__(transform=RandomCropFlipJitter((SIZE, SIZE)))
        self.length = length

    def train_dataset(self):
        return LabelFiles(self.length)

    def eval_datasets(self, split: str):
        raise AssertionError("the source is not evaluated")


def adaptation(target: SegmentationDataModule | None = None, **options) -> AdaptationDataModule:
    options = {"rare_class_sampling": RARE, "batch_size": 2} | options
    return AdaptationDataModule(Source(), target or TinyDataModule(), **options)


def first_batches(data: AdaptationDataModule, count: int = 5) -> list[dict]:
    return list(islice(data.train_dataloader(), count))


def assert_same(a: list[dict], b: list[dict]):
    for x, y in zip(a, b, strict=True):
        for part in ("source", "target"):
            assert x[part]["name"] == y[part]["name"] and torch.equal(x[part]["image"], y[part]["image"])
        assert torch.equal(x["source"]["label"], y["source"]["label"])


def forget_labels(monkeypatch, dataset: type):
    """Let the samples of a data set have no labels."""
    original = dataset.__getitem__
    monkeypatch.setattr(
        dataset,
        "__getitem__",
        lambda self, index: {k: v for k, v in original(self, index).items() if k != "label"},
    )
