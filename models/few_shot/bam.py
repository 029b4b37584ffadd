"""BAM (arXiv 2203.07615): a meta learner that a base learner tells what the object is not."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from functional.losses import pixel_cross_entropy
from models.few_shot.episodes import Episodes
from models.few_shot.prior import Matcher, Residual, conv_relu, guided, head, resized
from models.few_shot.pspnet import PSPNet
from models.few_shot.resnet import ResNet
from models.few_shot.vgg import VGG16


def scene_difference(query: Tensor, supports: Tensor) -> Tensor:
    """psi [B, K] in [0, 1]: how unlike a query [B, C, h, w] and its supports [B, K, C, h, w] are.

    The Frobenius distance of their channels' Gram matrices, divided by C. These hold cosines, so that the
    strength of a channel does not matter.
    """

    def gram(features: Tensor) -> Tensor:
        features = F.normalize(features.flatten(-2), dim=-1, eps=1e-7)
        return features @ features.transpose(-2, -1)  # [..., C, C]

    distance = torch.linalg.matrix_norm(gram(query)[:, None] - gram(supports))
    return distance / query.shape[1]


def other_classes(base_logits: Tensor, base_class: Tensor | None = None) -> Tensor:
    """p_b [B, 1, h, w]: probability that a pixel belongs to a base class, other than the episode's own.

    Args:
        base_logits: of the base learner, [B, 1 + base classes, h, w]; 0 is the background.
        base_class: the episode's class, [B]; 0 is none. None: no class is left out (novel classes).
    """
    counted = torch.ones_like(base_logits[:, :, :1, :1])
    counted[:, 0] = 0
    if base_class is not None:
        counted.scatter_(1, base_class[:, None, None, None], 0)
    return (base_logits.softmax(1) * counted).sum(1, keepdim=True)


class ShotWeights(nn.Module):
    """Weights of exactly K supports from their scene differences, whatever their order.

    Args:
        shot: K.
        dim: of the hidden layer between the sorted differences and the weights; 0 is one layer without bias,
            which starts with the mean of the differences for each, so that all supports weigh the same.
    """

    def __init__(self, shot: int, dim: int):
        super().__init__()
        if dim:
            self.layers = nn.Sequential(nn.Linear(shot, dim), nn.ReLU(inplace=True), nn.Linear(dim, shot))
        else:
            self.layers = nn.Linear(shot, shot, bias=False)
            nn.init.constant_(self.layers.weight, 1 / shot)

    def forward(self, psi: Tensor, alpha: Tensor) -> Tensor:
        """[B, K] that sum to 1, of scene differences and weights given in advance (> 0), both [B, K].

        Raises:
            ValueError: a weight is 0. Such a support would still move the others: the layer sees its psi.
        """
        if none := int((alpha == 0).sum()):
            raise ValueError(
                f"BAM's learned weights take no support that does not count: {none} of {alpha.numel()} have "
                "weight 0. Set aux.missing to duplicate or error and aux.weight above 0; or build and train "
                "BAM with shot: null, which leaves such supports out."
            )
        ordered, order = psi.sort(dim=1)
        scores = self.layers(ordered).gather(1, order.argsort(dim=1))
        return (scores + alpha.log()).softmax(1)


class ASPP(nn.Module):
    """A map [B, C, h, w] seen in five ways, [B, 5C, h, w]: its mean, 1x1, and 3x3 of three dilations."""

    def __init__(self, channels: int):
        super().__init__()
        self.mean = nn.Conv2d(channels, channels, 1)
        self.point = nn.Conv2d(channels, channels, 1)
        self.dilated = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation) for dilation in (6, 12, 18)
        )
        for conv in (self.mean, self.point, *self.dilated):
            nn.init.kaiming_normal_(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean(x.mean((2, 3), keepdim=True)).expand_as(x)
        return torch.cat([mean, self.point(x), *(conv(x) for conv in self.dilated)], dim=1).relu()


def keep_first() -> nn.Conv2d:
    """Weighted sum of two maps that starts as the first of them."""
    conv = nn.Conv2d(2, 1, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1))
    return conv


class BAM(nn.Module):
    """Meta learner on the frozen base learner's features, and the ensemble of both (stage 2 of the paper).

    Args:
        base_learner: trained on the fold's base classes; its backbone and head are used frozen, in eval mode.
            The published code lets the head's dropout act in meta-training; here its logits do not vary.
        shot: supports whose weights are learned from the scene differences: exactly that many are taken then,
            real and auxiliary ones together. None or 1: no such layer; any number, weighted as given.
        channels: of the meta learner.
        kshot_dim: of the hidden layer of the learned weights; 0 is one layer (see `ShotWeights`).
        dropout: of whole channels of the reduced features.

    Raises:
        ValueError: shot is below 1; or, in use with learned weights, the number of supports is not shot or
            one has weight 0.
    """

    def __init__(
        self,
        base_learner: PSPNet,
        shot: int | None = None,
        channels: int = 256,
        kshot_dim: int = 2,
        dropout: float = 0.5,
    ):
        super().__init__()
        if shot is not None and shot < 1:
            raise ValueError(
                f"BAM takes at least 1 support: shot is {shot}. Set it to the supports of an episode."
            )
        self.base_learner = base_learner.requires_grad_(False).eval()
        self.shot = shot
        self.shot_weights = ShotWeights(shot, kshot_dim) if (shot or 1) > 1 else None
        self.matcher = Matcher(self.backbone.channels, channels, dropout)
        self.merge = conv_relu(2 * channels + 1, channels)
        self.aspp = nn.Sequential(ASPP(channels), *conv_relu(5 * channels, channels))
        self.head = nn.Sequential(Residual(channels), head(channels))
        self.adjust, self.ensemble = keep_first(), keep_first()  # G and E of the paper

    @property
    def backbone(self) -> ResNet | VGG16:
        return self.base_learner.backbone

    def train(self, mode: bool = True):
        """Switch the meta learner; the base learner stays in eval mode."""
        super().train(mode)
        self.base_learner.eval()
        return self

    def weigh(self, psi: Tensor, alpha: Tensor) -> Tensor:
        """Weights of the supports [B, K], which sum to 1, from scene differences and given weights [B, K]."""
        if self.shot_weights is None:
            return alpha / alpha.sum(1, keepdim=True)
        if psi.shape[1] != self.shot:
            raise ValueError(
                f"This BAM has learned weights for exactly {self.shot} supports: {psi.shape[1]} were given. "
                f"Give {self.shot}, real and auxiliary ones together, or build and train it with shot: "
                f"{psi.shape[1]}, or with shot: null, which takes any number."
            )
        return self.shot_weights(psi, alpha)

    def forward(self, episodes: Episodes, base_class: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Maps at feature size: final and meta logits [B, 2, h, w], base logits [B, 1 + base classes, h, w].

        The final ones are a sum of probabilities that is used as logits. `base_class`: as in `other_classes`.
        """
        match = self.matcher(self.backbone, episodes)
        with torch.no_grad():
            base = resized(self.base_learner.logits_of(match.high_query), match.query.shape[-2:])
            others = other_classes(base, base_class)
            psi = scene_difference(match.low_query, match.low_supports)

        weights = self.weigh(psi, episodes.weights)
        meta = self.head(self.aspp(self.merge(guided(match.query, *match.average(weights)))))

        psi = (weights * psi).sum(1)[:, None, None, None].expand_as(others)
        background, foreground = (
            self.adjust(torch.cat([probability, psi], dim=1))
            for probability in meta.softmax(1).split(1, dim=1)
        )
        background = self.ensemble(torch.cat([background, others], dim=1))
        return torch.cat([background, foreground], dim=1), meta, base

    def losses(self, episodes: Episodes) -> dict[str, Tensor]:
        """Cross entropies: "loss" is that of the final plus that of the meta logits.

        The base learner's is for the log: nothing learns from it.

        Raises:
            ValueError: the episodes lack the labels of the query or the base classes.
        """
        missing = [n for n in ("label", "base_label", "base_class") if getattr(episodes, n) is None]
        if missing:
            raise ValueError(
                f"BAM learns from the query's label and its base classes: the episodes have no "
                f"{' and no '.join(missing)}. Give those of training, which have all of them."
            )
        size = episodes.label.shape[-2:]
        final, meta, base = (resized(logits, size) for logits in self(episodes, episodes.base_class))
        loss_final, loss_meta = (pixel_cross_entropy(logits, episodes.label) for logits in (final, meta))
        with torch.no_grad():
            loss_base = pixel_cross_entropy(base, episodes.base_label)
        return {
            "loss": loss_final + loss_meta,
            "loss_final": loss_final.detach(),
            "loss_meta": loss_meta.detach(),
            "loss_base": loss_base,
        }

    def predict(
        self, episodes: Episodes, resize: Callable[[Tensor], Tensor] = lambda logits: logits
    ) -> Tensor:
        """Mask of the object, int64 [B, h, w]; `resize` gets the final map, [B, 2, H, W] as the query."""
        final, _, _ = self(episodes)
        return resize(resized(final, episodes.query.shape[-2:])).argmax(1)
