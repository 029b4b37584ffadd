"""The weights that the repository carries."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline

from datamodules.mini_world.objects import render_objects
from models.diffusion.stable_diffusion import StableDiffusion
from scripts.mini_diffusion.state import weights_fingerprint
from scripts.report_mini_diffusion import check_controlnet, controlnet_folder
from scripts.train_mini_controlnet import CONTROLS

ASSETS = Path(__file__).parent.parent / "assets"
MODEL = ASSETS / "mini-diffusion"


def draw(pipeline, prompt, **arguments):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 4, "generator": generator, "output_type": "np", **arguments}
    return pipeline(prompt, height=64, width=64, **options).images[0]


def test_all_weights_together_are_small():
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= 20e6
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 45e6


def test_the_mini_model_loads_strictly_with_the_sizes_of_its_configs():
    diffusion = StableDiffusion(str(MODEL), parts=("unet", "vae_encoder", "vae_decoder", "text_encoder"))
    assert (diffusion.vae_factor, diffusion.stride, diffusion.num_tokens) == (4, 32, 48)
    assert diffusion.prediction_type == "epsilon" and len(diffusion.alpha_bars) == 1000


def test_the_pipeline_of_diffusers_loads_the_mini_model_and_draws():
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32)
    image = draw(pipeline, "a photo of a blue fish on sand")
    assert image.shape == (64, 64, 3)
    red, green, blue = image.mean((0, 1))
    assert image.std() > 0.02 and red > 0.1 and green > 0.1 and blue > 0.1


@pytest.mark.parametrize("kind", CONTROLS)
def test_the_pipeline_of_diffusers_draws_under_a_controlnet_of_these_weights(kind):
    check_controlnet(MODEL, kind, weights_fingerprint(MODEL))
    controlnet = ControlNetModel.from_pretrained(controlnet_folder(MODEL, kind), dtype=torch.float32)
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        MODEL, controlnet=controlnet, dtype=torch.float32
    )
    label = torch.from_numpy(render_objects("test", 0, size=64, count=1)["label"])[None]
    control = CONTROLS[kind](label)
    image, other = (
        draw(pipeline, "a photo", image=picture, num_inference_steps=10)
        for picture in (control, torch.zeros_like(control))
    )
    change = np.abs(image - other).mean(-1)
    inside = label[0].numpy() > 0
    assert change[inside].mean() > 1.5 * change[~inside].mean()
