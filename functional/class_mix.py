"""Mixing of a source and a target image by classes, and the augmentation of the mixed one (DACS, MADM).

Random numbers come from a generator on the CPU, image by image, so that a larger batch means the same and no
device is waited for.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

GREY = (0.2989, 0.587, 0.114)  # weights of red, green, blue


def mix_mask(label: Tensor, generator: Generator) -> Tensor:
    """Where to paste the source: ceil(n / 2) of the n values in each label, chosen uniformly (ClassMix).

    Args:
        label: source label [B, H, W]; ignored pixels (255) are one of the values.
        generator: on the CPU.

    Returns:
        bool [B, H, W].
    """
    values = label.flatten(1)
    present = torch.zeros(len(label), 256, dtype=torch.bool, device=label.device).scatter_(1, values, True)
    keys = torch.rand(len(label), 256, generator=generator).to(label.device, non_blocking=True)
    order = keys.masked_fill(~present, 2.0).argsort(1).argsort(1)  # absent values come last
    chosen = order < (present.sum(1, keepdim=True) + 1) // 2
    return chosen.gather(1, values).view_as(label)


def paste(mask: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Source where the mask [B, H, W] is set, else target; both images [B, C, H, W] or labels [B, H, W]."""
    return torch.where(mask if source.ndim == 3 else mask[:, None], source, target)


def mixed_weights(mask: Tensor, quality: Tensor) -> Tensor:
    """Weights [B, H, W] of the mixed label: 1 on the mask, else the quality [B] of the pseudo label."""
    return torch.where(mask, 1.0, quality[:, None, None])


def jitter_and_blur(image: Tensor, generator: Generator) -> Tensor:
    """Colour jitter with probability 0.8 and Gaussian blur with probability 0.5, drawn for each image.

    Brightness, contrast and saturation have factors in [0.8, 1.2], hue turns by up to 0.2 of the circle, in
    random order; the meaning is torchvision's. Sigma is in [0.15, 1.15] pixels.

    Args:
        image: [B, 3, H, W] in [0, 1].
        generator: on the CPU.

    Returns:
        [B, 3, H, W] in [0, 1].
    """
    with torch.autocast(image.device.type, enabled=False):  # images are not blurred in half precision
        return torch.stack([augment(one, generator) for one in image])


def augment(image: Tensor, generator: Generator) -> Tensor:
    """jitter_and_blur of one image [3, H, W]; the same number of draws whatever they decide."""
    jitters, blurs, sigma, *amounts = torch.rand(7, generator=generator).tolist()
    order = torch.randperm(4, generator=generator).tolist()
    if jitters > 0.2:
        for step in order:
            amount = 0.4 * amounts[step] - 0.2
            image = shift_hue(image, amount) if step == 3 else blend(image, step, 1 + amount)
    if blurs > 0.5:
        image = gaussian_blur(image, 0.15 + sigma)
    return image.clamp(0, 1)


def blend(image: Tensor, step: int, factor: float) -> Tensor:
    """Brightness (step 0), contrast (1), saturation (2): move off black, the mean grey, each pixel's grey."""
    grey = sum(weight * channel for weight, channel in zip(GREY, image, strict=True))
    other = (torch.zeros_like(grey), grey.mean(), grey)[step]
    return (factor * image + (1 - factor) * other).clamp(0, 1)


def shift_hue(image: Tensor, turn: float) -> Tensor:
    """Rotate the hue of an image [3, H, W] by a share of the circle; HSV value and saturation stay."""
    red, green, blue = image
    value = image.amax(0)
    chroma = value - image.amin(0)
    divisor = torch.where(chroma == 0, 1.0, chroma)
    sixths = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    positions = torch.stack([(start + sixths + 6 * turn) % 6 for start in (5, 3, 1)])  # of red, green, blue
    return value - chroma * torch.minimum(positions, 4 - positions).clamp(0, 1)


def blur_kernel(size: int) -> int:
    """Length of the blur's kernel along an axis of this size: a tenth, rounded up, made odd downwards."""
    tenth = -(-size // 10)
    return tenth - 1 + tenth % 2


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Blur an image [3, H, W] along both axes with reflected borders."""
    for axis in (1, 2):
        radius = blur_kernel(image.shape[axis]) // 2
        offsets = torch.arange(-radius, radius + 1, device=image.device, dtype=image.dtype)
        weights = (-0.5 * (offsets / sigma).square()).exp()
        line = image.transpose(axis, 2)
        padded = F.pad(line, (radius, radius), mode="reflect")
        kernel = (weights / weights.sum()).view(1, 1, 1, -1)
        image = F.conv2d(padded[:, None], kernel)[:, 0].transpose(axis, 2)
    return image
