"""The weights that the repository carries."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from models.diffusion.stable_diffusion import StableDiffusion

MODEL = Path(__file__).parent.parent / "assets/mini-diffusion"


def test_the_mini_model_is_small_and_loads_strictly_with_the_sizes_of_its_configs():
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= 20e6
    diffusion = StableDiffusion(str(MODEL), parts=("unet", "vae_encoder", "vae_decoder", "text_encoder"))
    assert (diffusion.vae_factor, diffusion.stride, diffusion.num_tokens) == (4, 32, 48)
    assert diffusion.prediction_type == "epsilon" and len(diffusion.alpha_bars) == 1000


def test_the_pipeline_of_diffusers_loads_the_mini_model_and_draws():
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipeline(
        "a photo of a blue fish on sand", 64, 64, num_inference_steps=4, generator=generator, output_type="np"
    ).images[0]
    assert image.shape == (64, 64, 3)
    red, green, blue = image.mean((0, 1))
    assert image.std() > 0.02 and red > 0.1 and green > 0.1 and blue > 0.1
