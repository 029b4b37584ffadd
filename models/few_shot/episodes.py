"""What a few-shot network is given: queries, and for each some supports with the mask of the object."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Episodes:
    """B few-shot tasks of K supports each; where a support came from is not told.

    Args:
        query: images in which the object is looked for, [B, 3, H, W] RGB in [0, 1].
        supports: images that show it, [B, K, 3, H, W] RGB in [0, 1].
        masks: of the supports, int64 [B, K, H, W]: 1 the object, 0 all else, 255 ignored.
        weights: how much each support counts, [B, K] >= 0; 1 for a real one.
        label: the query's mask, int64 [B, H, W], for losses.
        base_label: the query's classes as a base learner numbers them, int64 [B, H, W]: 0 is background, 255
            ignored.
        base_class: the number that a base learner gives the episode's class, int64 [B]; 0 if it has none.
    """

    query: Tensor
    supports: Tensor
    masks: Tensor
    weights: Tensor
    label: Tensor | None = None
    base_label: Tensor | None = None
    base_class: Tensor | None = None
