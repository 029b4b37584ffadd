"""A tiny random Stable Diffusion with a ControlNet that has an effect, and images to draw supports for."""

from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel
from transformers import CLIPConfig, CLIPModel

from models.difffss import SupportGenerator, load_controlnet
from models.diffusion.stable_diffusion import StableDiffusion
from scripts.mini_diffusion.layout import write_tokenizer
from tests.tiny_model import WORDS, write_tiny_model


def write_tiny_models(folder: Path) -> tuple[Path, Path]:
    """Write folder/model and folder/controlnet in the layout of diffusers."""
    base = write_tiny_model(folder / "model", widths=(8, 16, 16, 16), vae_widths=(8, 8, 8))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet = StableDiffusion(str(base), parts=("unet",)).unet
        controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8))
        for name, parameter in controlnet.named_parameters():
            if name.startswith(("controlnet_down_blocks", "controlnet_mid", "controlnet_cond")):
                torch.nn.init.normal_(parameter, std=0.3)  # those that begin as zeros would have no effect
    controlnet.save_pretrained(folder / "controlnet")
    return base, folder / "controlnet"


def tiny_generator(folder: Path, **options) -> SupportGenerator:
    """A SupportGenerator of the models in write_tiny_models' folder."""
    diffusion = StableDiffusion(str(folder / "model"), ("unet", "vae_decoder", "vae_encoder", "text_encoder"))
    return SupportGenerator(diffusion, load_controlnet(str(folder / "controlnet")), **{"steps": 2, **options})


def write_tiny_clip(folder: Path, seed: int = 0) -> str:
    """Write a CLIP with tokenizer in the layout of transformers; return the folder's path."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(folder, 16, WORDS)
    text = {"vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 16, "eos_token_id": vocabulary - 1}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    clip.save_pretrained(folder)
    return str(folder)


class TwoPlanes:
    """Images of 40x56 pixels: plane (1) and dog (2) in each, with a void pixel; stems have a folder."""

    def __init__(self, dataset: str = "pascal", count: int = 2):
        self.dataset, self.count, self.class_names = dataset, count, {1: "plane", 2: "dog"}

    def __len__(self) -> int:
        return self.count

    def aux_key(self, index: int, class_id: int) -> tuple[str, int]:
        return f"train2014/image_{index:03d}", class_id

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        label = np.zeros((40, 56), np.uint8)
        label[5:20, 5 : 20 + index] = 1
        label[25:38, 30:50] = 2
        label[0, 0] = 255
        return np.random.default_rng(index).integers(0, 256, (40, 56, 3), np.uint8), label
