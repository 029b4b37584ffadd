"""How an image is segmented: whole, in windows, at several scales, mirrored; as mmsegmentation does it."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from math import inf

import torch.nn.functional as F
from torch import Tensor

Predict = Callable[[Tensor], Tensor]  # image [B, 3, h, w] of any size -> logits [B, C, h, w]


def segment_image(
    predict: Predict,
    image: Tensor,
    window: Sequence[int] | None = None,
    window_stride: Sequence[int] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Tensor:
    """Scores [B, C, H, W], whose argmax is the class, of an image [B, 3, H, W]; by default predict(image).

    With scales or flip they are probabilities, else logits. With a window, each scaled and each mirrored
    image is seen in windows; None as the stride is half of it.
    """
    if window is not None:
        predict = partial(sliding_window, predict, window=window, stride=window_stride or half(window))
    if flip or list(scales) != [1]:
        return scaled_and_flipped(predict, image, scales, flip)
    return predict(image)


def half(window: Sequence[int]) -> list[int]:
    """The stride at which half of a window (height, width) overlaps the next one."""
    return [max(side // 2, 1) for side in window]


def sliding_window(predict: Predict, image: Tensor, window: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Mean of the logits over all windows that see a pixel.

    Args:
        predict: is given one window of the whole batch at a time.
        image: [B, 3, H, W]; a side shorter than the window's is used whole.
        window: (height, width).
        stride: (vertical, horizontal) step between windows; the last ones are moved back to the edge.

    Returns:
        Logits [B, C, H, W].

    Raises:
        ValueError: see check_window.
    """
    check_window(window, stride)
    size, total = image.shape[-2:], None
    count = image.new_zeros(size)
    # A last start before 0 is that of an image smaller than the window.
    starts = [
        [min(start, max(side - w, 0)) for start in range(0, max(side - w, 0) + s, s)]
        for side, w, s in zip(size, window, stride, strict=True)
    ]
    for top, left in product(*starts):
        area = (..., slice(top, top + window[0]), slice(left, left + window[1]))
        logits = predict(image[area])
        if total is None:
            total = image.new_zeros(*logits.shape[:2], *size)
        total[area] += logits
        count[area] += 1
    return total.div_(count)


def scaled_and_flipped(predict: Predict, image: Tensor, scales: Sequence[float], flip: bool) -> Tensor:
    """Mean of the probabilities over scales and, with `flip`, over the image and its mirror image.

    Args:
        predict: must take images of any size.
        image: [B, 3, H, W], resized bilinearly by each scale; its logits are resized back.
        scales: factors of both sides; 1 is the image as it is.
        flip: whether to see each scale mirrored left to right too.

    Returns:
        Probabilities [B, C, H, W], not logits: their logarithm could be -inf, which cannot be resized.

    Raises:
        ValueError: see check_scales.
    """
    check_scales(scales)
    size = image.shape[-2:]
    total = 0
    for scale in scales:
        scaled = resize(image, [max(int(scale * side + 0.5), 1) for side in size])
        total = total + resize(predict(scaled), size).softmax(1)
        if flip:
            total = total + resize(predict(scaled.flip(-1)).flip(-1), size).softmax(1)
    return total / (len(scales) * (2 if flip else 1))


def resize(image: Tensor, size: Sequence[int]) -> Tensor:
    """Resize [B, C, h, w] bilinearly to a size (height, width), in float32."""
    return F.interpolate(image.float(), size=tuple(size), mode="bilinear", align_corners=False)


def check_window(window: Sequence[int], stride: Sequence[int]) -> None:
    """Raise a ValueError for a window without pixels, and for a stride that is not 1 to the window's side."""
    if not all(1 <= step <= side for side, step in zip(window, stride, strict=True)):
        raise ValueError(
            "A window needs a height and a width of at least 1 and strides from 1 to these, or it leaves "
            f"pixels out: found window {list(window)} and stride {list(stride)}. Set both in pixels."
        )


def check_scales(scales: Sequence[float]) -> None:
    """Raise a ValueError for no scales, and for one that is not a number above 0."""
    if not scales or not all(0 < scale < inf for scale in scales):
        raise ValueError(
            f"Scales are one or more numbers above 0: found {list(scales)}. 1 is the image's size."
        )
