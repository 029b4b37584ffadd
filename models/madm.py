"""MADM: student and teacher that segment a modality without labels on a diffusion model (arXiv 2410.21708).

Features are named by their stride, 2 ** number, in SD 1.x: s0 is the decoded regression at the image's size;
s3, s4, s5 are decoder layers 11, 8, 5. Where paper and released code differ, the defaults are the code's.
"""

from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from functional.noise import fixed_noise, match_noise
from models.diffusion.conditioning import LearnedConditioning, add_time_residual
from models.diffusion.features import record_features, tap_shape
from models.diffusion.stable_diffusion import StableDiffusion
from models.heads.daformer import DAFormerHead

TAPS = (11, 8, 5)  # s3, s4, s5
GROUPS = 32  # of the projections' GroupNorm


@dataclass
class MADMOutput:
    """What one pass gives for images [B, 3, H, W]; h, w are those of the padded latent.

    Attributes:
        logits: [B, C, H, W].
        latent: U-Net output o [B, 4, h, w], float32, trained to be the latent of the coloured label; None
            without LPLR.
        decoded: D(o) [B, 3, H, W], about [-1, 1] but not clipped, without gradient; None without LPLR.
    """

    logits: Tensor
    latent: Tensor | None
    decoded: Tensor | None


def conv_norm(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    """Convolution that keeps the size, without bias, Kaiming-normal (fan out); GroupNorm of 32 groups."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.GroupNorm(GROUPS, out_channels))


class Projection(nn.Module):
    """Residual bottleneck [B, in, h, w] -> [B, out, h, w]; widths other than `in` are multiples of 32."""

    def __init__(self, in_channels: int, channels: int, out_channels: int):
        super().__init__()
        self.conv1 = conv_norm(in_channels, channels, 1)
        self.conv2 = conv_norm(channels, channels, 3)
        self.conv3 = conv_norm(channels, out_channels, 1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else conv_norm(in_channels, out_channels, 1)

    def forward(self, feature: Tensor) -> Tensor:
        inner = self.conv2(self.conv1(feature).relu()).relu()
        return (self.conv3(inner) + self.shortcut(feature)).relu()


class Adapter(nn.Module):
    """What MADM adds to a diffusion model, one each for student and teacher: conditioning, projections, head.

    Args:
        text: embedding of the empty text, [1, tokens, width].
        time_width: of the U-Net's time MLP.
        widths: channels of each feature before and after its projection, fine to coarse.
        num_classes, bottleneck_channels, embed_channels, channels, dropout: see MADM.
    """

    def __init__(
        self,
        text: Tensor,
        time_width: int,
        widths: Sequence[tuple[int, int]],
        num_classes: int,
        bottleneck_channels: int,
        embed_channels: int,
        channels: int,
        dropout: float,
    ):
        super().__init__()
        self.conditioning = LearnedConditioning(text, time_width)
        self.projections = nn.ModuleList(Projection(i, bottleneck_channels, o) for i, o in widths)
        projected = [width for _, width in widths]
        self.head = DAFormerHead(projected, num_classes, embed_channels, channels, dropout=dropout)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Logits [B, C, h, w] in the size of the first of the features, which are ordered fine to coarse."""
        pairs = zip(self.projections, features, strict=True)
        return self.head([projection(feature) for projection, feature in pairs])


class MADM(nn.Module):
    """Student and teacher on one Stable Diffusion: noised latent, one U-Net pass, projections, DAFormer head.

    Student and teacher share the U-Net unless `ema_unet` and have an adapter each; the teacher's is the
    moving average of the student's and normalises by batch statistics, which it never stores. Images of any
    size are padded right and bottom with their edge pixels to the model's stride; logits are cut back.

    Args:
        diffusion: of dtype float32 (its vae_dtype may be half), with unet, vae_encoder, text_encoder (dropped
            once it has encoded "") and, for LPLR, vae_decoder.
        num_classes: of the logits.
        lplr: label palette and latent regression: the head's finest feature is the decoded regression s0;
            without it, the VAE encoder's feature of half the latent's stride (SD: 512 channels, stride 4).
        projection_channels: of the projected features; of s0 it is bottleneck_channels.
        bottleneck_channels: inside the projections. Both are multiples of 32.
        embed_channels, channels, dropout: of the head.
        noise_seed, noise_size: of the one noise of all images, which is resized if latents have another size.
        fresh_noise: in training draw noise for each image (torch's global generator, as dropout does).
        train_output_layers: train also the U-Net's conv_norm_out and conv_out, frozen in the released code.
        ema_unet: give the teacher a moving average of the U-Net too.
        teacher_dropout: the published runs had the head's dropout active in the teacher, in training.
        gradient_checkpointing: recompute activations of U-Net, projections and head in the backward pass.

    Raises:
        ValueError: a part is missing; the U-Net is not float32; a width is no multiple of 32; output layers
            are trained without LPLR.
    """

    def __init__(
        self,
        diffusion: StableDiffusion,
        num_classes: int,
        lplr: bool = True,
        projection_channels: int = 512,
        bottleneck_channels: int = 128,
        embed_channels: int = 256,
        channels: int = 256,
        dropout: float = 0.1,
        noise_seed: int = 42,
        noise_size: tuple[int, int] = (64, 64),
        fresh_noise: bool = False,
        train_output_layers: bool = False,
        ema_unet: bool = False,
        teacher_dropout: bool = False,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        for part in ("unet", "vae_encoder", *(("vae_decoder",) if lplr else ())):
            diffusion.require(part)
        check_widths(projection_channels=projection_channels, bottleneck_channels=bottleneck_channels)
        if train_output_layers and not lplr:
            raise ValueError(
                "The U-Net's output layers learn from the latent regression only: found "
                "train_output_layers = true with lplr = false. Set train_output_layers to false."
            )
        self.lplr, self.fresh_noise, self.teacher_dropout = lplr, fresh_noise, teacher_dropout
        self.gradient_checkpointing, self.train_output_layers = gradient_checkpointing, train_output_layers
        text = diffusion.encode_text([""])
        diffusion.free_text_encoder()
        diffusion.train_unet(None if train_output_layers else TAPS[0], gradient_checkpointing)
        self.diffusion = diffusion
        self.register_buffer("noise", fixed_noise(noise_size, diffusion.latent_channels, noise_seed))
        s0, s2 = (3, bottleneck_channels), (self.encoder_layer.out_channels, projection_channels)
        decoder = [(tap_shape(diffusion.unet, tap)[0], projection_channels) for tap in TAPS]
        time_width = diffusion.unet.time_embedding.linear_2.out_features
        head = (num_classes, bottleneck_channels, embed_channels, channels, dropout)
        self.adapter = Adapter(text, time_width, [s0 if lplr else s2, *decoder], *head)
        self.ema_adapter = deepcopy(self.adapter).requires_grad_(False)
        drop_running_statistics(self.ema_adapter)
        self.ema_unet = deepcopy(diffusion.unet).requires_grad_(False) if ema_unet else None
        self.train()

    @property
    def encoder_layer(self) -> nn.Module:
        """The VAE encoder's layer of the finest feature without LPLR."""
        return self.diffusion.vae.encoder.down_blocks[-2].resnets[0]

    def train(self, mode: bool = True) -> "MADM":
        """As usual for the student's adapter; U-Net and VAE stay in eval mode (SD has no dropout)."""
        super().train(mode)
        self.diffusion.eval()
        self.ema_adapter.eval()  # without running statistics BatchNorm takes the batch's in either mode
        self.ema_adapter.head.dropout.train(mode and self.teacher_dropout)
        return self

    def forward(self, image: Tensor) -> Tensor:
        """The student's logits [B, C, H, W] of an image [B, 3, H, W] in [0, 1] at timestep 0."""
        return self.student(image).logits

    def student(self, image: Tensor, timestep: int = 0, latent: Tensor | None = None) -> MADMOutput:
        """One pass of what is trained, with gradient.

        Args:
            image: [B, 3, H, W] in [0, 1].
            timestep: at which the latent is noised and the U-Net runs; the same for all images.
            latent: encode(image), where it is known already; with LPLR only.

        Raises:
            ValueError: a latent is given without LPLR.
        """
        return self.segment(self.diffusion.unet, self.adapter, image, timestep, latent)

    @torch.no_grad()
    def teacher(self, image: Tensor, timestep: int, latent: Tensor | None = None) -> MADMOutput:
        """One pass of the teacher, without gradient; arguments as in student."""
        unet = self.diffusion.unet if self.ema_unet is None else self.ema_unet
        return self.segment(unet, self.ema_adapter, image, timestep, latent)

    def segment(
        self, unet: nn.Module, adapter: Adapter, image: Tensor, timestep: int, latent: Tensor | None
    ) -> MADMOutput:
        """What student and teacher share; arguments as there."""
        if not self.lplr:
            latent, finest = self.encode_with_feature(image, latent)
        elif latent is None:
            latent = self.encode(image)
        noised = self.diffusion.add_noise(latent, self.noise_like(latent), timestep)
        # Filled on the device: a copy of the number from the host would make it wait.
        timesteps = torch.full((len(latent),), timestep, device=latent.device)
        context, residual = adapter.conditioning()
        arguments = self.diffusion.unet_arguments(noised, timesteps, context)
        with add_time_residual(unet, residual), record_features(unet, TAPS) as features:
            output = unet(*arguments).sample.float()
        if self.lplr:
            finest = decoded = self.decode_latent(output.detach())
        logits = self.classify(adapter, [finest, *(features[tap] for tap in TAPS)])
        size = [side * self.diffusion.vae_factor for side in latent.shape[-2:]]
        if logits.shape[-2:] != tuple(size):
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        height, width = image.shape[-2:]
        if not self.lplr:
            return MADMOutput(logits[..., :height, :width], None, None)
        return MADMOutput(logits[..., :height, :width], output, decoded[..., :height, :width])

    def classify(self, adapter: Adapter, features: list[Tensor]) -> Tensor:
        """Logits of features; recomputed in the backward pass if asked for."""
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return adapter(features)

        def contexts():
            return nullcontext(), untouched_buffers(adapter)

        return checkpoint(adapter, features, use_reentrant=False, context_fn=contexts)

    def noise_like(self, latent: Tensor) -> Tensor:
        """The fixed noise in the size of the latent, or a fresh one."""
        if self.fresh_noise and self.training:
            return torch.randn_like(latent)
        return match_noise(self.noise, latent)

    def encode(self, image: Tensor) -> Tensor:
        """Scaled posterior mean [B, 4, h, w] of an image [B, 3, H, W] in [0, 1], padded to the stride."""
        return self.diffusion.encode(self.diffusion.pad(image))

    def encode_with_feature(self, image: Tensor, latent: Tensor | None) -> tuple[Tensor, Tensor]:
        """Latent and the VAE encoder's finest feature of one pass; see student for the error."""
        if latent is not None:
            raise ValueError(
                "Without LPLR a latent is not enough, for the head takes a feature of the VAE's encoder too: "
                "found a latent. Leave it out; one pass over the image gives both."
            )
        found = []
        handle = self.encoder_layer.register_forward_hook(lambda *call: found.append(call[-1].float()))
        try:
            return self.encode(image), found[0]
        finally:
            handle.remove()

    def decode_latent(self, latent: Tensor) -> Tensor:
        """D(o): image [B, 3, H, W] of a latent, in about [-1, 1], not clipped, without gradient."""
        return 2 * self.diffusion.decode(latent) - 1

    @torch.no_grad()
    def update_teacher(self, step: int, max_alpha: float = 0.999) -> None:
        """Move the teacher to the student at the start of a step: theta' <- alpha theta' + (1 - alpha) theta.

        Args:
            step: completed optimiser steps k; alpha = min(1 - 1 / (k + 1), max_alpha), so that the teacher is
                the mean of all students until max_alpha is reached. Nothing happens before the first.
        """
        if step < 1:
            return
        alpha = min(1 - 1 / (step + 1), max_alpha)
        pairs = [(self.ema_adapter, self.adapter)]
        pairs += [] if self.ema_unet is None else [(self.ema_unet, self.diffusion.unet)]
        for teacher, student in pairs:
            for average, current in zip(teacher.parameters(), student.parameters(), strict=True):
                if current.requires_grad:
                    average.lerp_(current, 1 - alpha)

    def teacher_parameters(self) -> dict[str, nn.Parameter]:
        """The teacher's own parameters by name, which training changes although they have no gradient."""
        return {name: p for name, p in self.named_parameters() if name.startswith("ema_")}


def check_widths(**widths: int) -> None:
    """Raise a ValueError for a width that the projections' GroupNorm cannot divide."""
    for name, width in widths.items():
        if width < GROUPS or width % GROUPS:
            nearest = max(round(width / GROUPS), 1) * GROUPS
            raise ValueError(
                f"{name} must be a multiple of {GROUPS}, the groups that the projections normalise: found "
                f"{width}. Set model.init_args.network.init_args.{name} to {nearest}."
            )


def drop_running_statistics(module: nn.Module) -> None:
    """Let each BatchNorm use the statistics of its batch in training and evaluation, and keep none."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.track_running_stats = False
            part.running_mean = part.running_var = part.num_batches_tracked = None


@contextmanager
def untouched_buffers(module: nn.Module):
    """Inside the block the module works on copies of its buffers: a recomputed forward pass must not move
    BatchNorm's running statistics a second time.
    """
    buffers = [(m, name, b) for m in module.modules() for name, b in m.named_buffers(recurse=False)]
    for owner, name, buffer in buffers:
        setattr(owner, name, buffer.clone())
    try:
        yield
    finally:
        for owner, name, buffer in buffers:
            setattr(owner, name, buffer)
