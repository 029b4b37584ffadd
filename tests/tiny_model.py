"""A random Stable Diffusion 1.x in the folder layout of diffusers, written and loaded in a moment."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

WORDS = (
    *(
        "a",
        "photo",
        "of",
        "photograph",
        "and",
        "on",
        "the",
        "red",
        "blue",
        "road",
        "car",
        "person",
        "tree",
        "sky",
    ),
    *("building", "plane", "flying", "dog", "hot", "grass"),
)


def byte_alphabet() -> list[str]:
    """The 256 printable characters by which CLIP's byte-pair encoding writes bytes."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    characters = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return [characters[byte] for byte in (*visible, *hidden)]


def merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Join each occurrence of the pair of neighbours, from left to right."""
    merged = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def write_tokenizer(folder: Path, num_tokens: int = 16, words: Sequence[str] = WORDS) -> int:
    """Write a CLIPTokenizer in which each of the words is one token, others are pieces; return its size."""
    merges: list[tuple[str, str]] = []
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:  # what the earlier merges make of the word; the rest is merged from left to right
            parts = merge(parts, pair)
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = merge(parts, merges[-1])
    letters = byte_alphabet()
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *dict.fromkeys(left + right for left, right in merges),
    ]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": num_tokens,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "do_lower_case": True,
        "add_prefix_space": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(tokens)


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
