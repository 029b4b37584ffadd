"""MADM's training rule: from labelled RGB to unlabelled images of another sensor (arXiv 2410.21708).

Symbols of the paper: k is the global step, so that it survives a resume; x_s, y_s, x_t are the images and the
label of a batch, x_m, y_m, M the class-mixed image, its label and the mask of pasted source pixels; q is the
quality of a pseudo label; o the student's `latent`, g the latent of a coloured label.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Generator, Tensor

from functional.class_mix import jitter_and_blur, mix_mask, mixed_weights, paste
from functional.losses import latent_regression, regression_mask, weighted_cross_entropy
from functional.noise import dplg_timestep, named_generator
from functional.palette import encode_palette, palette_table
from functional.pseudo_labels import pseudo_labels
from lightning_modules.base import SegmentationModule, check_channels
from models.madm import MADM


class MADMTraining(SegmentationModule):
    """Trains on batches {"source": {"image", "label"}, "target": {"image"}} of images of one size.

    Optimises manually: the loss on the source is back-propagated, and its graph freed, before the mixed image
    is seen, which halves the memory of activations; the gradients are those of the sum. Each image has its
    own mask, augmentation and quality, so a larger batch means the same as more processes.

    Args:
        network: with `lplr` False there is no palette and no latent regression.
        classes: name of the class table; its colours are the palette.
        lr, weight_decay, schedule, lr_multipliers, decay_norm_and_bias: see SegmentationModule.
        dplg: noise the teacher's latent at a timestep that decays to 0; False keeps it at 0.
        dplg_start: first and last of the integers that the timestep decays from; a process draws one a step.
        dplg_end_step: step from which the timestep is 0, K_end.
        threshold: confidence from which a pixel counts for the quality, tau; included.
        source_regression, mixed_regression: weights of the latent regression on source and mixed image.
        max_alpha: bound of the teacher's share in its moving average.
        max_gradient_norm: to which the norm over all trainable parameters is clipped.
        micro_batches: equal parts in which a batch is worked through to save memory. A part is what a process
            is in the published runs (two of one pair each): it has its own timestep and batch statistics.
        seed: of all that a step draws, together with k and the part; dropout excepted.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(
        self,
        network: MADM,
        classes: str,
        lr: float = 5e-6,
        weight_decay: float = 0.05,
        schedule: Callable[[int, int], float] | None = None,
        lr_multipliers: dict[str, float] | None = None,
        decay_norm_and_bias: bool = False,
        dplg: bool = True,
        dplg_start: tuple[int, int] = (60, 61),
        dplg_end_step: int = 5000,
        threshold: float = 0.968,
        source_regression: float = 1.0,
        mixed_regression: float = 1.0,
        max_alpha: float = 0.999,
        max_gradient_norm: float = 0.01,
        micro_batches: int = 1,
        seed: int = 42,
    ):
        super().__init__(network, classes, lr, weight_decay, schedule, lr_multipliers, decay_norm_and_bias)
        self.automatic_optimization = False
        self.dplg, self.dplg_start, self.dplg_end_step = dplg, tuple(dplg_start), dplg_end_step
        self.threshold, self.max_alpha, self.max_gradient_norm = threshold, max_alpha, max_gradient_norm
        weights = {"source": source_regression, "mixed": mixed_regression}
        self.regression = weights if network.lplr else dict.fromkeys(weights, 0.0)
        self.micro_batches, self.seed = micro_batches, seed
        self.check_options(weights)
        self.register_buffer("palette", palette_table(self.classes.colors), persistent=False)
        self.pictures: dict[str, dict[str, Tensor]] | None = None  # a dict in steps that are to be drawn

    @property
    def sharded_calls(self) -> tuple[str, ...] | None:
        """Those of a step. A U-Net of the teacher's own is not sharded."""
        return ("student", "teacher") if self.network.ema_unet is None else None

    def check_options(self, weights: dict[str, float]) -> None:
        """Raise a ValueError for an option out of its range; the weights are those of the regression."""
        start, steps = self.dplg_start, len(self.network.diffusion.alpha_bars)
        increasing = [type(t) for t in start] == [int, int] and 0 <= start[0] <= start[1] < steps
        rules = {
            "dplg_start": (start, increasing, f"two integers, 0 <= first <= last < {steps}"),
            "dplg_end_step": (self.dplg_end_step, self.dplg_end_step >= 1, "at least 1"),
            "threshold": (self.threshold, 0 < self.threshold <= 1, "above 0 and at most 1"),
            "max_alpha": (self.max_alpha, 0 <= self.max_alpha <= 1, "from 0 to 1"),
            "max_gradient_norm": (self.max_gradient_norm, self.max_gradient_norm > 0, "above 0"),
            "micro_batches": (self.micro_batches, self.micro_batches >= 1, "at least 1"),
        }
        rules |= {f"{name}_regression": (w, w >= 0, "0 or more") for name, w in weights.items()}
        for option, (value, valid, wanted) in rules.items():
            if not valid:
                raise ValueError(f"{option} must be {wanted}: found {value}. Set model.init_args.{option}.")

    def training_step(self, batch: dict, batch_idx: int) -> None:
        optimizer, step = self.optimizers(), self.global_step
        if not self.step_skipped:  # the student is as it was
            self.network.update_teacher(step, self.max_alpha)
        optimizer.zero_grad()
        logged = []
        for part, (image, label, target) in enumerate(self.parts(batch)):
            place = self.global_rank * self.micro_batches + part
            generator = named_generator(f"step {step} part {place}", self.seed)
            logged.append(self.accumulate(image, label, target, generator, part == self.micro_batches - 1))
        optimizer.step()
        if not self.step_skipped:
            self.lr_schedulers().step()
        self.log_dict({name: torch.stack([each[name] for each in logged]).mean() for name in logged[0]})

    def parts(self, batch: dict) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Source images, source labels and target images of each micro-batch.

        Raises:
            ValueError: the images cannot be mixed, or the batch cannot be divided.
        """
        images = batch["source"]["image"], batch["source"]["label"], batch["target"]["image"]
        source, target = images[0].shape, images[2].shape
        if source != target or source[0] % self.micro_batches:
            raise ValueError(
                "Source and target images are mixed, so they need one shape [B, 3, H, W], with B a multiple "
                f"of micro_batches: found {list(source)} and {list(target)} with {self.micro_batches}. Set "
                "the crop and batch sizes of both DataModules, or model.init_args.micro_batches."
            )
        return zip(*(tensor.chunk(self.micro_batches) for tensor in images), strict=True)

    def accumulate(
        self, image: Tensor, label: Tensor, target: Tensor, generator: Generator, last: bool
    ) -> dict[str, Tensor]:
        """Add the gradients of a micro-batch to those of the step and return what to log.

        Args:
            image, label: of the source, [b, 3, H, W] and [b, H, W]. target: image, [b, 3, H, W].
            generator: of all that is drawn.
            last: whether no micro-batch follows in this step.
        """
        timestep = self.timestep(generator)
        *latents, target_latent = self.encode(image, *self.colored("source", label), target)
        found = self.learn("source", image, latents, label)

        teacher = self.network.teacher(target, timestep, target_latent)
        pseudo_label, quality = pseudo_labels(teacher.logits, self.threshold)
        if self.pictures is not None:
            maps = {"pseudo_label": pseudo_label, "confidence": teacher.logits.float().softmax(1).amax(1)}
            self.show("target", teacher.decoded, image=target, **maps)
        mask = mix_mask(label, generator)
        mixed = jitter_and_blur(paste(mask, image, target), generator)
        mixed_label, weight = paste(mask, label, pseudo_label), mixed_weights(mask, quality)

        latents = self.encode(mixed, *self.colored("mixed", mixed_label))
        found |= self.learn("mixed", mixed, latents, mixed_label, weight, quality, synchronise=last)
        # The timestep stays on the CPU: copying a number to the device would wait for the device.
        return found | {"train/quality": quality.mean(), "train/timestep": torch.tensor(float(timestep))}

    def learn(
        self,
        name: str,
        image: Tensor,
        latents: Sequence[Tensor | None],
        label: Tensor,
        weight: Tensor | None = None,
        quality: Tensor | None = None,
        synchronise: bool = False,
    ) -> dict[str, Tensor]:
        """Back-propagate the student's loss on one kind of image; its graph is freed on return.

        Args:
            name: "source" or "mixed".
            image: [b, 3, H, W]. latents: of the image and, for a regression, of its coloured label.
            label, weight: of the cross entropy, [b, H, W]; None weighs all pixels alike.
            quality: weight of the regression on all of an image, [b], pasted pixels included; None is 1.
            synchronise: whether processes exchange their gradients now.
        """
        latent, *goal = latents
        output = self.network.student(image, latent=latent)
        check_channels(self.network, (), output.logits, num_classes=len(self.classes))
        loss = weighted_cross_entropy(output.logits, label, weight)
        found = {f"train/loss_{name}": loss.detach()}
        if goal:
            mask, factor = regression_mask(label, quality), self.network.diffusion.vae_factor
            regression = latent_regression(output.latent, goal[0], mask, factor)
            found[f"train/regression_{name}"] = regression.detach()
            loss = loss + self.regression[name] * regression
        elif self.network.train_output_layers:
            # Processes wait for a gradient of every trained layer in each backward pass, be it of zeros.
            loss = loss + 0 * output.latent.sum()
        strategy = self.trainer.strategy
        alone = synchronise or not isinstance(strategy, ParallelStrategy)
        with nullcontext() if alone else strategy.block_backward_sync():
            self.manual_backward(loss / self.micro_batches)
        if self.pictures is not None:
            self.show(name, output.decoded, image=image, label=label, prediction=output.logits.argmax(1))
        return found

    def timestep(self, generator: Generator) -> int:
        """Timestep t_k of the teacher; what is drawn after it does not depend on `dplg`."""
        drawn = dplg_timestep(self.global_step, *self.dplg_start, self.dplg_end_step, generator)
        return drawn if self.dplg else 0

    def colored(self, name: str, label: Tensor) -> list[Tensor]:
        """Coloured labels as images [b, 3, H, W] in [0, 1], if this kind of image has a regression."""
        return [encode_palette(label, self.palette)] if self.regression[name] else []

    def encode(self, *images: Tensor) -> Sequence[Tensor | None]:
        """Latents of several batches [b, 3, H, W] by one call of the autoencoder; with LPLR only.

        Without it the network encodes for itself, because it also takes a feature of the encoder.
        """
        if not self.network.lplr:
            return [None] * len(images)
        return self.network.encode(torch.cat(images)).split(len(images[0]))

    def show(self, row: str, decoded: Tensor | None, **pictures: Tensor) -> None:
        """Keep the first picture of each batch, and of the decoded regression, for a row of the panels."""
        if decoded is not None:
            pictures["regression"] = (decoded.float() + 1) / 2
        self.pictures[row] = {title.replace("_", " "): batch[0].detach() for title, batch in pictures.items()}

    def on_before_optimizer_step(self, optimizer) -> None:
        # Here, and not in training_step, because a gradient scaler has unscaled the gradients by now.
        super().on_before_optimizer_step(optimizer)
        self.configure_gradient_clipping(optimizer, self.max_gradient_norm)
