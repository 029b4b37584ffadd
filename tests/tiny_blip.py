"""A random BLIP of a few thousand weights in the folder layout of the published one, written in a moment."""

import json
from pathlib import Path

import torch
from transformers import BlipConfig, BlipForConditionalGeneration
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

WORDS = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photograph", "photography", "picture", "of"),
    *("plane", "cat", "traffic", "light", "on", "the", "grass", "flying", "red", "sitting", "and", "##s"),
    "##ing",
)
BEGIN, END = len(WORDS), WORDS.index("[SEP]")  # BLIP's begin of text has an id beyond the vocabulary


def write_tiny_blip(folder: Path, seed: int = 4) -> Path:
    config = BlipConfig(
        text_config={
            "vocab_size": len(WORDS) + 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "bos_token_id": BEGIN,
            "sep_token_id": END,
            "initializer_range": 0.7,
        },
        vision_config={
            "image_size": 32,
            "patch_size": 16,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "initializer_range": 0.7,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BlipForConditionalGeneration(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder
