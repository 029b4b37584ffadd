"""Losses: the usual cross entropy, and those of MADM (arXiv 2410.21708) and DIFF.

The divisors of the latter count ignored pixels and masked cells too.
"""

import torch.nn.functional as F
from torch import Tensor

from functional.classes import IGNORE_INDEX


def pixel_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Cross entropy averaged over the valid pixels; 0, with zero gradients, where there are none.

    Args:
        logits: [B, C, H, W].
        label: [B, H, W], 255 ignored.
    """
    loss = F.cross_entropy(logits.float(), label, ignore_index=IGNORE_INDEX, reduction="sum")
    return loss / (label != IGNORE_INDEX).sum().clamp(min=1)


def weighted_cross_entropy(logits: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum of the weighted cross entropies of the valid pixels over the number of all pixels.

    Args:
        logits: [B, C, H, W].
        label: [B, H, W], 255 ignored.
        weight: [B, H, W]; None is one everywhere.
    """
    losses = F.cross_entropy(logits.float(), label, ignore_index=IGNORE_INDEX, reduction="none")
    return (losses if weight is None else weight * losses).mean()


def regression_mask(label: Tensor, quality: Tensor | None = None) -> Tensor:
    """Weights [B, H, W] of the latent regression: 0 where ignored, else 1 or the image's quality [B].

    Unlike in the cross entropy, the quality of the pseudo labels weighs pixels pasted from the source too.
    """
    valid = (label != IGNORE_INDEX).float()
    return valid if quality is None else quality[:, None, None] * valid


def latent_regression(latent: Tensor, target: Tensor, mask: Tensor, factor: int) -> Tensor:
    """Masked L1 distance of two latents over the number of all their elements, in float32.

    Args:
        latent, target: [B, 4, h, w].
        mask: [B, H, W], weights at the size of the image. A cell takes that of its first pixel; cells beyond
            the image, where it was padded, take none.
        factor: image pixels per latent pixel.
    """
    weights = mask[:, ::factor, ::factor]
    rows, columns = (a - b for a, b in zip(latent.shape[-2:], weights.shape[-2:], strict=True))
    weights = F.pad(weights, (0, columns, 0, rows))
    return (weights[:, None] * (latent.float() - target.float()).abs()).mean()
