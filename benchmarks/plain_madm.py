"""MADM's training step in the order of the released code (arXiv 2410.21708), with its formulae written out.

It is what lightning_modules.madm is measured and tested against: all losses are added up before the one
backward pass, so that the graphs of source and mixed image are alive together.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from functional.class_mix import jitter_and_blur, mix_mask
from functional.noise import named_generator
from lightning_modules.madm import MADMTraining

# Latents of several batches of images, one each, as MADMTraining.encode gives them.
Encode = Callable[..., Sequence[Tensor | None]]


def cross_entropy(logits: Tensor, label: Tensor, weight: Tensor | float) -> Tensor:
    """Weighted sum over the valid pixels over the number of all pixels."""
    valid = label != 255
    log_p = logits.log_softmax(1).gather(1, label.where(valid, 0)[:, None])[:, 0]
    return -(weight * log_p * valid).sum() / label.numel()


def regression(latent: Tensor, goal: Tensor, label: Tensor, quality: Tensor | float) -> Tensor:
    """L1 distance weighted by a mask that takes each cell's first pixel, over the number of all elements."""
    mask = F.interpolate(((label != 255) * quality)[:, None].float(), size=latent.shape[-2:])
    return (mask * (latent - goal).abs()).sum() / latent.numel()


def plain_loss(
    module: MADMTraining, image: Tensor, label: Tensor, target: Tensor, generator: Generator, encode: Encode
) -> Tensor:
    """The sum of all losses of a micro-batch; arguments as in MADMTraining.accumulate.

    The released code runs the teacher after the mixed image, which changes nothing but what dropout draws.
    """
    network, factors, timestep = module.network, module.regression, module.timestep(generator)
    colors = torch.tensor([*module.classes.colors], device=image.device)
    table = F.pad(colors / 255, (0, 0, 0, 256 - len(colors)))

    def color(name, label):
        return [table[label].permute(0, 3, 1, 2)] if factors[name] else []

    latent, *goal, target_latent = encode(image, *color("source", label), target)
    source = network.student(image, latent=latent)
    mask = mix_mask(label, generator)
    mixed = jitter_and_blur(torch.where(mask[:, None], image, target), generator)
    with torch.no_grad():
        confidence, found = network.teacher(target, timestep, target_latent).logits.softmax(1).max(1)
    quality = (confidence >= module.threshold).float().mean((1, 2))[:, None, None]
    mixed_label = torch.where(mask, label, found)
    latent, *mixed_goal = encode(mixed, *color("mixed", mixed_label))
    student = network.student(mixed, latent=latent)
    loss = cross_entropy(source.logits, label, 1.0)
    loss = loss + cross_entropy(student.logits, mixed_label, torch.where(mask, 1.0, quality))
    if goal:
        loss = loss + factors["source"] * regression(source.latent, *goal, label, 1.0)
    if mixed_goal:
        loss = loss + factors["mixed"] * regression(student.latent, *mixed_goal, mixed_label, quality)
    return loss


def plain_backward(module: MADMTraining, batch: dict, encode: Encode | None = None) -> None:
    """Add the gradients of a batch of MADMTraining to those of the parameters.

    Args:
        encode: None encodes each kind of image by a call of its own, as the released code does: five calls.
    """

    def one_by_one(*images):
        return [module.encode(one)[0] for one in images]

    for part, piece in enumerate(module.parts(batch)):
        generator = named_generator(f"step {module.global_step} part {part}", module.seed)
        loss = plain_loss(module, *piece, generator, encode or one_by_one)
        (loss / module.micro_batches).backward()
