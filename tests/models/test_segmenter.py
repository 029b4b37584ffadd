import pytest
import torch
from torch import nn

from functional.noise import fixed_noise
from models.diffusion.stable_diffusion import StableDiffusion
from models.segmenter import DiffusionSegmenter


@pytest.fixture
def build(model_folder):
    def build(**options):
        torch.manual_seed(0)
        diffusion = StableDiffusion(str(model_folder))
        return DiffusionSegmenter(diffusion, 5, **{"embed_channels": 16, "channels": 16, **options}).eval()

    return build


@pytest.fixture
def image():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(64, 64), (33, 70), (1, 1), (100, 32)])
def test_logits_have_the_size_of_the_image_whatever_it_is(build, size):
    assert build()(torch.rand(1, 3, *size)).shape == (1, 5, *size)


def test_padding_repeats_the_edge_and_is_cut_off_again(build):
    segmenter, image = build(), torch.rand(1, 3, 50, 40)
    padded = nn.functional.pad(image, (0, 24, 0, 14), mode="replicate")
    assert torch.equal(segmenter(image), segmenter(padded)[..., :50, :40])


def test_two_passes_give_equal_logits_and_each_option_changes_them(build, image):
    logits = build()(image)
    assert torch.equal(logits, build()(image))
    for option in (
        {"timestep": 10},
        {"noise_seed": 1},
        {"layers": (5, 8)},
        {"channels": 8},
        {"embed_channels": 8},
    ):
        assert not torch.equal(build(**option)(image), logits), option


def test_all_images_get_the_same_noise_of_unit_variance_at_any_size(build, image, monkeypatch):
    segmenter, seen = build(), []
    original = segmenter.diffusion.add_noise

    def add_noise(latent, noise, timestep):
        seen.append(noise)
        return original(latent, noise, timestep)

    monkeypatch.setattr(segmenter.diffusion, "add_noise", add_noise)
    for batch in (torch.rand(2, 3, 256, 256), torch.rand(1, 3, 256, 256), torch.rand(1, 3, 512, 128)):
        segmenter(batch)
    assert torch.equal(seen[0], fixed_noise((64, 64))) and torch.equal(seen[0], seen[1])
    assert all(noise.std().item() == pytest.approx(1, abs=0.02) for noise in seen)


def test_features_are_the_tapped_layers_from_fine_to_coarse(build, image):
    features = build(layers=(5, 11, 8)).features(image)
    assert [tuple(feature.shape[1:]) for feature in features] == [(32, 16, 16), (64, 8, 8), (64, 4, 4)]
    assert all(feature.dtype == torch.float32 for feature in features)


def test_frozen_only_the_head_learns_and_the_diffusion_model_stays_in_eval_mode(build, image):
    segmenter = build().train()
    assert segmenter.head.training and not any(m.training for m in segmenter.diffusion.modules())
    before = {name: p.detach().clone() for name, p in segmenter.named_parameters()}
    segmenter(image).square().mean().backward()
    learning = {name for name, p in segmenter.named_parameters() if p.grad is not None}
    assert learning == {name for name in before if name.startswith("head.")}
    assert learning == {name for name, p in segmenter.named_parameters() if p.requires_grad}
    assert not any(feature.requires_grad for feature in segmenter.features(image))


def test_training_the_unet_gives_gradients_to_exactly_its_part_before_the_last_tap(build, image):
    segmenter = build(train_unet=True, layers=(5, 8)).train()
    segmenter(image).square().mean().backward()
    trained = {name for name, p in segmenter.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in segmenter.named_parameters() if p.grad is not None}
    assert any(name.startswith("diffusion.unet.up_blocks.2") for name in trained)
    assert not any(name.startswith(("diffusion.unet.up_blocks.3", "diffusion.vae")) for name in trained)
    assert not segmenter.diffusion.training
    with torch.no_grad():
        assert not segmenter(image).requires_grad


def test_checkpointing_the_unet_keeps_the_gradients(build, image):
    gradients = []
    for checkpointing in (False, True):
        segmenter = build(train_unet=True, gradient_checkpointing=checkpointing)
        assert segmenter.diffusion.unet.is_gradient_checkpointing == checkpointing
        segmenter(image).square().mean().backward()
        gradients.append(segmenter.diffusion.unet.conv_in.weight.grad)
    torch.testing.assert_close(*gradients)


def test_the_text_encoder_is_dropped_and_the_text_does_not_enter_the_state(build):
    segmenter = build()
    assert segmenter.diffusion.text_encoder is None
    assert "context" not in segmenter.state_dict()


def test_dropout_of_the_head_is_an_option(build):
    assert build(dropout=0.25).head.dropout.p == 0.25


def test_a_diffusion_model_without_a_needed_part_is_refused(model_folder):
    with pytest.raises(ValueError, match="vae_encoder is not loaded"):
        DiffusionSegmenter(StableDiffusion(str(model_folder), parts=("unet", "text_encoder")), 5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_frozen_model_in_half_precision_feeds_a_float32_head(model_folder, build, image, dtype):
    diffusion = StableDiffusion(str(model_folder), dtype=dtype)
    segmenter = build()
    expected = segmenter(image)
    half = DiffusionSegmenter(diffusion, 5, embed_channels=16, channels=16).eval()
    half.head.load_state_dict(segmenter.head.state_dict())
    torch.testing.assert_close(half(image), expected, atol=0.1, rtol=0.1)


def test_mixed_precision_works_frozen_and_trained(build, image):
    for options in ({}, {"train_unet": True}):
        segmenter = build(**options).train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = segmenter(image)
        logits.float().square().mean().backward()
        assert segmenter.head.classifier.weight.grad.isfinite().all()
