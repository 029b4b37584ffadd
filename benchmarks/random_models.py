"""Stable Diffusion in its full sizes with random weights: for measurements and for checks of shapes."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from models.diffusion.stable_diffusion import DTYPES, StableDiffusion

VAE = {
    "sample_size": 512,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
UNET = {"sample_size": 64, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
}
# Of each version the U-Net's own options, the width of the text, and what the U-Net predicts.
VERSIONS = {
    "sd-1.4": ({"attention_head_dim": 8}, 768, "epsilon"),
    "sd-2.1": (
        {"attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
        1024,
        "v_prediction",
    ),
}


def random_model(
    version: str, device: str, texts: Sequence[str] = ("",), dtype: str = "float32"
) -> StableDiffusion:
    """A model of a version's sizes with random weights on a device, and random codes of some texts."""
    options, width, prediction = VERSIONS[version]
    configs = {
        "unet": {**UNET, **options, "cross_attention_dim": width},
        "vae": VAE,
        "text_encoder": {"hidden_size": width, "max_position_embeddings": 77},
        "scheduler": {**SCHEDULER, "prediction_type": prediction},
    }
    with tempfile.TemporaryDirectory() as folder:
        for part, config in configs.items():
            name = "scheduler_config.json" if part == "scheduler" else "config.json"
            (Path(folder) / part).mkdir()
            (Path(folder) / part / name).write_text(json.dumps(config))
        diffusion = StableDiffusion(folder, parts=(), dtype=dtype)
    with torch.device(device):
        unet = UNet2DConditionModel.from_config(configs["unet"])
        vae = AutoencoderKL.from_config(configs["vae"]).requires_grad_(False)
        diffusion.text_cache |= {text: torch.randn(77, width) for text in texts}
    # diffusers' own `to` warns of a cast that is wanted here.
    diffusion.unet = torch.nn.Module.to(unet, DTYPES[dtype]).requires_grad_(False)
    diffusion.vae = torch.nn.Module.to(vae, DTYPES[dtype])
    diffusion.parts = ("unet", "vae_encoder", "vae_decoder")
    return diffusion.eval()
