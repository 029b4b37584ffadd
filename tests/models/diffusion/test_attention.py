from collections import Counter

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from benchmarks.random_models import random_model
from functional.attention_maps import level_of, level_size, mean_by_level, word_map
from models.diffusion.attention import (
    WordAttention,
    attend_to_words,
    attention_layers,
    record_attention,
    use_attention_backend,
)
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


def words_of(*positions, num_tokens=16):
    """Weights [B, tokens] of each prompt's word, whose tokens count alike."""
    words = torch.zeros(len(positions), num_tokens)
    for row, word in zip(words, positions, strict=True):
        row[list(word)] = 1 / len(word)
    return words


@pytest.mark.parametrize("size", [(16, 16), (16, 8)])
def test_the_attention_to_words_is_that_of_all_recorded_layers(unet, inputs, size):
    latent, timestep, context = inputs
    latent, tokens = latent[..., : size[1]], [[4], [5, 6]]
    layers = {kind: attention_layers(unet, kind) for kind in ("self", "cross")}
    with torch.no_grad():
        found = attend_to_words(unet, words_of(*tokens), latent, timestep, context)
        with record_attention(unet, layers["self"] + layers["cross"]) as weights:
            unet(latent, timestep, context)
    cross = mean_by_level({layer: weights[layer] for layer in layers["cross"]})
    assert sorted(found.maps) == [0, 1, 2, 3]
    for level, one in found.maps.items():
        expected = word_map(cross[level], tokens, level_size(size, level))
        torch.testing.assert_close(one, expected.flatten(1), atol=1e-7, rtol=1e-5)
    finest = [layer for layer in layers["self"] if level_of(layer) == 0]
    for layer, (query, key) in zip(finest, found.finest, strict=True):
        scores = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
        torch.testing.assert_close(scores, weights[layer], atol=1e-6, rtol=1e-5)


def test_under_autocast_the_attention_to_words_is_still_summed_in_float32(unet, inputs):
    latent, timestep, context = inputs
    layers, tokens = attention_layers(unet, "cross"), [[4], [5, 6, 7]]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = attend_to_words(unet, words_of(*tokens), latent, timestep, context)
        with record_attention(unet, layers) as weights:
            unet(latent, timestep, context)
    for level, cross in mean_by_level(weights).items():
        expected = word_map(cross, tokens, level_size((16, 16), level)).flatten(1)
        torch.testing.assert_close(found.maps[level], expected, atol=0, rtol=1e-5)


def test_the_mean_of_a_level_weighs_heads_and_not_layers():
    found, one, three = WordAttention(), torch.rand(2, 1, 6), torch.rand(2, 3, 6)
    found.add(1, one)
    found.add(1, three)
    found.add(0, one)
    torch.testing.assert_close(found.maps[1], torch.cat([one, three], 1).mean(1))
    torch.testing.assert_close(found.maps[0], one[:, 0])


def test_nothing_runs_after_the_last_attention_to_the_words(unet, inputs):
    calls, last = Counter(), attention_layers(unet, "cross")[-1]
    block, first = last.removesuffix(".attn2"), attention_layers(unet, "cross")[0]
    watched = (last, f"{last}.to_q", f"{last}.to_v", f"{last}.to_out.0", f"{block}.ff", "conv_out")
    before = (f"{first}.to_out.0", f"{first.removesuffix('.attn2')}.ff", f"{block}.attn1.to_out.0")
    handles = [
        unet.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
        for name in (*watched, *before)
    ]
    with torch.no_grad():
        attend_to_words(unet, words_of([4], [5]), *inputs)
    for handle in handles:
        handle.remove()
    assert calls == {last: 1, f"{last}.to_q": 1, **dict.fromkeys(before, 1)}


@pytest.mark.parametrize(
    ("levels", "keep_queries", "last"),
    [
        ([3], False, "mid_block.attentions.0.transformer_blocks.0.attn2"),
        ([2, 3], False, "up_blocks.1.attentions.2.transformer_blocks.0.attn2"),
        ([0, 3], False, "up_blocks.3.attentions.2.transformer_blocks.0.attn2"),
        ([2], True, "up_blocks.3.attentions.2.transformer_blocks.0.attn1"),
    ],
)
def test_only_what_is_wanted_is_kept_and_the_unet_is_left_at_its_end(
    unet, inputs, levels, keep_queries, last
):
    ran = []
    layers = attention_layers(unet, "self") + attention_layers(unet, "cross")
    handles = [
        unet.get_submodule(layer).register_forward_pre_hook(lambda *_, layer=layer: ran.append(layer))
        for layer in layers
    ]
    words = words_of([4], [5])
    with torch.no_grad():
        found = attend_to_words(unet, words, *inputs, levels, keep_queries)
        last_ran = ran[-1]
        whole = attend_to_words(unet, words, *inputs)
    for handle in handles:
        handle.remove()
    assert last_ran == last and sorted(found.maps) == levels
    assert all(torch.equal(found.maps[level], whole.maps[level]) for level in levels)
    assert len(found.finest) == (5 if keep_queries else 0)
    for pair, other in zip(found.finest, whole.finest, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(pair, other, strict=True))


def test_after_the_words_are_attended_to_the_unet_is_as_it_was(unet, inputs):
    before = dict(unet.attn_processors)
    with torch.no_grad():
        plain = unet(*inputs).sample
        attend_to_words(unet, words_of([4], [5]), *inputs)
        assert unet.attn_processors == before
        assert torch.equal(unet(*inputs).sample, plain)


def test_an_exception_inside_the_unet_reaches_the_caller_and_leaves_it_as_it_was(unet, inputs):
    before, seen = dict(unet.attn_processors), []

    def fail(*_):
        seen.append(dict(unet.attn_processors))
        raise RuntimeError("mine")

    handle = unet.mid_block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="mine"):
        attend_to_words(unet, words_of([4], [5]), *inputs)
    handle.remove()
    assert seen[0] != before and unet.attn_processors == before


def test_only_the_finest_self_attention_is_kept_and_the_other_keeps_its_processor(unet, inputs):
    during = {}
    handle = unet.mid_block.register_forward_pre_hook(lambda *_: during.update(unet.attn_processors))
    with torch.no_grad():
        found = attend_to_words(unet, words_of([4], [5]), *inputs)
    handle.remove()
    plain = {name for name, one in during.items() if isinstance(one, AttnProcessor2_0)}
    assert plain == {f"{name}.processor" for name in attention_layers(unet, "self") if level_of(name) > 0}
    assert [tuple(query.shape) for query, _ in found.finest] == [(2, 2, 256, 16)] * 5


def test_a_model_that_upcasts_its_attention_gives_queries_and_maps_in_float32(model_folder, inputs):
    unet = StableDiffusion(str(model_folder), parts=("unet",), dtype="bfloat16").unet
    latent, timestep, context = inputs
    arguments = (latent.bfloat16(), timestep, context.bfloat16())
    dtypes = {}
    for upcast in (False, True):
        for layer in attention_layers(unet, "self"):
            unet.get_submodule(layer).upcast_attention = upcast
        with torch.no_grad():
            found = attend_to_words(unet, words_of([4], [5]), *arguments)
        dtypes[upcast] = {part.dtype for pair in found.finest for part in pair}
        assert all(one.dtype == torch.float32 for one in found.maps.values())
    assert dtypes == {False: {torch.bfloat16}, True: {torch.float32}}


@pytest.mark.parametrize(
    ("version", "width", "heads"), [("sd-1.4", 768, (8, 8, 8, 8)), ("sd-2.1", 1024, (5, 10, 20, 20))]
)
def test_stable_diffusion_has_five_layers_of_each_kind_in_three_levels_and_one_in_the_last(
    version, width, heads
):
    unet = random_model(version, "meta").unet
    assert len(unet.attn_processors) == 32
    for kind in ("self", "cross"):
        levels = Counter(level_of(layer) for layer in attention_layers(unet, kind))
        assert levels == {0: 5, 1: 5, 2: 5, 3: 1}
    arguments = (torch.empty(2, 4, 64, 64), torch.tensor(100), torch.empty(2, 77, width))
    found = attend_to_words(
        unet, words_of([4], [5], num_tokens=77).to("meta"), *(one.to("meta") for one in arguments)
    )
    assert {level: tuple(one.shape) for level, one in found.maps.items()} == {
        0: (2, 4096),
        1: (2, 1024),
        2: (2, 256),
        3: (2, 64),
    }
    assert found.heads == {0: 5 * heads[0], 1: 5 * heads[1], 2: 5 * heads[2], 3: heads[3]}
    assert [tuple(query.shape) for query, _ in found.finest] == [(2, heads[0], 4096, 320 // heads[0])] * 5


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
