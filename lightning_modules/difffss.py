"""Few-shot networks in training and test, with and without DifFSS's supports (arXiv 2307.00773)."""

import csv
from collections.abc import Callable
from io import StringIO
from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchmetrics import Metric

from functional.sliding_window import segment_image
from lightning_modules.base import SegmentationModule
from lightning_modules.metrics import FewShotScores
from models.few_shot.episodes import Episodes


class DifFSS(SegmentationModule):
    """Trains a few-shot network on the episodes of base classes and scores it on those of novel ones.

    DifFSS changes nothing here: the auxiliary supports come with the batches, in the data's `supports` and
    `eval_supports`. Each evaluation set logs `mIoU` and `FB-IoU` of its episodes and the IoU of each class.

    Args:
        network: a host, such as models.few_shot.hsnet.HSNet, with `losses` and `predict` of episodes.
        lr: base learning rate.
        weight_decay: L2 penalty, as the hosts' papers have it.
        optimizer: "sgd" (BAM, PFENet) or "adam" (HSNet).
        schedule, lr_multipliers: see SegmentationModule.
    """

    mean_scores = ("mIoU", "FB-IoU")
    scores = ()

    def __init__(
        self,
        network: nn.Module,
        lr: float = 5e-2,
        weight_decay: float = 1e-4,
        optimizer: Literal["adamw", "adam", "sgd"] = "sgd",
        schedule: Callable[[int, int], float] | None = None,
        lr_multipliers: dict[str, float] | None = None,
    ):
        super().__init__(network, "few_shot", lr, weight_decay, schedule, lr_multipliers, optimizer=optimizer)
        self.channel_check.remove()  # a host gives losses and masks, and logits in shapes of its own
        self.asked_classes: dict[int, str] = {}  # of the running or latest evaluation, by id

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        losses = self.network.losses(episodes(batch))
        self.log("train/loss", losses["loss"].detach(), prog_bar=True)
        self.log_dict({f"train/{name}": loss.detach() for name, loss in losses.items() if name != "loss"})
        return losses["loss"]

    def start_scoring(self, stage: str) -> None:
        self.asked_classes = self.trainer.datamodule.eval_classes(stage)
        super().start_scoring(stage)

    @property
    def scored_names(self) -> list[str]:
        return list(self.asked_classes.values())

    def metric(self) -> Metric:
        return FewShotScores(list(self.asked_classes))

    def predict_step(self, batch: dict, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the masks [B, H, W] of a batch's queries, 1 is the object, at the size of their labels.

        Where the queries were padded and "valid_size" says how far they reach, the padding is cut off before.

        Raises:
            ValueError: the batch holds images alone, or windows, scales or mirror images are asked for.
        """
        if "support_image" not in batch or self.protocol is not segment_image:
            found = "windows, scales or flips" if "support_image" in batch else "images without supports"
            raise ValueError(
                f"A few-shot network predicts whole episodes: found {found}. Score them by test.py without "
                "--window, --scales and --flip; in Python, give network.predict the query, its supports and "
                "their masks as models.few_shot.episodes.Episodes."
            )
        size, valid = batch["label"].shape[-2:], batch.get("valid_size")

        def at_label(logits: Tensor) -> Tensor:
            if valid is not None:
                height, width = valid[0].tolist()  # such batches are of one query
                logits = logits[..., :height, :width]
            if logits.shape[-2:] == size:
                return logits
            return interpolate(logits, size=size, mode="bilinear", align_corners=True)

        return self.network.predict(episodes(batch), at_label)

    def score(self, batch: dict, batch_idx: int, dataloader_idx: int) -> Tensor:
        mask = self.predict_step(batch, batch_idx)
        scores = list(self.matrices.values())[dataloader_idx]
        scores.update(mask, batch["label"], batch["class_id"], batch["episode"])
        return mask

    def details(self) -> dict[str, str]:
        """The counted pixels of each episode, with which two tests can be compared episode by episode."""
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(
            ["set", "episode", "class", "true_negative", "false_positive", "false_negative", "true_positive"]
        )
        for name, scores in self.matrices.items():
            writer.writerows([name, *row] for row in scores.compute()["episodes"].tolist())
        return super().details() | {"episodes.csv": text.getvalue()}

    def image_names(self, batch: dict) -> list[str]:
        """Episodes may share a query, so their numbers belong to the names."""
        pairs = zip(batch["episode"].tolist(), batch["name"], strict=True)
        return [f"episode {number:06d} {name}" for number, name in pairs]

    def image_score(self, scores: dict[str, Tensor]) -> Tensor:
        """The IoU of the object."""
        return scores["IoU"][1]


def episodes(batch: dict) -> Episodes:
    """Return what a network is told of a batch."""
    return Episodes(
        query=batch["image"],
        supports=batch["support_image"],
        masks=batch["support_label"],
        weights=batch["support_weight"],
        label=batch["label"],
        base_label=batch.get("base_label"),
        base_class=batch.get("base_class"),
    )
