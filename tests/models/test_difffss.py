import shutil

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)

from models.difffss import SAMPLERS, SupportGenerator, initial_noise, load_controlnet, make_scheduler
from models.diffusion.stable_diffusion import StableDiffusion
from tests.tiny_difffss import tiny_generator, write_tiny_models

PROMPT, NEGATIVE = "a photo of a plane", "a dog"
CONTROL = torch.rand(3, 32, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    write_tiny_models(path)
    return path


@pytest.fixture(scope="module")
def make(folder):
    """Generators of the same weights."""
    model = tiny_generator(folder)
    return lambda **options: SupportGenerator(model.diffusion, model.controlnet, **{"steps": 2, **options})


@pytest.fixture(scope="module")
def generator(make):
    return make()


@pytest.fixture(scope="module")
def drawn(generator):
    return generator(PROMPT, NEGATIVE, CONTROL, [3, 4, 5, 6])


def test_a_batch_has_an_image_per_seed_at_the_size_of_the_control(drawn):
    assert drawn.shape == (4, 3, 32, 64) and drawn.dtype == torch.float32
    assert drawn.min() >= 0 and drawn.max() <= 1
    assert not torch.equal(drawn[0], drawn[1])


def test_drawing_again_gives_the_same_bits_on_the_cpu(folder, drawn):
    assert torch.equal(tiny_generator(folder)(PROMPT, NEGATIVE, CONTROL, [3, 4, 5, 6]), drawn)


def test_an_image_depends_on_its_own_seed_and_not_on_the_others_of_its_batch(generator, drawn):
    others = generator(PROMPT, NEGATIVE, CONTROL, [9, 4, 8, 7])
    assert torch.equal(others[1], drawn[1]) and not torch.equal(others[0], drawn[0])
    torch.testing.assert_close(generator(PROMPT, NEGATIVE, CONTROL, [5])[0], drawn[2], rtol=0, atol=1e-4)


def test_the_first_noise_is_the_same_alone_and_in_a_batch():
    together = initial_noise([1, 2, 3], (4, 8, 8))
    assert torch.equal(together[1:2], initial_noise([2], (4, 8, 8)))
    expected = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(2))
    assert torch.equal(together[1], expected)


def test_the_result_is_that_of_diffusers_own_pipeline(folder, drawn):
    controlnet = ControlNetModel.from_pretrained(folder / "controlnet")
    base = StableDiffusionPipeline.from_pretrained(folder / "model")
    pipeline = StableDiffusionControlNetPipeline.from_pipe(base, controlnet=controlnet)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        [PROMPT] * 4,
        image=CONTROL[None].repeat(4, 1, 1, 1),
        negative_prompt=[NEGATIVE] * 4,
        num_inference_steps=2,
        guidance_scale=9.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4, 5, 6)],
        output_type="pt",
    ).images
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance": 2.0},
        {"guidance": 1.0},
        {"steps": 3},
        {"control_scale": 0.5},
        {"control_end": 0.5},
        {"sampler": "unipc"},
        {"sampler": "dpmpp_2m"},
    ],
)
def test_each_option_changes_the_images(make, drawn, options):
    assert not torch.equal(make(**options)(PROMPT, NEGATIVE, CONTROL, [3, 4, 5, 6]), drawn)


def test_prompt_negative_prompt_and_control_change_the_images(generator, drawn):
    seeds = [3, 4, 5, 6]
    assert not torch.equal(generator("a photo of a car", NEGATIVE, CONTROL, seeds), drawn)
    assert not torch.equal(generator(PROMPT, "", CONTROL, seeds), drawn)
    assert not torch.equal(generator(PROMPT, NEGATIVE, 1 - CONTROL, seeds), drawn)


def test_each_prompt_is_encoded_once(generator):
    calls = []
    generator.diffusion.text_cache.clear()
    hook = generator.diffusion.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    for prompt in (PROMPT, PROMPT, "a photo of a car"):
        generator(prompt, NEGATIVE, CONTROL, [1])
    hook.remove()
    assert len(calls) == 2


def test_20_ddim_steps_are_the_timesteps_of_the_published_code(generator):
    scheduler = make_scheduler(generator.diffusion.folder, "ddim")
    scheduler.set_timesteps(20)
    assert scheduler.timesteps.tolist() == list(range(951, 0, -50))
    assert not scheduler.config.clip_sample and not scheduler.config.set_alpha_to_one


def test_every_sampler_reads_the_noise_schedule_of_the_model(folder):
    for name, (kind, _) in SAMPLERS.items():
        scheduler = make_scheduler(folder / "model", name)
        assert isinstance(scheduler, kind)
        assert scheduler.config.beta_schedule == "scaled_linear" and scheduler.config.beta_end == 0.012
    with pytest.raises(ValueError, match="'euler': choose from ddim, unipc, dpmpp_2m"):
        make_scheduler(folder / "model", "euler")


def test_a_control_that_does_not_fit_the_model_is_refused(generator):
    with pytest.raises(ValueError, match=r"multiples of 32.*found \[3, 32, 40\]"):
        generator(PROMPT, NEGATIVE, CONTROL[..., :40], [1])


@pytest.mark.parametrize(
    "option", [{"steps": 0}, {"guidance": 0.5}, {"control_scale": -1.0}, {"control_end": 0.0}]
)
def test_an_option_out_of_range_is_an_error_that_names_it(make, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} {next(iter(option.values())):g}"):
        make(**option)


def test_parts_that_are_not_loaded_are_asked_for(folder, generator):
    diffusion = StableDiffusion(str(folder / "model"), parts=("unet", "text_encoder"))
    with pytest.raises(ValueError, match="vae_decoder is not loaded"):
        SupportGenerator(diffusion, generator.controlnet)


def test_nothing_of_the_generator_can_be_trained(generator):
    assert not any(parameter.requires_grad for parameter in generator.parameters())
    assert not generator.controlnet.training


def test_the_weights_of_a_controlnet_take_the_type_asked_for(folder):
    assert load_controlnet(str(folder / "controlnet"), "bfloat16").dtype == torch.bfloat16


def test_a_controlnet_that_is_incomplete_is_an_error_that_names_what_is_missing(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(folder / "controlnet", tmp_path / "controlnet")
    file = broken / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop("conv_in.bias")
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"conv_in\.bias"):
        load_controlnet(str(broken))
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks diffusion_pytorch_model\.safetensors"):
        load_controlnet(str(broken))


@pytest.mark.parametrize("path", ["assets/no-such-controlnet", "owner/no-such-controlnet"])
def test_a_controlnet_that_cannot_be_had_is_an_error_with_a_way_out(path):
    with pytest.raises(FileNotFoundError, match="Give a local path"):
        load_controlnet(path)
