import pytest
import torch
from diffusers import UNet2DConditionModel

from models.diffusion.attention import attention_layers
from models.diffusion.features import (
    decoder_layers,
    extract_features,
    modules_after,
    record_features,
    tap_shape,
    tapped_module,
)
from models.diffusion.stable_diffusion import StableDiffusion

ALL_TAPS = [*range(12), *(f"res.{i}.{j}" for i in range(4) for j in range(3))]
ALL_TAPS += [f"ca.{i}.{j}" for i in range(1, 4) for j in range(3)]


@pytest.fixture(scope="module")
def unet(model_folder):
    return StableDiffusion(str(model_folder), parts=("unet",)).unet


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(2, 4, 16, 8, generator=generator)
    return latent, torch.tensor([100, 100]), torch.randn(2, 16, 32, generator=generator)


def walk_decoder(unet, latent, timestep, context):
    """The decoder written out with the U-Net's own modules: all taps without a hook."""
    emb = unet.time_embedding(unet.time_proj(timestep))
    sample = unet.conv_in(latent)
    skips = [sample]
    for block in unet.down_blocks:
        extra = {"encoder_hidden_states": context} if hasattr(block, "attentions") else {}
        sample, states = block(hidden_states=sample, temb=emb, **extra)
        skips += states
    sample = unet.mid_block(sample, emb, encoder_hidden_states=context)
    taps = {}
    for i, block in enumerate(unet.up_blocks):
        for j, resnet in enumerate(block.resnets):
            joined = torch.cat([sample, skips.pop()], dim=1)
            sample = resnet(joined, emb)
            taps[f"res.{i}.{j}"] = sample - resnet.conv_shortcut(joined)  # block output - shortcut
            if hasattr(block, "attentions"):
                transformer = block.attentions[j]
                hidden = transformer.proj_in(transformer.norm(sample))
                tokens = transformer.transformer_blocks[0](
                    hidden.flatten(2).transpose(1, 2), encoder_hidden_states=context
                )
                taps[f"ca.{i}.{j}"] = tokens.transpose(1, 2).reshape(hidden.shape)
                sample = transformer(sample, encoder_hidden_states=context, return_dict=False)[0]
            taps[3 * i + j] = sample
        for upsampler in block.upsamplers or []:
            sample = upsampler(sample)
    return taps, unet.conv_out(unet.conv_act(unet.conv_norm_out(sample)))


def test_every_tap_equals_the_decoder_written_out(unet, inputs):
    with torch.no_grad(), record_features(unet, ALL_TAPS) as features:
        output = unet(*inputs).sample
        expected, expected_output = walk_decoder(unet, *inputs)
    assert set(features) == set(ALL_TAPS) and torch.equal(output, expected_output)
    for tap in ALL_TAPS:
        exact = not str(tap).startswith("res")  # there the expected value comes from a difference
        torch.testing.assert_close(features[tap], expected[tap], **({"atol": 0, "rtol": 0} if exact else {}))


def test_stopping_after_the_last_tap_gives_the_values_of_a_full_forward(unet, inputs):
    with torch.no_grad():
        with record_features(unet, ALL_TAPS) as full:
            unet(*inputs)
        for taps in ([5], [2, 0], ["res.1.1", 3], ["ca.2.0"], [11, 8, 5]):
            stopped = extract_features(unet, taps, *inputs)
            assert set(stopped) == set(taps)
            assert all(torch.equal(stopped[tap], full[tap]) for tap in taps)


@pytest.mark.parametrize("layer", [2, 5, 7, 11])
def test_no_module_runs_beyond_the_last_tap_and_exactly_those_get_no_gradient(model_folder, inputs, layer):
    unet = StableDiffusion(str(model_folder), parts=("unet",)).unet.requires_grad_(True)
    later = modules_after(unet, layer)
    ran = []
    for module in later:
        for part in module.modules():
            part.register_forward_hook(lambda module, inputs, output: ran.append(module))
    extract_features(unet, [layer, 0], *inputs)[layer].sum().backward()
    assert later and not ran
    idle = {id(p) for module in later for p in module.parameters()}
    assert {id(p) for p in unet.parameters() if p.grad is None} == idle


def test_gradients_through_taps_equal_those_of_a_full_forward(unet, inputs):
    latent, timestep, context = inputs
    gradients = []
    for stop in (True, False):
        x = latent.clone().requires_grad_(True)
        if stop:
            features = extract_features(unet, [5, 8], x, timestep, context)
        else:
            with record_features(unet, [5, 8]) as features:
                unet(x, timestep, context)
        sum(feature.square().sum() for feature in features.values()).backward()
        gradients.append(x.grad)
    assert gradients[0].abs().max() > 0 and torch.equal(*gradients)


def test_hooks_are_gone_after_the_block_and_after_an_exception(unet, inputs):
    before = torch.no_grad()(unet)(*inputs).sample
    with pytest.raises(RuntimeError, match="mine"), record_features(unet, ALL_TAPS):
        raise RuntimeError("mine")
    extract_features(unet, [5], *inputs)
    assert not any(module._forward_hooks for module in unet.modules())
    assert torch.equal(torch.no_grad()(unet)(*inputs).sample, before)


@pytest.mark.parametrize("tap", [12, -1, "ca.0.0", "res.4.0", "conv_in", "res.1"])
def test_a_tap_that_does_not_exist_is_an_error_that_names_it(unet, tap):
    with pytest.raises(ValueError, match=str(tap)):
        tapped_module(unet, tap)
    with pytest.raises(ValueError, match="at least one"):
        extract_features(unet, [], None, 0, None)


# The configs of the published models where they differ from diffusers' defaults.
FULL_SIZE = {
    "sd-1.5": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd-2.1": {
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
}
PARAMETERS = {"sd-1.5": 859_520_964, "sd-2.1": 865_910_724}


def full_size_unet(name):
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, **FULL_SIZE[name])


@pytest.mark.parametrize("name", FULL_SIZE)
@pytest.mark.parametrize("size", [(64, 64), (64, 128)])
def test_the_taps_of_full_size_models_have_the_published_shapes(name, size):
    unet = full_size_unet(name)
    assert sum(p.numel() for p in unet.parameters()) == PARAMETERS[name]
    assert len(decoder_layers(unet)) == 12
    with torch.device("meta"), torch.no_grad():
        context = torch.empty(1, 77, FULL_SIZE[name]["cross_attention_dim"])
        features = extract_features(unet, ALL_TAPS, torch.empty(1, 4, *size), torch.tensor(0), context)
    channels, strides = (1280, 1280, 640, 320), (8, 4, 2, 1)
    for tap in ALL_TAPS:
        i = tap // 3 if isinstance(tap, int) else int(tap.split(".")[1])
        assert features[tap].shape == (1, channels[i], size[0] // strides[i], size[1] // strides[i])
        assert tap_shape(unet, tap) == (channels[i], strides[i])
    sums = [
        sum(features[tap].shape[1] for tap in ALL_TAPS if str(tap).startswith((f"res.{i}", f"ca.{i}")))
        for i in range(4)
    ]
    assert sums == [3840, 7680, 3840, 1920]


def test_loss_on_the_last_layer_leaves_the_published_number_of_parameters_idle():
    later = modules_after(full_size_unet("sd-1.5"), 11)
    assert sum(p.numel() for module in later for p in module.parameters()) == 12_164


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_models_have_16_self_and_16_cross_attention_layers(name):
    unet = full_size_unet(name)
    for kind in ("self", "cross"):
        places = [".".join(layer.split(".")[:2]) for layer in attention_layers(unet, kind)]
        counts = {side: [places.count(f"{side}_blocks.{i}") for i in range(4)] for side in ("down", "up")}
        assert counts == {"down": [2, 2, 2, 0], "up": [0, 3, 3, 3]}
        assert len(places) == 16 and places.count("mid_block.attentions") == 1
    assert len(unet.attn_processors) == 32
