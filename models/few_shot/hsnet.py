"""HSNet (arXiv 2104.01538): all correlations between query and support, squeezed by pairs of 2D convolutions.

Its K-shot rule is a vote without parameters, so a network trained with one support takes any number of them.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.few_shot.episodes import Episodes
from models.few_shot.prior import resized
from models.few_shot.resnet import normalize

GROUPS = 4  # of every GroupNorm
# The most numbers that one layer's correlations may have in prediction, or else those of a single support:
# 0.5 GB in float32, which is 5 supports of 400 x 400 pixels with ResNet-50.
CORRELATIONS_AT_ONCE = 2**27
# (kernel, support stride) of the convolutions that squeeze the correlations of layer2, layer3 and layer4
SQUEEZE = (((5, 4), (5, 4), (3, 2)), ((5, 4), (3, 2), (3, 2)), ((3, 2), (3, 2), (3, 2)))


class CenterPivotConv4d(nn.Module):
    """A 4D convolution of which only the taps at the centre of either image are kept (section 4.2).

    That is the sum of two 2D convolutions, one over the query's positions and one over the support's.

    Args:
        in_channels, out_channels: of the 4D maps.
        kernel_size: odd, of both convolutions.
        stride: of the support's positions; the query keeps all of its own.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1):
        super().__init__()
        pad = kernel_size // 2
        self.query = nn.Conv2d(in_channels, out_channels, kernel_size, padding=pad)
        self.support = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=pad)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w, u, v], u and v of the support, to [B, D, h, w, u / stride, v / stride], rounded up."""
        b, c, h, w, u, v = x.shape
        stride, pad = self.support.stride[0], self.support.padding[0]
        if max(u, v) <= stride:
            return self.at_one_position(x)
        # As 3D convolutions of extent 1 along the other image: neither has to bring its own image to the end.
        kept = x[..., ::stride, ::stride]
        flat = kept.reshape(b, c, h, w, -1)
        query = F.conv3d(flat, self.query.weight[..., None], self.query.bias, padding=(pad, pad, 0))
        support = F.conv3d(
            x.reshape(b, c, h * w, u, v),
            self.support.weight[:, :, None],
            self.support.bias,
            stride=(1, stride, stride),
            padding=(0, pad, pad),
        )
        shape = (b, -1, h, w, *kept.shape[-2:])
        return query.view(shape) + support.view(shape)

    def at_one_position(self, x: Tensor) -> Tensor:
        """The same for supports that end as one position: most of their kernel would lie in the padding."""
        pad = self.support.padding[0]
        inside = self.support.weight[:, :, pad : pad + x.shape[-2], pad : pad + x.shape[-1]]
        if inside.shape[-2:] == (1, 1):  # its only tap joins the query's centre
            weight = self.query.weight + F.pad(inside, (pad,) * 4)
            out = F.conv2d(x[..., 0, 0], weight, self.query.bias + self.support.bias, padding=pad)
        else:
            seen = x[..., : inside.shape[-2], : inside.shape[-1]]
            seen = seen.permute(0, 1, 4, 5, 2, 3).flatten(1, 3)  # [B, C * u * v, h, w]
            weight = inside.flatten(1)[..., None, None]  # for a 1x1 convolution
            out = self.query(x[..., 0, 0]) + F.conv2d(seen, weight, self.support.bias)
        return out[..., None, None]


def blocks(in_channels: int, widths: Sequence[int], sizes: Sequence[tuple[int, int]]) -> nn.Sequential:
    """For each width and (kernel, support stride) a center-pivot convolution, GroupNorm and ReLU."""
    layers: list[nn.Module] = []
    for width, (kernel_size, stride) in zip(widths, sizes, strict=True):
        layers += [CenterPivotConv4d(in_channels, width, kernel_size, stride)]
        layers += [nn.GroupNorm(GROUPS, width), nn.ReLU(inplace=True)]
        in_channels = width
    return nn.Sequential(*layers)


def hypercorrelation(query: list[Tensor], supports: list[Tensor], mask: Tensor) -> Tensor:
    """Cosines, clamped at 0, of all positions of the query and all of the masked support, for T map pairs.

    Args:
        query: T maps [B, C, h, w] of one layer.
        supports: as many maps [B * K, C, u, v]; the K of the first query first.
        mask: 1 on the object, float [B * K, 1, H, W]; brought to [u, v] bilinearly (align_corners).

    Returns:
        [B * K, T, h, w, u, v] in [0, 1]; 0 where the mask is 0.
    """

    def unit(maps: Tensor) -> Tensor:
        maps = maps.float()  # squares would overflow in half precision
        norm = maps.square().sum(2, keepdim=True).sqrt()  # on CPUs faster than vector_norm over a middle axis
        return maps / (norm + 1e-5)

    of_query, of_supports = torch.stack(query, 1), torch.stack(supports, 1)
    mask = resized(mask, of_supports.shape[-2:])
    of_supports = unit(of_supports * mask[:, None]).flatten(3).unflatten(0, (len(of_query), -1))
    of_query_t = unit(of_query).flatten(3).transpose(2, 3)[:, None]  # [B, 1, T, h * w, C]
    cosines = (of_query_t @ of_supports).relu_()  # [B, K, T, h * w, u * v]
    return cosines.reshape(*mask.shape[:1], len(query), *query[0].shape[-2:], *supports[0].shape[-2:])


def vote(masks: Tensor, weights: Tensor) -> Tensor:
    """A pixel is object if its votes reach half of the most that any pixel of its image has.

    v = sum over k of weight_k * mask_k; m = max(max v, max weight); object where v / m >= 0.5. Weights of 1
    give HSNet's rule, where m is the highest count reached, not K, and at least 1; of 0, no say.

    Args:
        masks: what each support alone would say, bool [B, K, h, w].
        weights: [B, K] >= 0.

    Returns:
        int64 [B, h, w], 1 = object.
    """
    votes = (masks * weights[..., None, None]).sum(1)
    most = torch.maximum(votes.amax((1, 2)), weights.amax(1))[:, None, None]
    # Fractional weights do not add up exactly: without the margin their order would decide a tie.
    return (votes / most >= 0.5 - 1e-6).long()


class HSNet(nn.Module):
    """Frozen backbone, hypercorrelations of three layers, squeezing, mixing from coarse to fine, 2D decoder.

    Args:
        backbone: ResNet (not dilated) or VGG16 of this room; frozen and kept in eval mode.
        squeeze_channels: of the three squeezing convolutions, multiples of 4; the last is the width of mixing
            and decoder, the second that of the decoder's second half. The defaults are the published ones.
    """

    def __init__(self, backbone: nn.Module, squeeze_channels: tuple[int, int, int] = (16, 64, 128)):
        super().__init__()
        if any(width % GROUPS for width in squeeze_channels):
            raise ValueError(
                f"HSNet cannot normalise its channels in {GROUPS} groups: squeeze_channels is "
                f"{list(squeeze_channels)}. Give multiples of {GROUPS}."
            )
        self.backbone = backbone.requires_grad_(False)
        _, narrow, width = squeeze_channels
        self.squeeze = nn.ModuleList(
            blocks(taps, squeeze_channels, sizes)
            for taps, sizes in zip(backbone.tap_counts, SQUEEZE, strict=True)
        )
        # First layer4 with layer3, then what comes of it with layer2.
        self.mix = nn.ModuleList(blocks(width, [width] * 3, [(3, 1)] * 3) for _ in range(2))
        self.decoder = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, narrow, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(narrow, narrow, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(narrow, 2, 3, padding=1),
        )
        self.train()

    def train(self, mode: bool = True) -> "HSNet":
        """As usual, but the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    @torch.no_grad()
    def taps(self, image: Tensor) -> list[list[Tensor]]:
        """Maps [N, C, h, w] of layer2, 3 and 4 that are correlated, of images [N, 3, H, W] in [0, 1]."""
        return self.backbone.taps(normalize(image))

    @torch.no_grad()
    def correlate(self, of_query: list[list[Tensor]], supports: Tensor, masks: Tensor) -> list[Tensor]:
        """Hypercorrelations of layer2, 3 and 4, [B * K, taps, h, w, u, v], from the queries' maps."""
        of_supports = self.taps(supports.flatten(0, 1))
        mask = (masks.flatten(0, 1) == 1).to(supports.dtype)[:, None]
        return [hypercorrelation(q, s, mask) for q, s in zip(of_query, of_supports, strict=True)]

    def forward(self, query: Tensor, supports: Tensor, masks: Tensor) -> Tensor:
        """Logits of background and object, as each support alone gives them.

        Args:
            query: [B, 3, H, W] in [0, 1].
            supports: [B, K, 3, H', W'] in [0, 1].
            masks: of the supports, int64 [B, K, H', W'], 1 = object; all else, 255 too, is masked away.

        Returns:
            [B, K, 2, H, W].

        Raises:
            ValueError: the layers' support maps do not end at one size.
        """
        return self.compare(self.taps(query), supports, masks, query.shape[-2:])

    def compare(
        self, of_query: list[list[Tensor]], supports: Tensor, masks: Tensor, size: Sequence[int]
    ) -> Tensor:
        """Logits as of `forward`, [B, K, 2, *size], from the queries' maps."""
        correlations = self.correlate(of_query, supports, masks)
        fine, middle, x = (squeeze(c) for squeeze, c in zip(self.squeeze, correlations, strict=True))
        ends = [tuple(z.shape[-2:]) for z in (fine, middle, x)]
        if len(set(ends)) > 1:
            raise ValueError(
                f"HSNet cannot add up layers whose support maps end at different sizes: {ends} for layer2, 3 "
                f"and 4 of supports of {tuple(supports.shape[-2:])} pixels. Use sides that are multiples of "
                "32 and a backbone without dilation."
            )
        for mix, finer in zip(self.mix, (middle, fine), strict=True):
            x = mix(resize_query(x, finer.shape[2:4]) + finer)
        logits = resized(self.decoder(x.mean((-2, -1))), size)
        return logits.unflatten(0, supports.shape[:2])

    def losses(self, episodes: Episodes) -> dict[str, Tensor]:
        """Cross entropy over all pixels; the label's ignored ones count as background (HSNet's rule).

        Only the first support of an episode is used, whatever its weight: training is 1-shot. To train on
        generated supports, let the data put one of them first.
        """
        logits = self(episodes.query, episodes.supports[:, :1], episodes.masks[:, :1])[:, 0]
        return {"loss": F.cross_entropy(logits, (episodes.label == 1).long())}

    @torch.no_grad()
    def predict(
        self, episodes: Episodes, resize: Callable[[Tensor], Tensor] = lambda logits: logits
    ) -> Tensor:
        """Masks of the queries, int64 [B, h, w], 1 = object: each support predicts alone, then they vote.

        Many or large supports are taken in turn, see CORRELATIONS_AT_ONCE.

        Args:
            resize: applied to logits [n, 2, H, W] before the argmax, n supports of whichever queries at once;
                its output's [h, w] is the result's.
        """
        query, supports, shot = episodes.query, episodes.supports, episodes.supports.shape[1]
        of_query = self.taps(query)
        scale = supports[0, 0].numel() / query[0].numel()
        largest = max(len(maps) * maps[0][0, 0].numel() ** 2 * scale for maps in of_query)
        pairs = max(int(CORRELATIONS_AT_ONCE / largest), 1)
        queries, shots = max(pairs // shot, 1), min(pairs, shot)  # whole episodes, or parts of a single one
        masks = []
        for i in range(0, len(query), queries):
            some = slice(i, i + queries)
            maps = [[taps[some] for taps in layer] for layer in of_query]
            parts = zip(supports[some].split(shots, 1), episodes.masks[some].split(shots, 1), strict=True)
            found = []
            for part in parts:
                logits = self.compare(maps, *part, query.shape[-2:])
                logits = resize(logits.flatten(0, 1)).unflatten(0, logits.shape[:2])
                found.append(logits[:, :, 1] > logits[:, :, 0])
            masks.append(torch.cat(found, 1))
        return vote(torch.cat(masks), episodes.weights)


def resize_query(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize the query's positions of [B, C, h, w, u, v] bilinearly (align_corners)."""
    maps = resized(x.permute(0, 1, 4, 5, 2, 3).flatten(1, 3), size)
    return maps.unflatten(1, (x.shape[1], *x.shape[4:])).permute(0, 1, 4, 5, 2, 3)
