"""What every method shares: parameter groups, schedule, scores by set, checkpoints without frozen weights."""

import csv
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from io import StringIO
from math import prod
from typing import Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.utils import clip_grads_with_norm_
from torchmetrics import Metric

from functional.classes import ClassTable, class_subset, class_table
from functional.fingerprint import weights_sha256
from functional.gradients import gradient_norm, trained
from functional.sliding_window import Predict, segment_image
from lightning_modules.metrics import ConfusionMatrix, matrix_scores, pixel_counts

NORMALISATIONS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm),
)

OPTIMIZERS: dict[str, Callable[[list[dict]], torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}


def parameter_groups(
    module: nn.Module,
    lr: float,
    weight_decay: float,
    lr_multipliers: dict[str, float],
    decay_norm_and_bias: bool,
) -> list[dict]:
    """Sort the trainable parameters into groups of one learning rate and one weight decay.

    Args:
        module: what is trained.
        lr: base learning rate.
        weight_decay: decay of all groups, but of norms and biases only if `decay_norm_and_bias`.
        lr_multipliers: factor of the learning rate by part of a parameter's name; several matches multiply.
        decay_norm_and_bias: False exempts the parameters of normalisation layers and those named `bias`.

    Raises:
        ValueError: nothing is trainable, or a part is in no trainable parameter's name.
    """
    groups, unused, seen = {}, set(lr_multipliers), set()
    for module_name, owner in module.named_modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{module_name}.{leaf}"
            parts = [part for part in lr_multipliers if part in name]
            unused -= set(parts)
            multiplier = prod(lr_multipliers[part] for part in parts)
            exempt = not decay_norm_and_bias and (leaf == "bias" or isinstance(owner, NORMALISATIONS))
            decay = 0.0 if exempt else weight_decay
            key = (multiplier, decay)
            group = {"params": [], "lr": lr * multiplier, "weight_decay": decay}
            groups.setdefault(key, group)["params"].append(parameter)
    if unused or not groups:
        raise ValueError(
            f"The optimiser cannot be built: found {len(seen)} trainable parameters, and no name among them "
            f"with {sorted(unused) or 'anything'}. Correct model.init_args.lr_multipliers, or train more."
        )
    return list(groups.values())


def describe_difference(stored: dict, names: list[str], colors: list[list[int]]) -> str:
    """List what differs between a stored class table and the one in use; empty if nothing does."""
    old = list(stored["names"])
    if old == names:
        changed = [n for n, a, b in zip(names, stored["colors"], colors, strict=True) if list(a) != list(b)]
        return f"other colours for {', '.join(changed)}" if changed else ""
    found = []
    if gone := [name for name in old if name not in names]:
        found.append(f"only in the checkpoint: {', '.join(gone)}")
    if new := [name for name in names if name not in old]:
        found.append(f"only in this model: {', '.join(new)}")
    if moved := [name for name in names if name in old and old.index(name) != names.index(name)]:
        found.append(f"with another id: {', '.join(moved)}")
    return "; ".join(found)


def subset_ids(table: ClassTable, subsets: Sequence[str]) -> dict[str, list[int]]:
    """Ids of the classes in each subset, by the name of its score: mIoU and the number of classes.

    Raises:
        ValueError: a subset is not known, or has a class that the table lacks.
    """
    ids = {}
    for subset in subsets:
        names = class_subset(subset)
        if missing := [name for name in names if name not in table.names]:
            raise ValueError(
                f"The class table {table.name!r} cannot be scored on {subset!r}: found no class "
                f"{' and no '.join(missing)} in it. Correct model.init_args.class_subsets."
            )
        ids[f"mIoU{len(names)}"] = [table.names.index(name) for name in names]
    return ids


def check_channels(network: nn.Module, inputs: tuple, logits: Tensor, *, num_classes: int) -> None:
    """Forward hook that refuses logits [B, C, H, W] of another number of classes than the table's.

    Raises:
        ValueError: names both numbers.
    """
    if logits.shape[1] != num_classes:
        raise ValueError(
            f"The network does not fit the class table: found logits of {logits.shape[1]} classes, the table "
            f"has {num_classes}. Set model.init_args.network.init_args.num_classes to {num_classes}."
        )


class SegmentationModule(LightningModule, ABC):
    """Trains a network from image [B, 3, H, W] in [0, 1] to logits [B, C, H, W]; a subclass adds the rule.

    Validation and test score each set of the DataModule on one confusion matrix and log, in percent,
    `val/<set>/mIoU`, `val/<set>/IoU/<class>`, `val/<set>/fwIoU`, `val/<set>/aAcc`, `val/<set>/mAcc`, and
    the mean over sets `val/mIoU`; also `mIoU16` of each set and their mean for a subset of 16 classes.

    Args:
        network: plain module, image to logits.
        classes: name of the class table; or words, which make a table of their own.
        lr: base learning rate.
        weight_decay: of the optimiser.
        schedule: (step, max_steps) -> multiplier of the learning rates; None keeps them constant.
        lr_multipliers: factor of the learning rate by part of a parameter's name, such as {"head": 10}.
        decay_norm_and_bias: whether weight decay also pulls on normalisation layers and biases.
        class_subsets: names of subsets of the classes over which the mean IoU is logged as well, such as
            "synthia16", see functional.classes.class_subset; predictions are among all classes.
        optimizer: "adamw" decouples weight decay; "adam" and "sgd", which has momentum .9, add it to the
            gradient.
    """

    trains = True  # train.py refuses a method that does not
    # Methods of the network, beside its forward, by which training runs it; None: FSDP cannot shard it.
    sharded_calls: tuple[str, ...] | None = None
    mean_scores: tuple[str, ...] = ("mIoU",)  # of a set's metric, and their mean over sets, are logged
    scores: tuple[str, ...] = ("fwIoU", "aAcc", "mAcc")  # of a set's metric, are logged by set only

    def __init__(
        self,
        network: nn.Module,
        classes: str | Sequence[str],
        lr: float = 6e-5,
        weight_decay: float = 0.01,
        schedule: Callable[[int, int], float] | None = None,
        lr_multipliers: dict[str, float] | None = None,
        decay_norm_and_bias: bool = True,
        class_subsets: Sequence[str] = (),
        optimizer: Literal["adamw", "adam", "sgd"] = "adamw",
    ):
        super().__init__()
        self.optimizer_name = optimizer
        self.network, self.classes = network, class_table(classes)
        # As a hook because training rules call the network in their own ways.
        check = partial(check_channels, num_classes=len(self.classes))
        self.channel_check = network.register_forward_hook(check)
        self.lr, self.weight_decay, self.schedule = lr, weight_decay, schedule
        self.lr_multipliers, self.decay_norm_and_bias = lr_multipliers or {}, decay_norm_and_bias
        self.subsets = subset_ids(self.classes, class_subsets)
        self.matrices: dict[str, Metric] = {}  # of the running or latest validation or test, by set
        self.image_rows: list[tuple[str, str, float]] = []  # set, name, score of each image of a test
        self.frozen_digests: dict[str, str] = {}
        self.gradient_norm: Tensor | None = None  # of the coming step, once it has been measured
        self.step_skipped = False  # whether the latest step was left out, because its gradient was not finite
        # How the images of a batch are predicted and scored: whole, until a command sets another way.
        self.protocol: Callable[[Predict, Tensor], Tensor] = segment_image

    @property
    def terms(self) -> dict[str, str]:
        """What a reader of the scores has to know, such as what the method was told beside the image."""
        return {}

    @abstractmethod
    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""

    def configure_optimizers(self):
        groups = parameter_groups(
            self, self.lr, self.weight_decay, self.lr_multipliers, self.decay_norm_and_bias
        )
        optimizer = OPTIMIZERS[self.optimizer_name](groups)
        max_steps = self.trainer.max_steps
        if self.schedule is not None and max_steps < 1:
            raise ValueError(
                f"A learning rate schedule needs the length of the run: found trainer.max_steps = "
                f"{max_steps}. Set trainer.max_steps."
            )

        def multiplier(step: int) -> float:
            return 1.0 if self.schedule is None else self.schedule(step, max_steps)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler, metric) -> None:
        """Go on in the schedule, which counts the steps that were taken."""
        if not self.step_skipped:
            super().lr_scheduler_step(scheduler, metric)

    def on_before_optimizer_step(self, optimizer) -> None:
        """Log the norm of the step's gradient, over all processes and before it is clipped."""
        if self.gradient_norm is None:
            self.gradient_norm = gradient_norm(trained(optimizer))
        self.log("train/gradient_norm", self.gradient_norm)
        if replaced := getattr(self.trainer.datamodule, "replaced", 0):  # that could not be read
            self.log("train/replaced_samples", float(replaced))

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the norm that was measured already."""
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            clip_grads_with_norm_(trained(optimizer), gradient_clip_val, self.gradient_norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.gradient_norm = None

    def on_train_start(self) -> None:
        # All processes built the same weights from one seed; from here on their dropout must differ.
        if self.global_rank > 0:
            torch.manual_seed(torch.initial_seed() + self.global_rank)

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image)

    def segment(self, image: Tensor, names: Sequence[str] | None = None) -> Tensor:
        """Return logits [B, C, h, w] of images, or of parts or resized copies of images of these names.

        A method that draws noise by name overrides this: all parts and copies of an image share its name.
        """
        return self(image)

    def logits(self, batch: dict) -> Tensor:
        """Return the scores [B, C, H, W] of a batch's images by the protocol; their argmax is the class."""
        return self.protocol(partial(self.segment, names=batch.get("name")), batch["image"])

    def predict_step(self, batch: dict, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the class ids [B, H, W] of a batch's images."""
        return self.logits(batch).argmax(1)

    def start_scoring(self, stage: str) -> None:
        names = getattr(self.trainer.datamodule, f"{stage}_set_names")
        self.matrices = {name: self.metric().to(self.device) for name in names}

    def metric(self) -> Metric:
        """Return what counts the pixels of one set."""
        return ConfusionMatrix(len(self.classes))

    def score(self, batch: dict, batch_idx: int, dataloader_idx: int) -> Tensor:
        logits, label = self.logits(batch), batch["label"]
        if (
            logits.shape[-2:] != label.shape[-2:]
        ):  # the label has the size of the file, the image a smaller one
            logits = interpolate(logits, size=label.shape[-2:], mode="bilinear", align_corners=False)
        prediction = logits.argmax(1)
        list(self.matrices.values())[dataloader_idx].update(prediction, label)
        return prediction

    @property
    def scored_names(self) -> Sequence[str]:
        """Names of the classes that a metric's IoUs belong to."""
        return self.classes.names

    def details(self) -> dict[str, str]:
        """Files by name, as text, that a test leaves beside its scores: the score of each image alone."""
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["set", "name", "mIoU"])
        writer.writerows([name, image, f"{value:.3f}"] for name, image, value in self.image_rows)
        return {"images.csv": text.getvalue()}

    def image_names(self, batch: dict) -> list[str]:
        """A name for each sample of a batch, no two alike in a set."""
        return batch["name"]

    def image_score(self, scores: dict[str, Tensor]) -> Tensor:
        """What stands for one image among the scores of its own confusion matrix, in percent."""
        return scores["mIoU"]

    def log_scores(self, stage: str) -> None:
        scores, keys = {}, (*self.mean_scores, *self.subsets, *self.scores)
        for name, matrix in self.matrices.items():
            found = matrix.compute()
            found |= {key: found["IoU"][ids].nanmean() for key, ids in self.subsets.items()}
            scores |= {f"{stage}/{name}/{key}": found[key] for key in keys}
            ious = zip(self.scored_names, found["IoU"], strict=True)
            scores |= {f"{stage}/{name}/IoU/{class_name}": iou for class_name, iou in ious}
        for key in (*self.mean_scores, *self.subsets):
            means = torch.stack([scores[f"{stage}/{name}/{key}"] for name in self.matrices])
            scores[f"{stage}/{key}"] = means.nanmean()
        # Every process has the scores of all; sync_dist only spares Lightning's warning that they might not.
        # On the device, because NCCL cannot reduce what lies on the CPU.
        found = {name: value.float().to(self.device) for name, value in scores.items()}
        self.log_dict(found, sync_dist=True)

    def on_validation_start(self) -> None:
        """Score with the first process's running statistics in all processes, as they are in a checkpoint.

        Each process has its own after a step of training.
        """
        if isinstance(self.trainer.strategy, ParallelStrategy):
            for buffer in self.network.buffers():
                torch.distributed.broadcast(buffer, 0)

    def on_validation_epoch_start(self) -> None:
        self.start_scoring("val")

    def validation_step(self, batch: dict, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.score(batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self.log_scores("val")

    def on_test_epoch_start(self) -> None:
        self.start_scoring("test")
        self.image_rows = []

    def test_step(self, batch: dict, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        prediction = self.score(batch, batch_idx, dataloader_idx)
        set_name = list(self.matrices)[dataloader_idx]
        for name, *ids in zip(self.image_names(batch), prediction, batch["label"], strict=True):
            scores = matrix_scores(pixel_counts(*ids, len(self.classes)))
            self.image_rows.append((set_name, name, self.image_score(scores).item()))
        return prediction

    def on_test_epoch_end(self) -> None:
        if self.trainer.world_size > 1:
            shares = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(shares, self.image_rows)
            self.image_rows = [row for share in shares for row in share]
        sets = list(self.matrices)
        self.image_rows.sort(key=lambda row: (sets.index(row[0]), row[1]))  # the same for any number of them
        self.log_scores("test")

    def frozen_parameters(self) -> dict[str, Tensor]:
        """Return the weights that a checkpoint leaves out because training never changes them.

        A network with weights that change without gradients, a teacher's, names them by teacher_parameters().
        """
        teacher = getattr(self.network, "teacher_parameters", dict)()
        learned = {f"network.{name}" for name in teacher}
        named = self.named_parameters(remove_duplicate=False)
        return {name: p for name, p in named if not (p.requires_grad or name in learned)}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        table = self.classes
        checkpoint["classes"] = {
            "name": table.name,
            "names": list(table.names),
            "colors": [list(color) for color in table.colors],
        }
        frozen = self.frozen_parameters()
        if not self.frozen_digests:
            self.frozen_digests = digests_by_part(frozen)
        checkpoint["frozen"] = {"names": sorted(frozen), "sha256": self.frozen_digests}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Check the class table and the frozen weights, and put these where strict loading looks for them.

        Raises:
            ValueError: the checkpoint is of another class table, or rests on other frozen weights.
        """
        if missing := [key for key in ("classes", "frozen") if key not in checkpoint]:
            raise ValueError(
                f"The checkpoint is not one of ours: found no {' and no '.join(missing)} in it. "
                "Give a checkpoint that train.py wrote."
            )
        table, stored = self.classes, checkpoint["classes"]
        difference = describe_difference(stored, list(table.names), [list(color) for color in table.colors])
        if difference:
            raise ValueError(
                f"The checkpoint is of class table {stored['name']!r} ({len(stored['names'])} classes), the "
                f"model of {table.name!r} ({len(table)}); {difference}. Use the config of its run."
            )
        weights, names = self.state_dict(), checkpoint["frozen"]["names"]
        own = digests_by_part({name: weights[name] for name in names if name in weights})
        expected = checkpoint["frozen"]["sha256"]
        if wrong := sorted(part for part in expected if own.get(part) != expected[part]):
            raise ValueError(
                f"The checkpoint was trained on other frozen weights: found a different SHA-256 for "
                f"{', '.join(wrong)}. Load them from where the run's config took them, in the same precision."
            )
        self.frozen_digests = own
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **{name: weights[name] for name in names}}


def digests_by_part(weights: dict[str, Tensor]) -> dict[str, str]:
    """SHA-256 of the weights of each part: the first three steps of a name, as in network.diffusion.unet."""
    parts = defaultdict(dict)
    for name, tensor in weights.items():
        parts[".".join(name.split(".")[:-1][:3])][name] = tensor
    return {part: weights_sha256(tensors) for part, tensors in parts.items()}
