"""The parts of the mini Stable Diffusion, and its folder in the layout of Stable Diffusion 1.x."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from datamodules.mini_world.captions import VOCABULARY

NUM_TOKENS = 48  # the longest caption of the mini world has about 40
WIDTH = 96  # of the text encoder and of the U-Net's cross-attention


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


def write_tokenizer(folder: Path, num_tokens: int, words: Sequence[str], closed: bool = False) -> int:
    """Write a CLIPTokenizer: each of the words is one token, other words byte pieces; return its size.

    Args:
        closed: say that its model has never read other words: models.prompts refuses classes called by them.
    """
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
        "closed_vocabulary": closed,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(tokens)


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of the mini world's words, also left in `folder`."""
    write_tokenizer(folder, NUM_TOKENS, VOCABULARY, closed=True)
    return CLIPTokenizer.from_pretrained(folder)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A random CLIP text encoder.

    Its embeddings start at deviation .2: at CLIP's .02 all class words begin alike.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=NUM_TOKENS,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    nn.init.normal_(model.get_input_embeddings().weight, std=0.2)
    return model


def build_unet() -> UNet2DConditionModel:
    """A random U-Net with the 4 levels and 12 decoder layers of SD 1.x, for latents of 16x16 and 32x32."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(48, 96, 96, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,  # diffusers reads it as the number of heads
        norm_num_groups=16,
    )


def build_vae() -> AutoencoderKL:
    """A random autoencoder that reduces by 4: at SD's 8 the thin classes of 128-px scenes are lost."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        scaling_factor=1.0,  # the latents are normalised per channel inside the weights
        sample_size=64,
    )


def save_pipeline(
    folder: Path, vae, unet, text_encoder, tokenizer_folder: Path, scheduler: DDIMScheduler
) -> None:
    """Write the fp16 folder beside its place and move it there, so that no half-written model is found."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline = StableDiffusionPipeline(
        vae=vae.to("cpu", torch.float16),
        unet=unet.to("cpu", torch.float16),
        text_encoder=text_encoder.to("cpu", torch.float16),
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer_folder),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(temporary)
    # transformers 5 writes tokenizer.json alone
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(tokenizer_folder / name, temporary / "tokenizer" / name)
    if (card := folder / "README.md").is_file():
        shutil.copy(card, temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
