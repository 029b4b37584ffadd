"""DIFF's features in the order of the released code (arXiv 2406.00777): what must be equalled.

One pass per branch, each with a VAE call of its own; in every step a row with the negative prompt, one with
the prompt and one per class in the batch; the whole path, also after the last saved step; all features kept,
those of the deepest block included, and concatenated. (Its dead parts that cost little, the bottleneck of the
deepest block and the calls of the text encoder, are left out.)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.diff import BLOCKS, DIFF, DIFFBackbone, block_taps
from models.diffusion.features import record_features
from models.diffusion.inversion import stochastic_step, window_eta


@torch.no_grad()
def plain_features(
    backbone: DIFFBackbone,
    image: Tensor,
    label: Tensor | None,
    sample: Tensor,
    fresh: Callable[[int, int], Tensor],
) -> dict[int, Tensor]:
    """Concatenated features [B, layers * steps * C, h, w] of each block that is fused, float32.

    Args:
        image: [B, 3, H, W] in [0, 1], H and W multiples of the model's stride.
        label: [B, H, W] of the conditional branch, None for the unconditional one.
        sample: noise of the posterior, [B, 4, h, w].
        fresh: (step, number of prompts) -> noise [prompts, B, 4, h, w].
    """
    sd, path = backbone.diffusion, backbone.path
    mean, deviation = sd.posterior(image)
    latent, images = mean + deviation * sample, len(image)
    active = [] if label is None else [c for c, id_ in enumerate(backbone.prompted) if (label == id_).any()]
    masks = [torch.ones_like(latent[:, :1])]
    for c in active:
        mask = (label == backbone.prompted[c])[:, None].float()
        masks.append(F.interpolate(mask, size=latent.shape[-2:], mode="nearest"))
    mask, prompts = torch.stack(masks), len(masks)
    guides = [0, 0] if backbone.guides == 1 else [0, 1]
    texts = backbone.contexts[[*guides, *(backbone.guides + c for c in active)]]
    context = texts.repeat_interleave(images, 0)
    taps = [tap for block in (0, *BLOCKS) for tap in plain_taps(sd.unet, block)]
    kept = {}
    for i, (t, s) in enumerate(zip(path.sources, path.targets, strict=True)):
        copies = latent.repeat(prompts + 1, 1, 1, 1)
        arguments = sd.unet_arguments(copies, t, context)
        with record_features(sd.unet, taps) as features:
            output = sd.unet(*arguments).sample.float()
        if i in path.saved:
            for tap, feature in features.items():
                parts = feature.unflatten(0, (prompts + 1, images))
                reduced = parts.sum(0) if backbone.ca_reduce == "sum" else parts.mean(0)
                kept[tap, i] = parts[0].clone() if tap.startswith("res") else reduced
        noise = output if backbone.prediction == "raw" else sd.to_noise(output, copies, t)
        noise = noise.unflatten(0, (prompts + 1, images))
        guided = noise[0] + backbone.guidance * (noise[1:] - noise[0])
        eta = window_eta(t, backbone.eta)
        drawn = fresh(i, prompts) if eta else None
        moved = stochastic_step(latent, guided, sd.alpha_bars[t], sd.alpha_bars[s], eta, drawn)
        latent = (mask * moved).sum(0) / mask.sum(0)
    return {
        block: torch.cat([kept[tap, i] for tap in block_taps(sd.unet, block) for i in path.saved], 1).float()
        for block in BLOCKS
    }


def plain_taps(unet: torch.nn.Module, block: int) -> list[str]:
    """The taps of a block, of which the deepest has no transformers."""
    return [
        tap for tap in block_taps(unet, block) if hasattr(unet.up_blocks[block], "attentions") or "res" in tap
    ]


def plain_logits(network: DIFF, features: dict[int, Tensor]) -> Tensor:
    """Logits of concatenated features in the size of the head."""
    backbone = network.backbone
    maps = [
        aggregation(features[block]) for block, aggregation in zip(BLOCKS, backbone.aggregations, strict=True)
    ]
    return network.head(backbone.finecoder(maps))


def plain_branches(network: DIFF, image: Tensor, label: Tensor, draw: Callable) -> tuple[Tensor, Tensor]:
    """As DIFF.branches for images that all show the same prompted classes, noise in the same order."""
    drawn: dict[int, Tensor] = {}
    images = len(image)
    present = (label == network.backbone.prompted[:, None, None, None]).flatten(1).any(1)
    steered = images * int(present.sum())

    def of_step(step: int) -> Tensor:
        if step not in drawn:
            drawn[step] = draw(step, 2 * images + (steered if step >= 0 else 0))
        return drawn[step]

    def conditional(step: int, prompts: int) -> Tensor:
        classes = of_step(step)[2 * images :].unflatten(0, (images, prompts - 1)).transpose(0, 1)
        return torch.cat([of_step(step)[None, images : 2 * images], classes])

    def unconditional(step: int, prompts: int) -> Tensor:
        return of_step(step)[None, :images]

    sample = of_step(-1)
    features = plain_features(network.backbone, image, label, sample[images:], conditional)
    logits = plain_logits(network, features)
    features = plain_features(network.backbone, image, None, sample[:images], unconditional)
    return logits, plain_logits(network, features)
