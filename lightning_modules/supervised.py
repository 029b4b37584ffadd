"""Supervised training on labelled images: the source-only baseline of the methods."""

from torch import Tensor
from torch.nn.functional import cross_entropy

from functional.classes import IGNORE_INDEX
from lightning_modules.base import SegmentationModule


def pixel_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Cross entropy averaged over the valid pixels; 0, with zero gradients, where there are none.

    Args:
        logits: [B, C, H, W].
        label: [B, H, W], 255 ignored.
    """
    valid = (label != IGNORE_INDEX).sum()
    return cross_entropy(logits, label, ignore_index=IGNORE_INDEX, reduction="sum") / valid.clamp(min=1)


class Supervised(SegmentationModule):
    """Cross entropy on the labels of one DataModule."""

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        logits, label = self.network(batch["image"]), batch["label"]
        loss = pixel_cross_entropy(logits.float(), label)

        correct = (logits.detach().argmax(1) == label).sum() / (label != IGNORE_INDEX).sum().clamp(min=1)
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/pixel_accuracy", 100 * correct)
        return loss


class SourceOnly(Supervised):
    """The source of an adaptation's batches alone: the baseline that adaptation is measured by."""

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        return super().training_step(batch["source"], batch_idx)
