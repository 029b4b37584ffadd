"""Pseudo labels of a teacher and how far they are trusted (DAFormer, arXiv 2111.14887; MADM)."""

from torch import Tensor


def label_quality(confidence: Tensor, threshold: float) -> Tensor:
    """Share q [B] of each image's pixels whose confidence [B, H, W] reaches the threshold."""
    return (confidence >= threshold).float().mean((1, 2))


def pseudo_labels(logits: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Most likely ids [B, H, W] of all pixels, also doubtful ones, and the quality [B] of each image's.

    Args:
        logits: [B, C, H, W].
        threshold: of the probability, included; 0.968 in the papers.
    """
    confidence, ids = logits.float().softmax(1).max(1)
    return ids, label_quality(confidence, threshold)
