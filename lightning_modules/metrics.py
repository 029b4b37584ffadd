"""Scores of a segmentation from one confusion matrix over a whole set: the papers' mIoU."""

import torch
from torch import Tensor
from torchmetrics import Metric

from functional.classes import IGNORE_INDEX


class ConfusionMatrix(Metric):
    """Counts pixels by true class (row) and predicted class (column); matrices of all processes are added.

    The mean of IoUs per image (torchmetrics' MeanIoU) is another number than the papers' mIoU.
    """

    full_state_update = False

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.add_state(
            "matrix", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum"
        )

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count the pixels of class ids of the same shape; those whose label is 255 are left out.

        Raises:
            ValueError: a label is neither a class nor 255, or a prediction is no class.
        """
        ignored = label == IGNORE_INDEX
        outside = {
            "label": (label >= self.num_classes) & ~ignored,
            "prediction": prediction >= self.num_classes,
        }
        if (outside["label"] | outside["prediction"]).any():
            name, ids = ("label", label) if outside["label"].any() else ("prediction", prediction)
            raise ValueError(
                f"A {name} holds a class that the table does not: found ids {ids.unique().tolist()} with "
                f"{self.num_classes} classes. Give labels and network the class table of the model."
            )
        cells = (label * self.num_classes + prediction).masked_fill(ignored, self.num_classes**2)
        counts = torch.bincount(cells.flatten(), minlength=self.num_classes**2 + 1)
        self.matrix += counts[:-1].view(self.num_classes, self.num_classes)

    def compute(self) -> dict[str, Tensor]:
        """Return mIoU, fwIoU (each IoU weighted by the class's share of the true pixels), aAcc (all pixels),
        mAcc (mean over classes), IoU [classes] in percent, and the matrix.

        A class with neither a true nor a predicted pixel has no IoU (NaN) and does not count in the mean; one
        that is predicted but never true counts with 0.
        """
        matrix = self.matrix.double().cpu()
        correct, true, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        iou = 100 * correct / (true + predicted - correct)
        return {
            "mIoU": iou.nanmean(),
            "fwIoU": (true * iou.nan_to_num()).sum() / matrix.sum(),
            "aAcc": 100 * correct.sum() / matrix.sum(),
            "mAcc": (100 * correct / true).nanmean(),
            "IoU": iou,
            "matrix": self.matrix.cpu(),
        }
