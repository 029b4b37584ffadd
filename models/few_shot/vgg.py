"""VGG16 (arXiv 1409.1556) as few-shot networks take it: in five layers, with or without BatchNorm."""

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor, nn

from models.few_shot.resnet import start_weights
from models.few_shot.weights import load_backbone

CONVOLUTIONS = (2, 2, 3, 3, 3)  # of the five layers


class VGG16(nn.Module):
    """VGG16 without classifier; layer0 to layer3 end in their max-pool. Images come normalised.

    Args:
        batch_norm: BatchNorm after each convolution, and pools that round sizes up (PFENet and BAM); without,
            pools round down (HSNet).
        planes: channels of layer0 to layer3; layer4 has as many as layer3.
        weights: see models.few_shot.weights.load_backbone; None draws them.
    """

    tap_counts = (*CONVOLUTIONS[3:], 1)

    def __init__(
        self,
        batch_norm: bool = False,
        planes: Sequence[int] = (64, 128, 256, 512),
        weights: str | None = None,
    ):
        super().__init__()
        self.channels: tuple[int, ...] = (*planes[1:], planes[3])
        self.pool = nn.MaxPool2d(2, 2, ceil_mode=batch_norm)
        before, self.lengths = 3, []  # modules of each layer
        for i, (count, width) in enumerate(zip(CONVOLUTIONS, (planes[0], *self.channels), strict=True)):
            layer = []
            for _ in range(count):
                layer += [nn.Conv2d(before, width, 3, padding=1)]
                layer += [nn.BatchNorm2d(width), nn.ReLU()] if batch_norm else [nn.ReLU()]
                before = width
            layer += [self.pool] if i < 4 else []
            self.lengths.append(len(layer))
            setattr(self, f"layer{i}", nn.Sequential(*layer))
        if weights is None:
            start_weights(self)
        else:
            load_backbone(self, weights)

    def stages(self, image: Tensor) -> list[Tensor]:
        """Outputs of layer1 to layer4 of normalised images, [B, channels[i], h, w].

        h = H/4, H/8, H/16, H/16: layer4 is not pooled.
        """
        x, outputs = self.layer0(image), []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            outputs.append(x)
        return outputs

    def taps(self, image: Tensor) -> list[list[Tensor]]:
        """Maps that HSNet correlates, at H/8, H/16 and H/32; tap_counts[i] maps each.

        What the convolutions of layer3 and of layer4 give before their ReLU (VGG's conv4 and conv5: in
        torchvision's count 17, 19, 21 and 24, 26, 28), and the pooled output of layer4 (30).
        """
        x, groups = self.layer2(self.layer1(self.layer0(image))), []
        for layer in (self.layer3, self.layer4):
            taps = []
            for module in layer:
                if isinstance(module, nn.ReLU):  # none works in place: it would overwrite the tap
                    taps.append(x)
                x = module(x)
            groups.append(taps)
        return [*groups, [self.pool(x)]]

    def rename(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give tensors of torchvision and timm, features.N, the names of their layers."""
        ends = list(accumulate(self.lengths))

        def name(key: str) -> str:
            part, _, rest = key.partition(".")
            number, _, leaf = rest.partition(".")
            if part != "features" or not number.isdigit() or int(number) >= ends[-1]:
                return key
            layer = next(i for i, end in enumerate(ends) if int(number) < end)
            return f"layer{layer}.{int(number) - ends[layer] + self.lengths[layer]}.{leaf}"

        return {name(key): value for key, value in weights.items()}
