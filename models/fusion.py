"""DIFF's fusion of U-Net features (arXiv 2406.00777): a map per stride from all layers and steps; a pyramid.

Features are named by stride: maps of stride s are those of one up block of the U-Net. Channels of a stride's
concatenation are ordered by layer, then by saved step.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

GROUPS = 16  # of the bottlenecks' GroupNorm
PYRAMID_GROUPS = 32  # of the finecoder's


def conv(in_channels: int, out_channels: int, kernel: int, bias: bool = False) -> nn.Conv2d:
    """Convolution that keeps the size, Kaiming-normal (fan out), bias 0."""
    layer = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=bias)
    return initialised(layer)


def initialised(layer: nn.Conv2d | nn.ConvTranspose2d) -> nn.Conv2d | nn.ConvTranspose2d:
    """Draw the weights Kaiming-normal (fan out, ReLU) and set the bias to 0."""
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Bottleneck(nn.Module):
    """Residual bottleneck [B, in, h, w] -> [B, out, h, w] of inner width out / 4.

    Its first operations are two 1x1 convolutions, so that the input may come in slices of channels: start()
    gives the sums of the slices so far, finish() the output.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        inner = out_channels // 4
        self.shortcut = conv(in_channels, out_channels, 1)
        self.shortcut_norm = nn.GroupNorm(GROUPS, out_channels)
        self.reduce = conv(in_channels, inner, 1)
        self.reduce_norm = nn.GroupNorm(GROUPS, inner)
        self.middle = nn.Sequential(conv(inner, inner, 3), nn.GroupNorm(GROUPS, inner), nn.ReLU())
        self.expand = nn.Sequential(conv(inner, out_channels, 1), nn.GroupNorm(GROUPS, out_channels))

    def forward(self, features: Tensor) -> Tensor:
        return self.finish([self.shortcut(features), self.reduce(features)])

    def start(self, feature: Tensor, first: int, sums: list[Tensor] | None) -> list[Tensor]:
        """Add the part of channels first, first + 1, ... [B, C, h, w] to the sums of both convolutions."""
        channels = slice(first, first + feature.shape[1])
        layers = (self.shortcut, self.reduce)
        # Many parts are added up, so not in half precision under autocast.
        parts = [nn.functional.conv2d(feature, layer.weight[:, channels]).float() for layer in layers]
        return parts if sums is None else [total.add_(part) for total, part in zip(sums, parts, strict=True)]

    def finish(self, sums: list[Tensor]) -> Tensor:
        """Output of the sums over all channels."""
        shortcut, inner = sums
        inner = self.expand(self.middle(self.reduce_norm(inner).relu()))
        return (self.shortcut_norm(shortcut) + inner).relu()


class Concatenation(nn.Module):
    """One bottleneck over all layers and steps of a stride: the published fusion.

    Args:
        layers, steps: numbers of tapped layers and of saved steps.
        width: channels of each layer.
        out_channels: of the fused map.
    """

    def __init__(self, layers: int, steps: int, width: int, out_channels: int):
        super().__init__()
        self.steps, self.width = steps, width
        self.bottleneck = Bottleneck(layers * steps * width, out_channels)

    def forward(self, features: Tensor) -> Tensor:
        """Fused map [B, out, h, w] of the concatenation [B, layers * steps * width, h, w]."""
        return self.bottleneck(features)

    def add(self, feature: Tensor, layer: int, step: int, sums: list[Tensor] | None) -> list[Tensor]:
        """Add a layer's feature [B, C, h, w] of the step-th saved step, so that none needs to be kept."""
        return self.bottleneck.start(feature, (layer * self.steps + step) * self.width, sums)

    def finish(self, sums: list[Tensor]) -> Tensor:
        """Fused map of what was added."""
        return self.bottleneck.finish(sums)


class SoftmaxAggregation(nn.Module):
    """A bottleneck per layer, shared over steps, and a mean of all by weights softmax(a) [steps, layers].

    As in Diffusion Hyperfeatures (arXiv 2305.14334). The released code of DIFF reads the same channels for
    all layers of a stride here; this module reads each layer's own.

    Args: as of Concatenation.
    """

    def __init__(self, layers: int, steps: int, width: int, out_channels: int):
        super().__init__()
        self.bottlenecks = nn.ModuleList(Bottleneck(width, out_channels) for _ in range(layers))
        self.mixing = nn.Parameter(torch.ones(steps, layers))

    @property
    def weights(self) -> Tensor:
        """Weight of each step and layer, [steps, layers], with sum 1."""
        return self.mixing.flatten().softmax(0).view_as(self.mixing)

    def forward(self, features: Tensor) -> Tensor:
        """Fused map [B, out, h, w] of the concatenation [B, layers * steps * width, h, w]."""
        steps, layers = self.mixing.shape
        sums = None
        for place, feature in enumerate(features.chunk(layers * steps, dim=1)):
            sums = self.add(feature, place // steps, place % steps, sums)
        return self.finish(sums)

    def add(self, feature: Tensor, layer: int, step: int, sums: list[Tensor] | None) -> list[Tensor]:
        """Add a layer's feature [B, C, h, w] of the step-th saved step."""
        part = self.weights[step, layer] * self.bottlenecks[layer](feature)
        return [part if sums is None else sums[0] + part]

    def finish(self, sums: list[Tensor]) -> Tensor:
        """Fused map of what was added."""
        return sums[0]


class Fuse(nn.Module):
    """Double the size of a coarse map, add the finer one where there is one, refine by a residual block."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.up = initialised(nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1))
        self.refine = nn.Sequential(
            conv(out_channels, out_channels, 3, bias=True),
            nn.GroupNorm(PYRAMID_GROUPS, out_channels),
            nn.ReLU(),
            conv(out_channels, out_channels, 3, bias=True),
            nn.GroupNorm(PYRAMID_GROUPS, out_channels),
        )

    def forward(self, coarse: Tensor, fine: Tensor | None = None) -> Tensor:
        value = self.up(coarse) if fine is None else self.up(coarse) + fine
        return (value + self.refine(value)).relu()


class Finecoder(nn.Module):
    """From the fused maps to a pyramid of four levels; only its finest has context from above.

    Args:
        channels: of the levels, coarse to fine, the finest last: (2048, 1024, 512, 256) as published.
    """

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        *maps, _ = channels
        self.norms = nn.ModuleList(nn.GroupNorm(PYRAMID_GROUPS, width) for width in maps)
        self.fuse = nn.ModuleList(Fuse(a, b) for a, b in pairwise(channels))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Pyramid [B, C, h, w], fine to coarse, of the three fused maps, coarse to fine."""
        levels = [norm(level) for norm, level in zip(self.norms, maps, strict=True)]
        context = levels[0]
        for fuse, fine in zip(self.fuse, [*levels[1:], None], strict=True):
            context = fuse(context, fine)
        return [context, *reversed(levels)]
