"""Scores of a segmentation from one confusion matrix over a whole set: the papers' mIoU."""

from collections.abc import Sequence
from typing import Literal
from warnings import warn

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
        self.matrix += pixel_counts(prediction, label, self.num_classes)

    def compute(self) -> dict[str, Tensor]:
        """Return the scores of the matrix, see matrix_scores."""
        return matrix_scores(self.matrix, self.absent)


def pixel_counts(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Confusion matrix [classes, classes] of ids of the same shape; rows are the truth, 255 is left out.

    Raises:
        ValueError: see ConfusionMatrix.update.
    """
    check_ids(prediction, label, num_classes)
    cells = (label * num_classes + prediction).masked_fill(label == IGNORE_INDEX, num_classes**2)
    counts = torch.bincount(cells.flatten(), minlength=num_classes**2 + 1)
    return counts[:-1].view(num_classes, num_classes)


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


class FewShotScores(Metric):
    """Scores of binary masks of episodes, from sums over the episodes of each class.

    Args:
        class_ids: the data set's ids of the classes that episodes ask for.
    """

    full_state_update = False

    def __init__(self, class_ids: Sequence[int]):
        super().__init__()
        self.class_ids = list(class_ids)
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, prediction: Tensor, label: Tensor, class_id: Tensor, episode: Tensor) -> None:
        """Count the pixels of episodes.

        Args:
            prediction: masks [B, H, W], 1 is the object.
            label: true masks [B, H, W], 255 is left out.
            class_id, episode: class and number of each episode, [B].

        Raises:
            ValueError: a mask holds something else, or a class is not among those that are scored.
        """
        check_ids(prediction, label, 2)
        if unknown := sorted(set(class_id.tolist()) - set(self.class_ids)):
            raise ValueError(
                f"An episode is of a class that is not scored: found the ids {unknown}, known are "
                f"{self.class_ids}. Give episodes of the fold's novel classes."
            )
        cells = [((label == true) & (prediction == found)).sum((1, 2)) for true in (0, 1) for found in (0, 1)]
        self.rows.append(torch.stack([episode, class_id, *cells], 1))

    def compute(self) -> dict[str, Tensor]:
        """Return scores in percent.

        Returns:
            IoU [classes] of the summed pixels of a class's episodes, NaN for a class without any; mIoU, their
            mean over the classes that were drawn; FB-IoU, the mean of the IoUs of object and of all else over
            all episodes; matrix [2, 2] of pixels, rows are the truth; and episodes int64 [N, 6], in the order
            of their numbers: number, class, and the matrix of each.
        """
        rows = torch.cat(self.rows) if isinstance(self.rows, list) else self.rows
        rows = rows[rows[:, 0].argsort(stable=True)].cpu()
        # The reference code counts a class that was never drawn as 0; here it is left out, and told.
        missing = sorted(set(self.class_ids) - set(rows[:, 1].tolist()))
        if missing:
            warn(f"No episode asks for the classes {missing}: they do not count in mIoU.", stacklevel=2)
        ious = torch.stack([binary_ious(rows[rows[:, 1] == c, 2:].sum(0))[1] for c in self.class_ids])
        ious[[c in missing for c in self.class_ids]] = torch.nan
        total = rows[:, 2:].sum(0)
        return {
            "mIoU": ious.nanmean(),
            "FB-IoU": binary_ious(total).mean(),
            "IoU": ious,
            "matrix": total.view(2, 2),
            "episodes": rows,
        }


def binary_ious(cells: Tensor) -> Tensor:
    """IoU in percent of all else and of the object, [2], of a matrix's cells [4]; 0 of an empty union."""
    wrong = cells[1] + cells[2]
    correct = cells[[0, 3]].double()
    return 100 * correct / (correct + wrong).clamp(min=1)
