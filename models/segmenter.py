"""A segmenter on features of one pass through a diffusion model: the baseline of every method."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from functional.noise import fixed_noise
from models.diffusion.features import tap_shape
from models.diffusion.stable_diffusion import StableDiffusion
from models.heads.daformer import DAFormerHead


class DiffusionSegmenter(nn.Module):
    """VAE encoder, fixed noise at one timestep, one U-Net pass with the empty prompt, DAFormer head.

    Args:
        diffusion: with unet, vae_encoder, text_encoder; the text encoder is dropped once it has encoded "".
        num_classes: of the logits.
        layers: decoder layers that are tapped (0..11).
        timestep: at which the latent is noised and the U-Net runs.
        noise_seed: of the noise, which is the same for all images of a size.
        embed_channels, channels, dropout: of the head; the defaults are DAFormer's.
        train_unet: train also the part of the U-Net that feeds the last tap; else all of it is frozen.
        gradient_checkpointing: recompute the U-Net's activations in the backward pass to save memory.
    """

    def __init__(
        self,
        diffusion: StableDiffusion,
        num_classes: int,
        layers: Sequence[int] = (5, 8, 11),
        timestep: int = 100,
        noise_seed: int = 42,
        embed_channels: int = 256,
        channels: int = 256,
        dropout: float = 0.1,
        train_unet: bool = False,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        for part in ("unet", "vae_encoder"):
            diffusion.require(part)
        self.layers = tuple(
            sorted(layers, reverse=True)
        )  # later layers are finer; the head wants fine to coarse
        self.timestep = timestep
        self.learns_unet = train_unet
        self.noise_seed = noise_seed
        # Computed again at each construction, so it does not belong into a checkpoint.
        self.register_buffer("context", diffusion.encode_text([""]), persistent=False)
        diffusion.free_text_encoder()
        self.diffusion = diffusion
        if train_unet:
            diffusion.train_unet(last_layer=self.layers[0], gradient_checkpointing=gradient_checkpointing)
        widths = [tap_shape(diffusion.unet, layer)[0] for layer in self.layers]
        self.head = DAFormerHead(widths, num_classes, embed_channels, channels, dropout=dropout)

    def train(self, mode: bool = True) -> "DiffusionSegmenter":
        """As usual for the head; the diffusion model stays in eval mode (SD has no dropout to train with)."""
        super().train(mode)
        self.diffusion.eval()
        return self

    def features(self, image: Tensor) -> list[Tensor]:
        """Features [B, C, h, w], float32, fine to coarse, of an image [B, 3, H, W] that fits the stride."""
        latent = self.diffusion.encode(image)
        # Drawn at the latent's size: resizing one tensor, as MADM does, would change the noise's variance.
        noise = fixed_noise(latent.shape[-2:], latent.shape[1], self.noise_seed)
        noised = self.diffusion.add_noise(latent, noise, self.timestep)
        with torch.set_grad_enabled(self.learns_unet and torch.is_grad_enabled()):
            features = self.diffusion.features(noised, self.timestep, self.context, self.layers)
        return [feature.float() for feature in features]

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, num_classes, H, W] of an image [B, 3, H, W] in [0, 1] of any size.

        Right and bottom are padded with the edge pixels to the model's stride, and cut off again.
        """
        logits = self.head(self.features(self.diffusion.pad(image)))
        return self.diffusion.unpad(logits, image)
