"""Taps on the decoder of a U-Net: what a layer computes, recorded by hooks that live within a `with` block.

A tap is
- an int k: decoder layer k in MADM's numbering (arXiv 2410.21708), counted over up_blocks: after the layer's
  resnet and, where present, its transformer, before the block's upsampler. SD 1.x and 2.x have layers 0..11.
- "res.i.j": output of up_blocks[i].resnets[j].conv2, the residual branch before the skip addition (DIFF,
  arXiv 2406.00777).
- "ca.i.j": output of up_blocks[i].attentions[j].transformer_blocks[0] as a map [B, C, h, w] (DIFF).
"""

from collections.abc import Sequence
from contextlib import contextmanager, suppress

from torch import Tensor, nn

Tap = int | str


class _AllTapsRecorded(Exception):
    """Leaves the U-Net's forward as soon as the last tap is recorded."""


def decoder_layers(unet: nn.Module) -> list[tuple[int, int]]:
    """Block and position of each decoder layer."""
    return [(i, j) for i, block in enumerate(unet.up_blocks) for j in range(len(block.resnets))]


def locate(unet: nn.Module, tap: Tap) -> tuple[str, int, int]:
    """Kind ("layer", "res" or "ca"), block and position of a tap.

    Raises:
        ValueError: the U-Net has no such tap.
    """
    layers = decoder_layers(unet)
    if isinstance(tap, int) and 0 <= tap < len(layers):
        return ("layer", *layers[tap])
    kind, _, place = str(tap).partition(".")
    for i, j in layers:
        if place == f"{i}.{j}" and (
            kind == "res" or (kind == "ca" and hasattr(unet.up_blocks[i], "attentions"))
        ):
            return kind, i, j
    with_attention = [i for i, block in enumerate(unet.up_blocks) if hasattr(block, "attentions")]
    raise ValueError(
        f"The U-Net has no tap {tap!r}: use a decoder layer 0..{len(layers) - 1}, 'res.i.j' with block i of "
        f"0..{len(unet.up_blocks) - 1}, or 'ca.i.j' with block i of {with_attention}."
    )


def tapped_module(unet: nn.Module, tap: Tap) -> nn.Module:
    """The module whose output the tap records."""
    kind, i, j = locate(unet, tap)
    block = unet.up_blocks[i]
    if kind == "res":
        return block.resnets[j].conv2
    if kind == "ca":
        return block.attentions[j].transformer_blocks[0]
    return block.attentions[j] if hasattr(block, "attentions") else block.resnets[j]


def tap_shape(unet: nn.Module, tap: Tap) -> tuple[int, int]:
    """Channels of a tap and its stride relative to the latent."""
    _, i, j = locate(unet, tap)
    return unet.up_blocks[i].resnets[j].out_channels, 2 ** (len(unet.up_blocks) - 1 - i)


@contextmanager
def record_features(unet: nn.Module, taps: Sequence[Tap], stop: bool = False):
    """Inside the block every U-Net call fills the yielded {tap: feature [B, C, h, w]}, with its gradient.

    With `stop` a call is left by an exception after the last tap; extract_features catches it.
    """
    features: dict[Tap, Tensor] = {}
    size: dict[int, tuple[int, int]] = {}  # of the maps that a block works on

    def remember_size(block: int):
        def hook(module, inputs, output):
            size[block] = output.shape[-2:]

        return hook

    def record(tap: Tap, block: int):
        def hook(module, inputs, output):
            feature = output[0] if isinstance(output, tuple) else output
            if feature.ndim == 3:  # tokens [B, h * w, C] of a transformer block
                feature = feature.transpose(1, 2).unflatten(2, size[block])
            features[tap] = feature
            if stop and len(features) == len(set(taps)):
                raise _AllTapsRecorded

        return hook

    handles = []
    try:
        for tap in dict.fromkeys(taps):
            kind, i, _ = locate(unet, tap)
            if kind == "ca":
                handles += [
                    resnet.register_forward_hook(remember_size(i)) for resnet in unet.up_blocks[i].resnets
                ]
            handles.append(tapped_module(unet, tap).register_forward_hook(record(tap, i)))
        yield features
    finally:
        for handle in handles:  # an exception must not leave the U-Net instrumented
            handle.remove()


def extract_features(
    unet: nn.Module, taps: Sequence[Tap], latent: Tensor, timestep: Tensor | int, context: Tensor
) -> dict[Tap, Tensor]:
    """{tap: feature [B, C, h, w]} of one U-Net call that runs no block beyond the last tap.

    Raises:
        ValueError: no taps, or one that the U-Net does not have.
    """
    if not taps:
        raise ValueError("No taps are given: name at least one decoder layer.")
    with record_features(unet, taps, stop=True) as features, suppress(_AllTapsRecorded):
        unet(latent, timestep, encoder_hidden_states=context)
    return features


def modules_after(unet: nn.Module, layer: int) -> list[nn.Module]:
    """The modules that run after a decoder layer, which therefore get no gradient from it."""
    _, i, j = locate(unet, layer)
    block = unet.up_blocks[i]
    later = [*block.resnets[j + 1 :], *getattr(block, "attentions", [])[j + 1 :], *(block.upsamplers or [])]
    return [*later, *unet.up_blocks[i + 1 :], unet.conv_norm_out, unet.conv_out]
