"""DAFormer's decode head with a separable ASPP (arXiv 2111.14887), as MADM and DIFF use it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm_relu(
    in_channels: int, out_channels: int, kernel: int, dilation: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution that keeps the size, without bias, Kaiming-normal (fan out); BatchNorm; ReLU."""
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(
        in_channels, out_channels, kernel, padding=padding, dilation=dilation, groups=groups, bias=False
    )
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class DAFormerHead(nn.Module):
    """Fuse features of several strides at the size of the first and classify each pixel.

    Args:
        in_channels: of the features, fine to coarse.
        num_classes: of the logits.
        embed_channels: to which each feature is embedded. channels: of each ASPP branch and of the fused map.
        dilations: of the ASPP branches; 1 is a plain 1x1 convolution, another one a separable 3x3.
        dropout: of whole channels before the classifier.
        classifier_std: None keeps PyTorch's initialisation (MADM); 0.01 draws N(0, 0.01), bias 0 (DIFF).
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        embed_channels: int = 256,
        channels: int = 256,
        dilations: Sequence[int] = (1, 6, 12, 18),
        dropout: float = 0.1,
        classifier_std: float | None = None,
    ):
        super().__init__()
        self.embed = nn.ModuleList(nn.Conv2d(width, embed_channels, 1) for width in in_channels)
        total = embed_channels * len(in_channels)
        self.aspp = nn.ModuleList(
            conv_norm_relu(total, channels, 1)
            if dilation == 1
            else nn.Sequential(
                conv_norm_relu(total, total, 3, dilation, groups=total), conv_norm_relu(total, channels, 1)
            )
            for dilation in dilations
        )
        self.fuse = conv_norm_relu(channels * len(dilations), channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        if classifier_std is not None:
            nn.init.normal_(self.classifier.weight, std=classifier_std)
            nn.init.zeros_(self.classifier.bias)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Logits [B, num_classes, h, w] in the size of the first of the features [B, C_i, h_i, w_i]."""
        size = features[0].shape[-2:]
        embedded = [embed(feature) for embed, feature in zip(self.embed, features, strict=True)]
        embedded = [
            feature
            if feature.shape[-2:] == size
            else F.interpolate(feature, size=size, mode="bilinear", align_corners=False)
            for feature in embedded
        ]
        fused = torch.cat(embedded, dim=1)
        fused = self.fuse(torch.cat([branch(fused) for branch in self.aspp], dim=1))
        return self.classifier(self.dropout(fused))
