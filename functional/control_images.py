"""Control pictures for a ControlNet (arXiv 2302.05543) from exact label maps: class colours and edges."""

from collections.abc import Sequence

import torch
from torch import Tensor

from functional.palette import colorize


def mask_image(label: Tensor, colors: Sequence[tuple[int, int, int]]) -> Tensor:
    """Each pixel in the colour of its class; ignored pixels (255) are white.

    Args:
        label: class ids, [H, W] or [B, H, W].
        colors: RGB (0..255) of each id, as those of a class table.

    Returns:
        [B, 3, H, W] float32 in [0, 1] on the label's device; B is 1 for one label.

    Raises:
        ValueError: no label map, or an id without a colour.
    """
    colored = torch.from_numpy(colorize(_batched(label).cpu().numpy(), colors))
    return colored.permute(0, 3, 1, 2).to(label.device, torch.float32).div(255).contiguous()


def edge_image(label: Tensor) -> Tensor:
    """White lines on black where the class changes: the edges of an exact label, in place of a detector's.

    A pixel is white if a pixel above, below, left or right of it has another id. So both sides of an edge
    are marked: lines are two pixels wide, flips and quarter turns commute with the function, and the frame
    of the picture is no edge. 255 (ignored) is an id like any other.

    Args:
        label: class ids, [H, W] or [B, H, W].

    Returns:
        [B, 3, H, W] float32, 0 or 1, on the label's device; B is 1 for one label.

    Raises:
        ValueError: no label map.
    """
    label = _batched(label)
    edge = torch.zeros_like(label, dtype=torch.bool)
    down, across = label[:, 1:] != label[:, :-1], label[:, :, 1:] != label[:, :, :-1]
    edge[:, 1:] |= down
    edge[:, :-1] |= down
    edge[:, :, 1:] |= across
    edge[:, :, :-1] |= across
    return edge[:, None].float().repeat(1, 3, 1, 1)


def _batched(label: Tensor) -> Tensor:
    if label.ndim not in (2, 3) or label.is_floating_point():
        raise ValueError(
            f"A control picture is made of integer class ids [H, W] or [B, H, W]: found {label.dtype} of "
            f"shape {list(label.shape)}. Give the label map itself, not logits or a picture."
        )
    return label if label.ndim == 3 else label[None]
