"""A random Stable Diffusion 1.x in the folder layout of diffusers, written and loaded in a moment."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from scripts.mini_diffusion.layout import write_tokenizer

WORDS = (
    *("a", "photo", "of", "photograph", "and", "on", "the", "red", "blue", "road", "car", "person"),
    *("tree", "sky", "building", "plane", "flying", "dog", "hot", "grass"),
)


def write_tiny_model(
    folder: Path | str,
    *,
    widths: Sequence[int] = (32, 64, 64, 64),
    vae_widths: Sequence[int] = (16, 16, 32),
    heads: int = 2,
    context_width: int = 32,
    num_tokens: int = 16,
    prediction_type: str = "epsilon",
    scaling_factor: float = 0.18215,
    words: Sequence[str] = WORDS,
    seed: int = 0,
    **save_options,
) -> Path:
    """Write model_index.json, unet, vae, text_encoder, tokenizer and scheduler; return the folder.

    The U-Net has the 4 levels and 12 decoder layers of SD 1.x; the VAE reduces by 2 ** (len(vae_widths) - 1),
    x4 by default. `save_options` go to diffusers' save_pretrained (variant="fp16", safe_serialization=False).
    """
    folder = Path(folder)
    vocabulary = write_tokenizer(folder / "tokenizer", num_tokens, words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=tuple(widths),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            layers_per_block=2,
            cross_attention_dim=context_width,
            attention_head_dim=heads,  # diffusers reads it as the number of heads
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            block_out_channels=tuple(vae_widths),
            down_block_types=("DownEncoderBlock2D",) * len(vae_widths),
            up_block_types=("UpDecoderBlock2D",) * len(vae_widths),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            scaling_factor=scaling_factor,
            sample_size=64,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocabulary,
                hidden_size=context_width,
                intermediate_size=2 * context_width,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=num_tokens,
                bos_token_id=vocabulary - 2,
                eos_token_id=vocabulary - 1,
                pad_token_id=vocabulary - 1,
            )
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    unet.save_pretrained(folder / "unet", **save_options)
    vae.save_pretrained(folder / "vae", **save_options)
    text_options = {k: v for k, v in save_options.items() if k != "safe_serialization"}
    text_encoder.save_pretrained(folder / "text_encoder", **text_options)
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder
