"""Supervised training on labelled images: the source-only baseline of the methods."""

from torch import Tensor

from functional.classes import IGNORE_INDEX
from functional.losses import pixel_cross_entropy
from lightning_modules.base import SegmentationModule


class Supervised(SegmentationModule):
    """Cross entropy on the labels of one DataModule."""

    sharded_calls = ()

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        logits, label = self.network(batch["image"]), batch["label"]
        loss = pixel_cross_entropy(logits, label)

        correct = (logits.detach().argmax(1) == label).sum() / (label != IGNORE_INDEX).sum().clamp(min=1)
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/pixel_accuracy", 100 * correct)
        return loss


class SourceOnly(Supervised):
    """The source of an adaptation's batches alone: the baseline that adaptation is measured by."""

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        return super().training_step(batch["source"], batch_idx)
