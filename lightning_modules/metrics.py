"""Scores of a segmentation from one confusion matrix over a whole set: the papers' mIoU."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from functional.classes import IGNORE_INDEX

SWEEP = tuple(percent / 100 for percent in range(30, 75))  # the thresholds of DiffSegmenter's evaluation


class ConfusionMatrix(Metric):
    """Counts pixels by true class (row) and predicted class (column); matrices of all processes are added.

    The mean of IoUs per image (torchmetrics' MeanIoU) is another number than the papers' mIoU.

    Args:
        absent: see matrix_scores.
    """

    full_state_update = False

    def __init__(self, num_classes: int, absent: Literal["skip", "zero"] = "skip"):
        super().__init__()
        self.num_classes, self.absent = num_classes, absent
        self.add_state(
            "matrix", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum"
        )

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count the pixels of class ids of the same shape; those whose label is 255 are left out.

        Raises:
            ValueError: a label is neither a class nor 255, or a prediction is no class.
        """
        check_ids(prediction, label, self.num_classes)
        ignored = label == IGNORE_INDEX
        cells = (label * self.num_classes + prediction).masked_fill(ignored, self.num_classes**2)
        counts = torch.bincount(cells.flatten(), minlength=self.num_classes**2 + 1)
        self.matrix += counts[:-1].view(self.num_classes, self.num_classes)

    def compute(self) -> dict[str, Tensor]:
        """Return the scores of the matrix, see matrix_scores."""
        return matrix_scores(self.matrix, self.absent)


def matrix_scores(matrix: Tensor, absent: Literal["skip", "zero"] = "skip") -> dict[str, Tensor]:
    """Scores in percent of a confusion matrix [classes, classes] of pixels, rows are the truth.

    A class that is predicted but never true counts with IoU 0.

    Args:
        absent: what a class with neither a true nor a predicted pixel is: "skip" gives it no IoU (NaN), which
            does not count in the mean; "zero" gives it 0, as DiffSegmenter's code does.

    Returns:
        mIoU, fwIoU (each IoU weighted by the class's share of the true pixels), aAcc (all pixels), mAcc (mean
        over classes), FP and FN (mean over classes of the wrong and of the missed pixels, as a share of the
        union), IoU [classes], and the matrix.
    """
    counts = matrix.double().cpu()
    correct, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    union = true + predicted - correct
    shares = {"IoU": correct, "FP": predicted - correct, "FN": true - correct}
    found = {name: 100 * part / union for name, part in shares.items()}
    if absent == "zero":
        found = {name: share.nan_to_num() for name, share in found.items()}
    return {
        "mIoU": found["IoU"].nanmean(),
        "fwIoU": (true * found["IoU"].nan_to_num()).sum() / counts.sum(),
        "aAcc": 100 * correct.sum() / counts.sum(),
        "mAcc": (100 * correct / true).nanmean(),
        "FP": found["FP"].nanmean(),
        "FN": found["FN"].nanmean(),
        "IoU": found["IoU"],
        "matrix": matrix.cpu(),
    }


class ThresholdSweep(Metric):
    """Confusion matrices for many thresholds at once, where background is what no class's score exceeds.

    A pixel is counted once, by the thresholds that its highest score exceeds, its true class and the class of
    that score; the matrices of all thresholds are cumulative sums. Those of all processes are added.

    Args:
        num_classes: with the background, id 0.
        threshold: the one whose scores are reported; it need not be among the thresholds.
        thresholds: among which the best is looked for on the scored labels themselves, as the published
            numbers of DiffSegmenter are.
        absent: see matrix_scores.
    """

    full_state_update = False

    def __init__(
        self,
        num_classes: int,
        threshold: float,
        thresholds: Sequence[float] = SWEEP,
        absent: Literal["skip", "zero"] = "skip",
    ):
        super().__init__()
        self.num_classes, self.threshold, self.absent = num_classes, threshold, absent
        self.thresholds, self.swept = sorted({threshold, *thresholds}), sorted(thresholds)
        shape = (len(self.thresholds) + 1, num_classes, num_classes)
        self.add_state("counts", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, score: Tensor, prediction: Tensor, label: Tensor) -> None:
        """Count pixels.

        Args:
            score: the highest of the classes' scores, in [0, 1].
            prediction: its class. label: the true class, 255 is left out. All of one shape.

        Raises:
            ValueError: see ConfusionMatrix.update.
        """
        check_ids(prediction, label, self.num_classes)
        exceeded = torch.searchsorted(score.new_tensor(self.thresholds), score.contiguous())
        cells = (exceeded * self.num_classes + label) * self.num_classes + prediction
        self.counts += torch.bincount(cells[label != IGNORE_INDEX], minlength=self.counts.numel()).view_as(
            self.counts
        )

    def matrices(self) -> Tensor:
        """Confusion matrices [thresholds, classes, classes]."""
        above = self.counts.flip(0).cumsum(0).flip(0)[1:]  # score > threshold
        below = self.counts.cumsum(0)[:-1].sum(2)
        found = above.clone()
        found[:, :, 0] += below
        return found

    def compute(self) -> dict[str, Tensor]:
        """Return the scores at the threshold; mIoU_oracle and threshold_oracle are those of the best one."""
        found = [matrix_scores(matrix, self.absent) for matrix in self.matrices()]
        by_threshold = dict(zip(self.thresholds, found, strict=True))
        means = torch.stack([by_threshold[threshold]["mIoU"] for threshold in self.swept])
        best = int(means.argmax())
        return by_threshold[self.threshold] | {
            "mIoU_oracle": means[best],
            "threshold_oracle": torch.tensor(self.swept[best]),
        }


def check_ids(prediction: Tensor, label: Tensor, num_classes: int) -> None:
    """Raise a ValueError for a label that is neither a class nor 255 and a prediction that is no class."""
    outside = {
        "label": (label >= num_classes) & (label != IGNORE_INDEX),
        "prediction": prediction >= num_classes,
    }
    if (outside["label"] | outside["prediction"]).any():
        name, ids = ("label", label) if outside["label"].any() else ("prediction", prediction)
        raise ValueError(
            f"A {name} holds a class that the table does not: found ids {ids.unique().tolist()} with "
            f"{num_classes} classes. Give labels and network the class table of the model."
        )
