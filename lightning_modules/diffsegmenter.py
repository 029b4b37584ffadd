"""DiffSegmenter (arXiv 2309.02773) on data sets and images: it scores and predicts, and is never trained."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from functional.sliding_window import segment_image
from lightning_modules.base import SegmentationModule
from lightning_modules.metrics import ConfusionMatrix, ThresholdSweep
from models.candidates import AllCandidates, Candidates, LabelCandidates
from models.captions import Captioner
from models.diffsegmenter import DiffSegmenter, best_class, label_map, with_background


class DiffSegmenterPrediction(SegmentationModule):
    """Labels images by the score maps of the classes that they are believed to show.

    Where the class table has a background, `val/<set>/mIoU_oracle` is the mIoU at the best of 45 thresholds,
    `val/<set>/threshold_oracle`, chosen on the scored labels themselves as for the published numbers.

    Args:
        network: gives the score maps.
        classes: name of the class table; or words, which make a table of their own.
        candidates: "all" classes; "labels", those in an image's label (an oracle, for ablations); or an
            object that knows, see models.candidates.
        captioner: writes on in the prompt of each class what it sees in the image; None leaves prompts bare.
        threshold: background is where no map is above it.
        absent: what a class without true and predicted pixels counts, see matrix_scores.
    """

    trains = False
    scores = (*SegmentationModule.scores, "FP", "FN")

    def __init__(
        self,
        network: DiffSegmenter,
        classes: str | Sequence[str],
        candidates: Literal["all", "labels"] | Candidates = "all",
        captioner: Captioner | None = None,
        threshold: float = 0.5,
        absent: Literal["skip", "zero"] = "skip",
    ):
        super().__init__(network, classes)
        known = {"all": AllCandidates(), "labels": LabelCandidates()}
        if isinstance(candidates, str) and candidates not in known:
            raise ValueError(
                f"candidates: {candidates!r} is not known. Choose all, labels or an object of "
                "models.candidates."
            )
        self.candidates = known[candidates] if isinstance(candidates, str) else candidates
        self.captioner, self.threshold, self.absent = captioner, threshold, absent
        filtering = getattr(self.candidates, "captioner", None)
        if captioner is not None and filtering is not None and filtering.path == captioner.path:
            self.candidates.captioner = captioner  # one BLIP, which sees each image once
        if self.classes.has_background:
            self.scores = (*self.scores, "mIoU_oracle", "threshold_oracle")

    @property
    def terms(self) -> dict[str, str]:
        """Where the candidates come from."""
        of = type(self.candidates).__name__
        return {
            "candidates": "labels (oracle)"
            if of == "LabelCandidates"
            else of.removesuffix("Candidates").lower()
        }

    def setup(self, stage: str) -> None:
        """Refuse training.

        Raises:
            ValueError: stage is "fit"; or a test asks for windows, scales or mirror images.
        """
        if stage == "fit":
            raise ValueError(
                "DiffSegmenter has nothing to train: found a call of fit. Score it with `python test.py "
                "--config FILE`, or predict with `python predict.py --config FILE --input PATH`."
            )
        if self.protocol is not segment_image:
            raise ValueError(
                "DiffSegmenter stretches the maps of a whole image, so windows, scales and mirror images are "
                "not for it: found one of --window, --scales and --flip. Leave them out."
            )

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        raise NotImplementedError("DiffSegmenter has nothing to train.")

    def score_maps(self, batch: dict) -> list[tuple[list[int], Tensor]]:
        """Return for each image the ids of its candidates and their maps [n, H, W].

        The maps have the size of the label where there is one, else of the image.
        """
        size = batch["label"].shape[-2:] if "label" in batch else None
        candidates, found = self.candidates(batch, self.classes), []
        for image, name, ids in zip(batch["image"], batch["name"], candidates, strict=True):
            words = [self.classes.words[i] for i in ids]
            captions = None
            if self.captioner is not None and words:
                captions = self.captioner(image, name, [self.network.prompt.start(word) for word in words])
            found.append((ids, self.network.score_maps(image, name, words, captions, size)))
        return found

    def labels(self, found: list[tuple[list[int], Tensor]]) -> Tensor:
        """Return class ids [B, H, W] by the score maps of each image."""
        return torch.stack([label_map(maps, ids, self.classes, self.threshold) for ids, maps in found])

    def predict_step(self, batch: dict, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the class ids [B, H, W] of a batch's images."""
        return self.labels(self.score_maps(batch))

    def metric(self) -> Metric:
        if self.classes.has_background:
            return ThresholdSweep(len(self.classes), self.threshold, absent=self.absent)
        return ConfusionMatrix(len(self.classes), self.absent)

    def score(self, batch: dict, batch_idx: int, dataloader_idx: int) -> Tensor:
        table, metric = self.classes, list(self.matrices.values())[dataloader_idx]
        found = [best_class(maps, ids, table) for ids, maps in self.score_maps(batch)]
        score, label = map(torch.stack, zip(*found, strict=True))
        prediction = with_background(score, label, table, self.threshold)
        metric.update(*((score, label) if table.has_background else (prediction,)), batch["label"])
        return prediction
