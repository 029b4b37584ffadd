"""Control pictures for a ControlNet (arXiv 2302.05543) from exact label maps: class colours and edges.

Those of DifFSS (arXiv 2307.00773) show one class of an image: an ADE20K colour (`seg`), or the edges that a
detector finds in the image near it (`hed`, `scribble`). All instances of the class are one region.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
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


def generation_size(height: int, width: int, short_side: int = 512, multiple: int = 64) -> tuple[int, int]:
    """Height and width at which a picture for an image of this size is drawn.

    The shorter side becomes `short_side`, then both are rounded to multiples (half to even). So the ratio
    changes a little, which does no harm: the control is resized in the same way, and the picture back.
    """
    scale = short_side / min(height, width)
    sides = (max(1, round(side * scale / multiple)) * multiple for side in (height, width))
    return tuple(sides)


def resize_nearest(label: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize [H, W] by repeating or leaving out rows and columns, as OpenCV's INTER_NEAREST does."""
    rows, columns = (
        torch.arange(new, device=label.device) * old // new
        for new, old in zip(size, label.shape, strict=True)
    )
    return label[rows[:, None], columns]


def seg_image(mask: Tensor, color: tuple[int, int, int], background: tuple[int, int, int]) -> Tensor:
    """A class in its ADE20K colour on that of the background, see functional.ade20k.

    Args:
        mask: bool [H, W], true where the class is.
        color, background: RGB, 0..255.

    Returns:
        [1, 3, H, W] float32 in [0, 1].
    """
    return mask_image(mask.long(), [background, color])


def ellipse(side: int) -> Tensor:
    """The filled ellipse of OpenCV's getStructuringElement, bool [side, side]."""
    radius = side // 2
    element = torch.zeros(side, side, dtype=torch.bool)
    for row in range(side):
        reach = round(side // 2 * np.sqrt(max(0, radius**2 - (row - radius) ** 2)) / radius)
        element[row, max(0, radius - reach) : radius + reach + 1] = True
    return element


def dilate(mask: Tensor, element: Tensor) -> Tensor:
    """A mask, bool [H, W], grown by a structuring element whose centre is at (side // 2, side // 2).

    An even element is not symmetric about it: one of 14 rows reaches 6 up and 7 down.
    """
    side = len(element)
    before = side // 2
    padded = F.pad(mask[None, None].float(), (before, side - 1 - before) * 2)
    return F.conv2d(padded, element[None, None].to(padded))[0, 0] > 0.5


def hed_image(edges: Tensor, mask: Tensor) -> Tensor:
    """A detector's edges within the dilated mask: those of the object and of a rim of 6 to 7 pixels.

    The mask is dilated once by an ellipse of 14 pixels: the authors' code seems to ask for 10 times, but its
    10 is another argument of OpenCV's function, without effect.

    Args:
        edges: uint8 [H, W], 255 is an edge.
        mask: bool [H, W], true where the class is.

    Returns:
        [1, 3, H, W] float32 in [0, 1].
    """
    kept = edges.float() * dilate(mask, ellipse(14))
    return kept.div(255).expand(1, 3, -1, -1).contiguous()


def scribble_image(edges: Tensor, mask: Tensor) -> Tensor:
    """As hed_image, but 1 where an edge is above 127, and 0 elsewhere."""
    return hed_image((edges > 127) * 255, mask)


def _batched(label: Tensor) -> Tensor:
    if label.ndim not in (2, 3) or label.is_floating_point():
        raise ValueError(
            f"A control picture is made of integer class ids [H, W] or [B, H, W]: found {label.dtype} of "
            f"shape {list(label.shape)}. Give the label map itself, not logits or a picture."
        )
    return label if label.ndim == 3 else label[None]
