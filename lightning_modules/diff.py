"""DIFF's training rule: both branches learn from the labels, and to agree (arXiv 2406.00777)."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn.functional import mse_loss

from functional.losses import weighted_cross_entropy
from lightning_modules.base import SegmentationModule, check_channels


class DIFFTraining(SegmentationModule):
    """Cross entropy of the conditional and of the unconditional branch, and the distance of their logits.

    The cross entropies are divided by the number of all pixels, those ignored included; the distance is the
    mean squared difference of the logits in the size of the head, with gradient to both. The unconditional
    branch alone is scored.

    Args:
        network: models.diff.DIFF.
        conditional: whether there is a conditional branch in training; without it one cross entropy is left.
        consistency: weight of the distance.
        classes, lr, weight_decay, schedule, lr_multipliers, decay_norm_and_bias, class_subsets: see
            SegmentationModule.

    Raises:
        ValueError: the backbone's prompts are for another class table.
    """

    def __init__(
        self,
        network: nn.Module,
        classes: str,
        conditional: bool = True,
        consistency: float = 1.0,
        lr: float = 6e-5,
        weight_decay: float = 0.01,
        schedule: Callable[[int, int], float] | None = None,
        lr_multipliers: dict[str, float] | None = None,
        decay_norm_and_bias: bool = True,
        class_subsets: Sequence[str] = (),
    ):
        if network.backbone.classes != classes:
            raise ValueError(
                f"The prompts are for another class table: found {network.backbone.classes!r}, the model's "
                f"is {classes!r}. Set classes of model.init_args.network.init_args.backbone to the same."
            )
        super().__init__(
            network, classes, lr, weight_decay, schedule, lr_multipliers, decay_norm_and_bias, class_subsets
        )
        self.conditional, self.consistency = conditional, consistency

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        image, label = batch["image"], batch["label"]
        if not self.conditional:
            loss = weighted_cross_entropy(self.network(image), label)
            self.log("train/loss", loss.detach(), prog_bar=True)
            return loss
        conditional, unconditional = self.network.branches(image, label)
        check_channels(self.network, (), unconditional, num_classes=len(self.classes))
        loss_conditional, loss_unconditional = (
            weighted_cross_entropy(self.network.backbone.diffusion.unpad(logits, image), label)
            for logits in (conditional, unconditional)
        )
        distance = mse_loss(conditional.float(), unconditional.float())
        loss = loss_conditional + loss_unconditional + self.consistency * distance
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/loss_conditional", loss_conditional.detach())
        self.log("train/loss_unconditional", loss_unconditional.detach())
        self.log("train/consistency", distance.detach())
        return loss

    def segment(self, image: Tensor, names: Sequence[str] | None = None) -> Tensor:
        """Return the logits of the unconditional branch; the images' names seed their noise."""
        return self.network(image, names)
