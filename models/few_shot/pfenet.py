"""PFENet (arXiv 2008.01449): a prior mask and feature enrichment at several sizes."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from functional.losses import pixel_cross_entropy
from models.few_shot.episodes import Episodes
from models.few_shot.prior import Matcher, Residual, conv_relu, guided, head, resized
from models.few_shot.resnet import ResNet
from models.few_shot.vgg import VGG16


def bin_size(cells: float, size: Sequence[int]) -> tuple[int, int]:
    """Height and width of a bin: up to 1 a share of the map's size, truncated; above 1 cells.

    Raises:
        ValueError: the bin is larger than the map.
    """
    if cells <= 1:
        return max(1, int(size[0] * cells)), max(1, int(size[1] * cells))
    if cells > min(size):
        raise ValueError(
            f"PFENet cannot pool features to {cells:g} x {cells:g} cells: images of this size give "
            f"{size[0]} x {size[1]}. Set bins to shares of the map (1, 0.5, 0.25, 0.125) or enlarge images."
        )
    return int(cells), int(cells)


class FeatureEnrichment(nn.Module):
    """Merge the query with prototype and prior at several sizes, from fine to coarse (FEM).

    Args:
        channels: of the features.
        bins: sizes of the maps, fine to coarse, see `bin_size`.
    """

    def __init__(self, channels: int, bins: Sequence[float]):
        super().__init__()
        self.bins = tuple(bins)
        self.merge = nn.ModuleList(conv_relu(2 * channels + 1, channels) for _ in bins)
        self.pass_on = nn.ModuleList(conv_relu(2 * channels, channels) for _ in self.bins[1:])
        self.residual = nn.ModuleList(Residual(channels) for _ in bins)
        self.heads = nn.ModuleList(head(channels) for _ in bins)
        self.fuse = nn.Sequential(conv_relu(len(self.bins) * channels, channels), Residual(channels))

    def forward(self, query: Tensor, prototype: Tensor, prior: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features [B, C, h, w] from the query's [B, C, h, w], prototype [B, C] and prior [B, h, w].

        And the logits [B, 2, h_i, w_i] of each bin.
        """
        full, outputs, logits = query.shape[-2:], [], []
        for i, cells in enumerate(self.bins):
            size = bin_size(cells, full)
            pooled = F.adaptive_avg_pool2d(query, size) if size != tuple(full) else query
            x = self.merge[i](guided(pooled, prototype, resized(prior[:, None], size)[:, 0]))
            if outputs:  # the finer bin's, by way of the full size as in the published code
                x = x + self.pass_on[i - 1](torch.cat([x, resized(outputs[-1], size)], dim=1))
            x = self.residual[i](x)
            logits.append(self.heads[i](x))
            outputs.append(resized(x, full))
        return self.fuse(torch.cat(outputs, dim=1)), logits


class PFENet(nn.Module):
    """Segment by the supports' mean prototype and mean prior mask, each support counted by its weight.

    The backbone stays frozen in eval mode; in the published code its BatchNorm statistics drift in training.

    Args:
        backbone: published are a dilated ResNet with a deep stem and a VGG16 with BatchNorm.
        channels: to which its features are reduced and of all that follows.
        bins: of the feature enrichment, fine to coarse: shares of the map's size up to 1, cells above.
            Published are 60, 30, 15, 8 for PASCAL-5i (maps of 60 x 60) and the default for COCO-20i.
        dropout: of whole channels of the reduced features.
    """

    def __init__(
        self,
        backbone: ResNet | VGG16,
        channels: int = 256,
        bins: Sequence[float] = (1.0, 0.5, 0.25, 0.125),
        dropout: float = 0.5,
    ):
        super().__init__()
        if not bins or min(bins) <= 0:
            raise ValueError(
                f"PFENet's bins are {list(bins)}: give at least one, each a share of the map (up to 1) or a "
                "number of cells."
            )
        self.backbone = backbone.requires_grad_(False).eval()
        self.matcher = Matcher(backbone.channels, channels, dropout)
        self.enrich = FeatureEnrichment(channels, bins)
        self.head = head(channels)

    def train(self, mode: bool = True):
        """Switch what learns; the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, episodes: Episodes) -> tuple[Tensor, list[Tensor]]:
        """Logits [B, 2, h, w] at feature size and those of each bin, [B, 2, h_i, w_i]."""
        match = self.matcher(self.backbone, episodes)
        weights = episodes.weights / episodes.weights.sum(1, keepdim=True)
        features, inner = self.enrich(match.query, *match.average(weights))
        return self.head(features), inner

    def losses(self, episodes: Episodes) -> dict[str, Tensor]:
        """Cross entropies: "loss" is that of the final logits plus the mean of the bins'."""
        final, inner = self(episodes)
        loss_final, *losses_inner = (
            pixel_cross_entropy(resized(logits, episodes.label.shape[-2:]), episodes.label)
            for logits in (final, *inner)
        )
        loss_inner = torch.stack(losses_inner).mean()
        return {
            "loss": loss_final + loss_inner,
            "loss_final": loss_final.detach(),
            "loss_inner": loss_inner.detach(),
        }

    def predict(
        self, episodes: Episodes, resize: Callable[[Tensor], Tensor] = lambda logits: logits
    ) -> Tensor:
        """Mask of the object, int64 [B, h, w]; `resize` gets the logits, [B, 2, H, W] as the query."""
        final, _ = self(episodes)
        return resize(resized(final, episodes.query.shape[-2:])).argmax(1)
