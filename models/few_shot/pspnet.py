"""PSPNet (arXiv 1612.01105): what BAM (arXiv 2203.07615) finds the base classes with."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.few_shot.prior import resized
from models.few_shot.resnet import ResNet, normalize
from models.few_shot.vgg import VGG16
from models.few_shot.weights import load_backbone


class PSPNet(nn.Module):
    """A backbone whose last features are pooled in bins, laid beside them and classified.

    In training a batch needs two images or more: one pixel, of the bin of side 1, has no statistics.

    Args:
        backbone: in BAM a dilated ResNet with a deep stem, or VGG16 with BatchNorm.
        num_classes: of the logits; 0 is the background.
        bins: sides of the grids to which features are averaged.
        channels: of the map before the classifier.
        dropout: of whole channels there.
        weights: of all of it, a checkpoint of ours or a published PSPNet, see
            models.few_shot.weights.load_backbone; None draws what is no backbone.
        frozen_backbone: leave the backbone, its statistics too, as it is.
    """

    def __init__(
        self,
        backbone: ResNet | VGG16,
        num_classes: int,
        bins: Sequence[int] = (1, 2, 3, 6),
        channels: int = 512,
        dropout: float = 0.1,
        weights: str | None = None,
        frozen_backbone: bool = False,
    ):
        super().__init__()
        self.backbone, self.frozen_backbone = backbone, frozen_backbone
        width = backbone.channels[3]
        part = width // len(bins)
        self.ppm = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(side),
                nn.Conv2d(width, part, 1, bias=False),
                nn.BatchNorm2d(part),
                nn.ReLU(),
            )
            for side in bins
        )
        self.cls = nn.Sequential(
            nn.Conv2d(width + part * len(bins), channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Dropout2d(dropout),
            nn.Conv2d(channels, num_classes, 1),
        )
        if weights is not None:
            load_backbone(self, weights, unused=("aux.",))
        if frozen_backbone:
            backbone.requires_grad_(False)
            self.train()

    def train(self, mode: bool = True) -> "PSPNet":
        """As usual, but a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.frozen_backbone:
            self.backbone.eval()
        return self

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, num_classes, H, W] of images [B, 3, H, W] in [0, 1]."""
        return resized(self.logits_of(self.backbone.stages(normalize(image))[-1]), image.shape[-2:])

    def logits_of(self, features: Tensor) -> Tensor:
        """Logits [B, num_classes, h, w] of the backbone's layer4, [B, C, h, w]."""
        pooled = [resized(pool(features), features.shape[-2:]) for pool in self.ppm]
        return self.cls(torch.cat([features, *pooled], dim=1))

    def rename(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give tensors of published files our names; those of the backbone have lost `backbone.` before."""
        own = {k: v for k, v in weights.items() if k.startswith(("ppm.", "cls."))}
        body = self.backbone.rename({k: v for k, v in weights.items() if k not in own})
        named = {key.replace("ppm.features.", "ppm."): value for key, value in own.items()}
        return named | {f"backbone.{key}": value for key, value in body.items()}
