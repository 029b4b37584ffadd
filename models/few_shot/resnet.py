"""ResNets of bottlenecks (arXiv 1512.03385) as few-shot networks take them: taps, dilation, deep stem."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.few_shot.weights import load_backbone

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's RGB in [0, 1]
# The stem's numbers in a sequence of convolution, BatchNorm, ReLU, convolution ..
STEM = {"0": "conv1", "1": "bn1", "3": "conv2", "4": "bn2", "6": "conv3", "7": "bn3"}


def normalize(image: Tensor) -> Tensor:
    """Bring RGB in [0, 1], [..., 3, H, W], to ImageNet's mean 0 and standard deviation 1 per channel."""
    mean, std = (image.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (image - mean) / std


def start_weights(module: nn.Module) -> None:
    """Draw all convolutions as for a training from scratch (Kaiming-normal, fan out); biases are 0."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; the stride is in the 3x3 (torchvision's version)."""

    def __init__(self, in_channels: int, planes: int, stride: int, dilation: int):
        super().__init__()
        channels = 4 * planes
        self.conv1, self.bn1 = nn.Conv2d(in_channels, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.downsample = None
        if stride > 1 or in_channels != channels:
            shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

    def residual_sum(self, x: Tensor) -> Tensor:
        """The block's output before its last ReLU."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return self.bn3(self.conv3(out)) + (x if self.downsample is None else self.downsample(x))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual_sum(x))


class ResNet(nn.Module):
    """A ResNet without classifier; its parameters have torchvision's names. Images come normalised.

    Args:
        blocks: bottlenecks of layer1 to layer4; (3, 4, 6, 3) is ResNet-50, (3, 4, 23, 3) ResNet-101.
        planes: width of these layers' bottlenecks; a layer's output has 4 times as many channels.
        deep_stem: three 3x3 convolutions (planes[0], planes[0], 2 planes[0] channels) in place of one 7x7, as
            PSPNet, PFENet and BAM have them.
        dilated: layer3 and layer4 keep layer2's size; each 3x3 convolution in them, the first one too, has
            dilation 2 and 4 (PSPNet, PFENet, BAM). timm and torchvision give the first one the previous
            layer's dilation, which are other numbers from the same weights.
        weights: see models.few_shot.weights.load_backbone; None draws them.
        channels_last: memory order of the weights, and so of all maps: faster on a CPU.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (3, 4, 6, 3),
        planes: Sequence[int] = (64, 128, 256, 512),
        deep_stem: bool = False,
        dilated: bool = False,
        weights: str | None = None,
        channels_last: bool = False,
    ):
        super().__init__()
        width = planes[0]
        if deep_stem:
            self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
            self.conv3, self.bn3 = nn.Conv2d(width, 2 * width, 3, 1, 1, bias=False), nn.BatchNorm2d(2 * width)
            width = 2 * width
        else:
            self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.deep_stem = deep_stem
        strides, dilations = ((1, 2, 1, 1), (1, 1, 2, 4)) if dilated else ((1, 2, 2, 2), (1, 1, 1, 1))
        for i, (count, plane) in enumerate(zip(blocks, planes, strict=True)):
            layer = [Bottleneck(width, plane, strides[i], dilations[i])]
            width = 4 * plane
            layer += [Bottleneck(width, plane, 1, dilations[i]) for _ in range(count - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*layer))
        self.channels: tuple[int, ...] = tuple(4 * plane for plane in planes)
        self.tap_counts: tuple[int, ...] = tuple(blocks[1:])
        if weights is None:
            start_weights(self)
        else:
            load_backbone(self, weights)
        if channels_last:
            self.to(memory_format=torch.channels_last)

    def stem(self, image: Tensor) -> Tensor:
        """What layer1 is given, [B, C, H/4, W/4] rounded up."""
        x = F.relu(self.bn1(self.conv1(image)))
        if self.deep_stem:
            x = F.relu(self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x))))))
        return F.max_pool2d(x, 3, 2, 1)

    def stages(self, image: Tensor) -> list[Tensor]:
        """Outputs of layer1 to layer4 of normalised images, [B, channels[i], h, w].

        h = H/4, H/8, H/16, H/32 rounded up; with `dilated`, layer3 and layer4 stay at H/8.
        """
        x, outputs = self.stem(image), []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            outputs.append(x)
        return outputs

    def taps(self, image: Tensor) -> list[list[Tensor]]:
        """Maps that HSNet correlates: for layer2, 3, 4 all bottlenecks' sums before their last ReLU.

        tap_counts[i] maps [B, channels[i + 1], h, w] each.
        """
        x, groups = self.layer1(self.stem(image)), []
        for layer in (self.layer2, self.layer3, self.layer4):
            taps = []
            for block in layer:
                taps.append(block.residual_sum(x))
                x = F.relu(taps[-1])  # never in place: it would overwrite the tap
            groups.append(taps)
        return groups

    def rename(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give tensors of PSPNet (stem in layer0) and of timm (deep stem in conv1) torchvision's names."""
        nested = "conv1.0.weight" in weights

        def name(key: str) -> str:
            part, _, rest = key.partition(".")
            number, _, leaf = rest.partition(".")
            if (part == "layer0" or (part == "conv1" and nested)) and number in STEM:
                return f"{STEM[number]}.{leaf}"
            return f"bn3.{rest}" if part == "bn1" and nested else key

        return {name(key): value for key, value in weights.items()}
