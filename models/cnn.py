"""A small convolutional network trained from scratch: what diffusion features are compared with."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from models.heads.daformer import DAFormerHead, conv_norm_relu


class ConvSegmenter(nn.Module):
    """Four levels of two 3x3 convolutions with BatchNorm, halved in size before each; DAFormer's head.

    Logits of images of any size have the image's size.

    Args:
        num_classes: of the logits.
        widths: channels of the levels, fine to coarse, of strides 2, 4, 8 and 16.
        embed_channels, channels, dropout: of the head.
    """

    def __init__(
        self,
        num_classes: int,
        widths: Sequence[int] = (32, 64, 128, 256),
        embed_channels: int = 256,
        channels: int = 256,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.stem = conv_norm_relu(3, widths[0], 3)
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.MaxPool2d(2, ceil_mode=True),
                conv_norm_relu(before, width, 3),
                conv_norm_relu(width, width, 3),
            )
            for before, width in zip([widths[0], *widths[:-1]], widths, strict=True)
        )
        self.head = DAFormerHead(widths, num_classes, embed_channels, channels, dropout=dropout)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, num_classes, H, W] of an image [B, 3, H, W] in [0, 1]."""
        feature, features = self.stem(2 * image - 1), []
        for level in self.levels:
            feature = level(feature)
            features.append(feature)
        logits = self.head(features)
        return F.interpolate(logits, size=image.shape[-2:], mode="bilinear", align_corners=False)
