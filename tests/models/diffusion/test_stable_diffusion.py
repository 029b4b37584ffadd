import copy
import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from functional.noise import named_generator
from models.diffusion.attention import record_attention
from models.diffusion.features import tapped_module
from models.diffusion.stable_diffusion import StableDiffusion
from tests.tiny_model import write_tiny_model

ALL_PARTS = ("unet", "vae_encoder", "vae_decoder", "text_encoder")
TAPS = (11, 8, 5, "res.1.0", "ca.3.2")


@pytest.fixture(scope="module")
def diffusion(model_folder):
    return StableDiffusion(str(model_folder), parts=ALL_PARTS)


@pytest.fixture
def image():
    return torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0))


def run(model, image):
    """Output and features of one pass at step 100."""
    latent, context = model.encode(image), model.encode_text([""])
    return [model.predict(latent, 100, context), *model.features(latent, 100, context, TAPS)]


def test_all_parts_compute_what_diffusers_pipeline_computes(diffusion, model_folder, image):
    pipe = StableDiffusionPipeline.from_pretrained(model_folder)
    with torch.no_grad():
        latent = pipe.vae.encode(2 * image - 1).latent_dist.mean * pipe.vae.config.scaling_factor
        ids = pipe.tokenizer("a red car", padding="max_length", return_tensors="pt")["input_ids"]
        context = pipe.text_encoder(ids)[0]
        output = pipe.unet(latent, 100, context.expand(2, -1, -1)).sample
        decoded = pipe.vae.decode(latent / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    assert torch.equal(diffusion.encode(image), latent)
    assert torch.equal(diffusion.encode_text(["a red car"]), context)
    assert torch.equal(diffusion.predict(latent, 100, context).detach(), output)
    torch.testing.assert_close(diffusion.decode(latent), decoded)


def test_sizes_and_schedule_are_read_from_the_configs(tmp_path, diffusion, model_folder):
    assert (diffusion.vae_factor, diffusion.stride, diffusion.num_tokens) == (4, 32, 16)
    alphas = DDIMScheduler.from_pretrained(model_folder / "scheduler").alphas_cumprod
    torch.testing.assert_close(diffusion.alpha_bars.float(), alphas, rtol=1e-5, atol=0)
    folder = write_tiny_model(
        tmp_path,
        widths=(16, 16, 32, 32),
        vae_widths=(8, 8, 8, 8),
        context_width=24,
        num_tokens=9,
        prediction_type="v_prediction",
        scaling_factor=0.5,
    )
    other = StableDiffusion(str(folder))
    assert (other.vae_factor, other.stride, other.num_tokens, other.context_width) == (8, 64, 9, 24)
    assert (other.prediction_type, other.scaling_factor) == ("v_prediction", 0.5)
    context = other.encode_text(["a photo"])
    assert context.shape == (1, 9, 24)
    latent = other.encode(torch.rand(1, 3, 64, 128))
    assert latent.shape == (1, 4, 8, 16)
    assert [f.shape[1] for f in other.features(latent, 1, context, (5, 11))] == [32, 16]


def test_the_noise_of_a_velocity_model_is_that_of_the_scheduler(tmp_path):
    model = StableDiffusion(str(write_tiny_model(tmp_path, prediction_type="v_prediction")))
    latent, context = torch.randn(1, 4, 8, 8), model.encode_text([""])
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    velocity = model.predict(latent, 91, context)
    alpha_bar = scheduler.alphas_cumprod[91]
    expected = alpha_bar.sqrt() * velocity + (1 - alpha_bar).sqrt() * latent
    torch.testing.assert_close(model.predict_noise(latent, 91, context), expected)
    assert not torch.allclose(velocity, expected)


def test_an_epsilon_model_predicts_the_noise_itself(diffusion):
    latent, context = torch.randn(1, 4, 8, 8), diffusion.encode_text([""])
    assert torch.equal(diffusion.predict_noise(latent, 91, context), diffusion.predict(latent, 91, context))


def test_encoding_takes_the_mean_or_a_sample_that_only_its_generator_decides(diffusion, image):
    mean = diffusion.encode(image)
    assert torch.equal(mean, diffusion.encode(image))
    sample = diffusion.encode(image, named_generator("a"))
    assert torch.equal(sample, diffusion.encode(image, named_generator("a")))
    assert not torch.equal(sample, mean)
    assert not torch.equal(sample, diffusion.encode(image, named_generator("b")))
    each = diffusion.encode(image, [named_generator("a"), named_generator("b")])
    alone = diffusion.encode(image[1:], [named_generator("b")])
    torch.testing.assert_close(each[1:], alone)


def test_noise_is_added_at_a_step_of_the_schedule_for_all_or_each(diffusion):
    one = torch.ones(2, 4, 8, 8)
    torch.testing.assert_close(diffusion.add_noise(one, one, 100), 1.27086 * one, rtol=1e-5, atol=0)
    each = diffusion.add_noise(one, one, torch.tensor([100, 0]))
    assert torch.equal(each[0], diffusion.add_noise(one, one, 100)[0])
    assert float(each[1, 0, 0, 0]) == pytest.approx(0.999575 + 0.029155, abs=2e-6)


def test_parts_that_are_not_asked_for_are_absent_and_their_use_names_them(model_folder, image):
    model = StableDiffusion(str(model_folder), parts=("vae_encoder",))
    assert model.unet is model.text_encoder is model.tokenizer is model.vae.decoder is None
    assert not any("decoder" in name for name, _ in model.named_parameters())
    latent = model.encode(image)
    for part, call in {
        "vae_decoder": lambda: model.decode(latent),
        "unet": lambda: model.predict(latent, 0, torch.zeros(1, 16, 32)),
        "text_encoder": lambda: model.encode_text(["a"]),
    }.items():
        with pytest.raises(ValueError, match=f"{part} is not loaded"):
            call()
    decoder = StableDiffusion(str(model_folder), parts=("vae_decoder",))
    assert decoder.decode(latent).shape == image.shape
    with pytest.raises(ValueError, match="vae_encoder is not loaded"):
        decoder.encode(image)


def test_texts_are_encoded_once_and_outlive_the_text_encoder(model_folder):
    model = StableDiffusion(str(model_folder), parts=("text_encoder",))
    calls = []
    model.text_encoder.register_forward_hook(lambda module, inputs, output: calls.append(1))
    first = model.encode_text(["a red car", ""])
    again = model.encode_text(["", "a red car", ""])
    assert len(calls) == 1 and torch.equal(again, first[[1, 0, 1]])
    model.free_text_encoder()
    assert torch.equal(model.encode_text(["a red car"]), first[:1])
    with pytest.raises(ValueError, match="text_encoder is not loaded"):
        model.encode_text(["a blue car"])


def test_a_text_that_is_too_long_is_an_error_that_names_it_and_what_would_fit(diffusion):
    text = "a photo of " + "the red road and " * 3 + "dog"
    with pytest.raises(ValueError, match="has 18 tokens") as error:
        diffusion.encode_text(["a photo", text])
    assert repr(text) in str(error.value) and "reads 16" in str(error.value)
    diffusion.encode_text([text.removesuffix(" and dog")])  # 16 fit exactly


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights_give_nearly_the_result_of_float32(model_folder, diffusion, image, dtype):
    model = StableDiffusion(str(model_folder), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    output, *_ = run(model, image)
    reference, *_ = run(diffusion, image)
    assert output.dtype == torch.float32
    tolerance = {"float16": 2e-2, "bfloat16": 2e-1}[dtype]
    torch.testing.assert_close(output, reference, atol=tolerance, rtol=tolerance)
    assert not torch.equal(output, reference)


def test_the_vae_may_have_a_precision_of_its_own(model_folder, diffusion, image):
    model = StableDiffusion(str(model_folder), ALL_PARTS, vae_dtype="bfloat16")
    assert {p.dtype for p in model.vae.parameters()} == {torch.bfloat16}
    assert {p.dtype for part in (model.unet, model.text_encoder) for p in part.parameters()} == {
        torch.float32
    }
    latent, expected = model.encode(image), diffusion.encode(image)
    for found, reference in ((latent, expected), (model.decode(expected), diffusion.decode(expected))):
        assert found.dtype == torch.float32 and not torch.equal(found, reference)
        torch.testing.assert_close(found, reference, atol=0.05, rtol=0.05)
    model.train_unet()
    assert model.predict(latent, 100, model.encode_text([""])).requires_grad
    single = StableDiffusion(str(model_folder), ("vae_encoder",), dtype="bfloat16", vae_dtype="float32")
    assert torch.equal(single.encode(image), expected)


def test_the_untrained_control_changes_only_the_unet_and_follows_its_seed(model_folder, diffusion):
    state = torch.random.get_rng_state()
    control, same, other = (
        StableDiffusion(str(model_folder), ALL_PARTS, untrained_seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(state, torch.random.get_rng_state())
    key = "down_blocks.0.resnets.0.conv1.weight"
    weights = [m.unet.state_dict()[key] for m in (control, same, other, diffusion)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[3])
    for part in ("vae", "text_encoder"):
        found, expected = getattr(control, part).state_dict(), getattr(diffusion, part).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_the_untrained_control_needs_no_unet_weights(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "m")
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    control = StableDiffusion(str(folder), untrained_seed=0, dtype="float16")
    assert {p.dtype for p in control.unet.parameters()} == {torch.float16}


def test_a_unet_and_a_text_encoder_of_two_models_are_refused_by_family(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "m")
    for file, key, width in (("unet", "cross_attention_dim", 768), ("text_encoder", "hidden_size", 1024)):
        config = json.loads((folder / file / "config.json").read_text())
        (folder / file / "config.json").write_text(json.dumps(config | {key: width}))
    with pytest.raises(ValueError, match=r"768 \(SD 1\.x\).*1024 \(SD 2\.x\)"):
        StableDiffusion(str(folder))


@pytest.mark.parametrize(
    "change", [{"prediction_type": "sample"}, {"rescale_betas_zero_snr": True}, {"beta_schedule": "cosine"}]
)
def test_a_schedule_that_is_not_supported_is_refused(model_folder, tmp_path, change):
    folder = shutil.copytree(model_folder, tmp_path / "m")
    file = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=next(iter(change))):
        StableDiffusion(str(folder))


@pytest.mark.parametrize("option", [{"parts": ("unet", "vea")}, {"dtype": "float8"}, {"vae_dtype": "float8"}])
def test_an_unknown_option_lists_the_known_ones(model_folder, option):
    with pytest.raises(ValueError, match="choose from"):
        StableDiffusion(str(model_folder), **option)


def test_channels_last_changes_the_memory_format_and_not_the_result(model_folder, diffusion, image):
    model = StableDiffusion(str(model_folder), channels_last=True)
    weight = "down_blocks.0.resnets.0.conv1.weight"
    assert model.unet.get_parameter(weight).is_contiguous(memory_format=torch.channels_last)
    assert not diffusion.unet.get_parameter(weight).is_contiguous(memory_format=torch.channels_last)
    for found, expected in zip(run(model, image), run(diffusion, image), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_compiled_units_hold_no_module_that_can_be_tapped(model_folder, monkeypatch):
    units = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: units.append((self, options)))
    unet = StableDiffusion(str(model_folder), compile="inductor").unet
    compiled = {id(module) for unit, _ in units for module in unit.modules()}
    taps = [*range(12), "res.0.0", "res.3.2", "ca.1.0", "ca.3.2"]
    assert len(units) > 40 and {options["backend"] for _, options in units} == {"inductor"}
    assert not compiled & {id(tapped_module(unet, tap)) for tap in taps}


@pytest.mark.slow
def test_a_compiled_unet_gives_the_same_output_taps_and_attention(model_folder, diffusion, image):
    model = StableDiffusion(str(model_folder), compile="inductor")
    layer = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
    for _ in range(2):  # before and after a recorder, which must see every call
        for found, expected in zip(run(model, image), run(diffusion, image), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        with record_attention(model.unet, [layer]) as found:
            run(model, image)
        with record_attention(diffusion.unet, [layer]) as expected:
            run(diffusion, image)
        torch.testing.assert_close(found[layer], expected[layer], atol=1e-5, rtol=1e-4)


def test_everything_is_frozen_until_the_unet_is_trained(model_folder, diffusion, image):
    assert not any(p.requires_grad for p in diffusion.parameters()) and not diffusion.training
    model = StableDiffusion(str(model_folder))
    model.train_unet(last_layer=5)
    latent = model.encode(image)
    features = model.features(latent, 100, model.encode_text([""]), (5, 2))
    sum(feature.square().mean() for feature in features).backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None}
    assert "unet.up_blocks.1.resnets.2.conv2.weight" in trained and not any(
        "up_blocks.2" in n for n in trained
    )
    model.train_unet()
    assert all(p.requires_grad for p in model.unet.parameters())
    assert not any(p.requires_grad for p in model.vae.parameters())


def test_gradient_checkpointing_recomputes_activations_and_gives_the_same_gradients(model_folder, image):
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = StableDiffusion(str(model_folder))
        model.train_unet(last_layer=8, gradient_checkpointing=checkpointing)
        resnet = model.unet.down_blocks[0].resnets[0]
        counted = []
        resnet.register_forward_pre_hook(lambda module, inputs, counted=counted: counted.append(1))
        features = model.features(model.encode(image), 100, model.encode_text([""]), (8, 5))
        sum(f.square().mean() for f in features).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        calls.append(len(counted))
    assert calls == [1, 2]
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_training_half_precision_weights_is_refused(model_folder):
    with pytest.raises(ValueError, match="dtype: float32"):
        StableDiffusion(str(model_folder), dtype="bfloat16").train_unet()


def test_text_encoded_in_inference_mode_can_be_trained_with(model_folder):
    model = StableDiffusion(str(model_folder))
    with torch.inference_mode():
        model.encode_text(["a photo"])
    model.train_unet()
    model.predict(torch.randn(1, 4, 8, 8), 0, model.encode_text(["a photo"])).sum().backward()


def test_a_deep_copy_of_a_compiled_model_has_weights_of_its_own(model_folder):
    model = StableDiffusion(str(model_folder), parts=("unet",), compile="eager")
    twin = copy.deepcopy(model)
    unit, copied = (
        m.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.ff") for m in (model, twin)
    )
    x = torch.randn(1, 4, 64)
    before = unit(x)
    for parameter in copied.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(unit(x), before) and before.abs().max() > 0
    assert copied(x).abs().max() == 0
