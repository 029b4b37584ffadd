import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from models.diffusion.attention import attention_layers, record_attention, use_attention_backend
from models.diffusion.stable_diffusion import StableDiffusion


@pytest.fixture(scope="module")
def unet(model_folder):
    return StableDiffusion(str(model_folder), parts=("unet",)).unet


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(2, 4, 16, 16, generator=generator)
    return latent, torch.tensor(100), torch.randn(2, 16, 32, generator=generator)


def test_recorded_probabilities_are_the_softmax_and_the_output_stays_bit_equal(unet, inputs):
    self_layer, cross_layer = attention_layers(unet, "self")[-1], attention_layers(unet, "cross")[3]
    caught = {}
    handles = [
        unet.get_submodule(layer).register_forward_pre_hook(
            lambda module, args, kwargs, layer=layer: caught.update({layer: (args, kwargs)}), with_kwargs=True
        )
        for layer in (self_layer, cross_layer)
    ]
    with torch.no_grad():
        plain = unet(*inputs).sample
        with record_attention(unet, [self_layer, cross_layer]) as weights:
            recorded = unet(*inputs).sample
    for handle in handles:
        handle.remove()
    assert torch.equal(plain, recorded) and set(weights) == {self_layer, cross_layer}
    assert weights[self_layer].shape == (2, 2, 256, 256) and weights[cross_layer].shape == (2, 2, 64, 16)
    for layer, found in weights.items():
        attn, (args, kwargs) = unet.get_submodule(layer), caught[layer]
        context = kwargs.get("encoder_hidden_states")
        with torch.no_grad():
            query = attn.to_q(args[0]).unflatten(2, (2, -1)).transpose(1, 2)
            key = attn.to_k(args[0] if context is None else context).unflatten(2, (2, -1)).transpose(1, 2)
        expected = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_rows_of_all_recorded_maps_sum_to_one(unet, inputs):
    layers = attention_layers(unet, "self") + attention_layers(unet, "cross")
    with torch.no_grad(), record_attention(unet, layers) as weights:
        unet(*inputs)
    assert set(weights) == set(layers) and len(layers) == 32
    for found in weights.values():
        sums = found.sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-6, rtol=0)


def test_layers_are_listed_in_the_order_in_which_they_run(unet, inputs):
    ran = []
    layers = attention_layers(unet, "cross")
    handles = [
        unet.get_submodule(layer).register_forward_pre_hook(lambda *_, layer=layer: ran.append(layer))
        for layer in layers
    ]
    unet(*inputs)
    for handle in handles:
        handle.remove()
    assert ran == layers


def test_layers_that_are_not_chosen_keep_the_fused_processor(unet):
    layer = attention_layers(unet, "cross")[0]
    with record_attention(unet, [layer]):
        others = [p for name, p in unet.attn_processors.items() if name != f"{layer}.processor"]
        assert len(others) == 31 and all(isinstance(p, AttnProcessor2_0) for p in others)


def test_processors_are_restored_after_an_exception(unet):
    before = dict(unet.attn_processors)
    with pytest.raises(RuntimeError, match="mine"), record_attention(unet, attention_layers(unet, "self")):
        assert unet.attn_processors != before
        raise RuntimeError("mine")
    assert unet.attn_processors == before


def test_a_layer_that_does_not_exist_is_an_error_that_names_it(unet):
    with (
        pytest.raises(ValueError, match=r"'up_blocks\.9\.attn2'"),
        record_attention(unet, ["up_blocks.9.attn2"]),
    ):
        pass


def test_recorded_probabilities_carry_gradients(unet, inputs):
    latent, timestep, context = inputs
    context = context.clone().requires_grad_(True)
    layer = attention_layers(unet, "cross")[0]
    with record_attention(unet, [layer]) as weights:
        unet(latent, timestep, context)
    weights[layer][..., 3].sum().backward()
    assert context.grad.abs().max() > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_xformers_without_cuda_is_an_error_that_names_the_key(model_folder):
    with pytest.raises(ValueError, match=r"attention: xformers cannot run.*CUDA.*`attention: sdpa`"):
        StableDiffusion(str(model_folder), attention="xformers")


def test_an_unknown_kernel_is_an_error_that_names_the_choices(unet):
    with pytest.raises(ValueError, match="sdpa or xformers"):
        use_attention_backend(unet, "flash")


@pytest.mark.cuda
def test_xformers_and_sdpa_give_equal_outputs_and_gradients_in_half_precision(model_folder, inputs):
    pytest.importorskip("xformers")
    results = []
    for attention in ("sdpa", "xformers"):
        model = StableDiffusion(str(model_folder), dtype="float16", attention=attention).cuda()
        latent, timestep, context = (x.cuda() for x in inputs)
        latent.requires_grad_(True)
        output = model.predict(latent, timestep, context)
        output.square().mean().backward()
        results.append((output.detach(), latent.grad))
    for sdpa, xformers in zip(*results, strict=True):
        torch.testing.assert_close(sdpa, xformers, atol=1e-3, rtol=1e-3)
