"""What PFENet (arXiv 2008.01449) and BAM (arXiv 2203.07615) share: prototypes, prior masks, small parts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.few_shot.episodes import Episodes
from models.few_shot.resnet import ResNet, normalize
from models.few_shot.vgg import VGG16


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps [N, C, h, w] in another size (height, width), bilinear with aligned corners."""
    if maps.shape[-2:] == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)


def weighted_gap(features: Tensor, mask: Tensor) -> Tensor:
    """Prototypes [N, C]: mean of the features [N, C, h, w] under a mask [N, 1, h, w] in [0, 1].

    5e-4 is added to the mask's area, so that an empty mask gives zeros.
    """
    return (features * mask).sum((2, 3)) / (mask.sum((2, 3)) + 5e-4)


def prior_mask(query: Tensor, supports: Tensor) -> Tensor:
    """How much each place of the query looks like some place of the object, stretched to [0, 1] per support.

    The largest cosine over the places of a support; masked-out places are zeros, whose cosine is 0.

    Args:
        query: layer 4 of the query, [B, C, h, w].
        supports: layer 4 of the supports, zero outside the object, [B, K, C, h, w].

    Returns:
        [B, K, h, w].
    """
    places = F.normalize(query.flatten(2), dim=1, eps=1e-7).transpose(1, 2)  # [B, h*w, C]
    priors = []
    for support in supports.unbind(1):  # one at a time: h*w x h*w cosines of one are 50 MB at 60x60
        cosine = (places @ F.normalize(support.flatten(2), dim=1, eps=1e-7)).amax(2).float()
        low, high = cosine.amin(1, keepdim=True), cosine.amax(1, keepdim=True)
        priors.append((cosine - low) / (high - low + 1e-7))
    return torch.stack(priors, dim=1).unflatten(2, query.shape[-2:])


def conv_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    """1x1 convolution without bias, ReLU."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.ReLU(inplace=True))


class Residual(nn.Module):
    """x + two 3x3 convolutions without bias, each with ReLU, of x."""

    def __init__(self, channels: int):
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convs(x)


def head(channels: int) -> nn.Sequential:
    """Logits of background and object."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.ReLU(inplace=True),
        nn.Dropout2d(0.1),
        nn.Conv2d(channels, 2, 1),
    )


@dataclass(frozen=True)
class Match:
    """What is known of B queries from K supports each; h x w is the size of layer 3.

    Args:
        query: reduced features, [B, C, h, w].
        prototypes: of the object in each support, [B, K, C].
        priors: [B, K, h, w] in [0, 1].
        low_query, low_supports: layer 2, [B, c, h, w] and [B, K, c, h, w].
        high_query: layer 4, [B, c', h', w'].
    """

    query: Tensor
    prototypes: Tensor
    priors: Tensor
    low_query: Tensor
    low_supports: Tensor
    high_query: Tensor

    def average(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Prototype [B, C] and prior [B, h, w] of all supports, whose weights [B, K] sum to 1."""
        prototype = (weights[..., None] * self.prototypes).sum(1)
        return prototype, (weights[..., None, None] * self.priors).sum(1)


def guided(query: Tensor, prototype: Tensor, prior: Tensor) -> Tensor:
    """[B, 2C + 1, h, w]: features [B, C, h, w], the prototype [B, C] at each place, the prior [B, h, w]."""
    return torch.cat([query, prototype[..., None, None].expand_as(query), prior[:, None]], dim=1)


class Matcher(nn.Module):
    """Prototypes and prior masks of all supports at once, from a frozen backbone (BAM's steps 1-3).

    Args:
        backbone_channels: of the backbone's layers 1 to 4.
        channels: to which layers 3 and 2 are reduced, by one convolution for queries and one for supports.
        dropout: of whole reduced channels; a support's own.
    """

    def __init__(self, backbone_channels: Sequence[int], channels: int, dropout: float):
        super().__init__()
        joined = backbone_channels[1] + backbone_channels[2]
        self.query = nn.Sequential(*conv_relu(joined, channels), nn.Dropout2d(dropout))
        self.support = nn.Sequential(*conv_relu(joined, channels), nn.Dropout2d(dropout))

    def forward(self, backbone: ResNet | VGG16, episodes: Episodes) -> Match:
        each = episodes.supports.shape[:2]  # B, K
        with torch.no_grad():
            _, low, middle, high = backbone.stages(normalize(episodes.query))
            supports = normalize(episodes.supports.flatten(0, 1))
            # Not stages(): layer 4 is most of the work, and of supports it is wanted under the mask only.
            first = backbone.stem if isinstance(backbone, ResNet) else backbone.layer0
            support_low = backbone.layer2(backbone.layer1(first(supports)))
            support_middle = backbone.layer3(support_low)
            size = middle.shape[-2:]
            # A VGG's layer 2 is twice as large as its layer 3.
            low, support_low = resized(low, size), resized(support_low, size)

            mask = resized((episodes.masks.flatten(0, 1)[:, None] == 1).float(), size)
            support_high = backbone.layer4(support_middle * mask)
            support_high = support_high * resized(mask, support_high.shape[-2:])
            priors = resized(prior_mask(high, support_high.unflatten(0, each)), size)

        prototypes = weighted_gap(self.support(torch.cat([support_middle, support_low], dim=1)), mask)
        return Match(
            query=self.query(torch.cat([middle, low], dim=1)),
            prototypes=prototypes.unflatten(0, each),
            priors=priors,
            low_query=low,
            low_supports=support_low.unflatten(0, each),
            high_query=high,
        )
