import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from functional.attention_maps import (
    LEVEL_WEIGHTS,
    complete,
    complete_by_layers,
    fuse_levels,
    level_of,
    level_size,
    mean_by_level,
    sharpen,
    stretch,
    word_map,
)

CROSS = "transformer_blocks.0.attn2"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("layer", "level"),
    [
        ("down_blocks.0.attentions.1", 0),
        ("up_blocks.3.attentions.2", 0),
        ("down_blocks.2.attentions.0", 2),
        ("up_blocks.1.attentions.0", 2),
        ("mid_block.attentions.0", 3),
    ],
)
def test_a_layers_level_follows_from_its_block(layer, level):
    assert level_of(f"{layer}.{CROSS}") == level


@pytest.mark.parametrize("name", ["time_embedding", "down_blocks.7.attentions.0", "up_blocks"])
def test_a_name_outside_the_blocks_is_refused(name):
    with pytest.raises(ValueError, match="in no level"):
        level_of(name)


def test_levels_of_odd_sizes_round_up():
    assert [level_size((64, 48), i) for i in range(4)] == [(64, 48), (32, 24), (16, 12), (8, 6)]
    assert level_size((5, 3), 1) == (3, 2)


def test_the_published_weights_sum_to_one():
    assert sum(LEVEL_WEIGHTS) == pytest.approx(1)
    assert LEVEL_WEIGHTS == (0.1, 0.1, 0.5, 0.3)  # resolutions 64, 32, 16, 8


def test_mean_by_level_weighs_heads_and_not_layers():
    one, three = torch.rand(2, 1, 16, 5), torch.rand(2, 3, 16, 5)
    attention = {f"down_blocks.0.{CROSS}": one, f"up_blocks.3.{CROSS}": three, f"mid_block.{CROSS}": one}
    means = mean_by_level(attention)
    assert list(means) == [0, 3]
    assert_close(means[0], torch.cat([one, three], 1).mean(1))


def test_mean_by_level_keeps_rows_that_sum_to_one():
    attention = {f"down_blocks.{i}.{CROSS}": torch.randn(1, 2, 4**i, 7).softmax(-1) for i in range(3)}
    for mean in mean_by_level(attention).values():
        assert_close(mean.sum(-1), torch.ones(mean.shape[:2]))


def test_a_word_of_two_tokens_takes_the_mean_of_its_columns():
    attention = torch.rand(2, 6, 9)
    maps = word_map(attention, [[4], [4, 5]], (2, 3))
    assert_close(maps[0], attention[0, :, 4].view(2, 3))
    assert_close(maps[1], attention[1, :, 4:6].mean(-1).view(2, 3))


def test_stretch_reaches_zero_and_one_and_empties_constant_maps():
    maps = torch.stack([torch.rand(4, 4) * 1e-3, torch.full((4, 4), 0.3)])
    stretched = stretch(maps)
    assert stretched[0].min() == 0 and stretched[0].max() == 1
    assert (stretched[1] == 0).all()


def test_fusion_stretches_after_the_resize():
    fine, coarse = torch.rand(1, 8, 8), torch.zeros(1, 2, 2)
    coarse[0, 0, 0] = 0.5
    fused = fuse_levels({0: fine, 2: coarse}, (8, 8))
    resized = torch.nn.functional.interpolate(coarse[:, None], (8, 8), mode="bilinear")[:, 0]
    assert_close(fused, 0.1 * stretch(fine) + 0.5 * stretch(resized))


def test_fusion_ignores_the_scale_of_a_level():
    maps = {level: torch.rand(1, 8 >> level, 8 >> level) for level in range(3)}
    scaled = {level: (level + 2) * one for level, one in maps.items()}
    assert_close(fuse_levels(maps, (8, 8)), fuse_levels(scaled, (8, 8)))


def test_fusion_refuses_a_level_without_weight():
    with pytest.raises(ValueError, match=r"Levels \[3\] have no weight: found 3"):
        fuse_levels({3: torch.rand(1, 2, 2)}, (8, 8), weights=(1, 0, 0))


def test_completion_averages_over_keys_and_is_not_the_transpose():
    fused = torch.rand(2, 3, 2)
    attention = torch.randn(2, 6, 6).softmax(-1)
    completed = complete(attention, fused)
    by_hand = torch.stack([(attention[:, p] * fused.flatten(1)).sum(-1) for p in range(6)], 1)
    assert_close(completed, by_hand.view(2, 3, 2))
    assert not torch.allclose(completed, complete(attention.mT, fused))


def test_completion_by_the_identity_or_a_uniform_map():
    fused = torch.rand(1, 4, 4)
    assert_close(complete(torch.eye(16)[None], fused), fused)
    assert_close(complete(torch.full((1, 16, 16), 1 / 16), fused), fused.mean().expand(1, 4, 4))


def test_the_published_weights_on_linear_ramps():
    maps = {level: torch.arange(64 >> level).float().expand(1, 64 >> level, -1) for level in range(4)}
    row = fuse_levels(maps, (64, 64))[0, 0]
    expected = torch.tensor([0, 0.002394, 0.491555, 0.508445, 1])
    assert_close(row[[0, 1, 31, 32, 63]], expected, atol=1e-5, rtol=0)


def test_completion_of_an_impulse_by_hand():
    attention = torch.tensor([[[0.9, 0.1], [0.6, 0.4]]])
    assert_close(complete(attention, torch.tensor([[[1.0, 0.0]]])), torch.tensor([[[0.9, 0.6]]]))


def test_the_scale_of_the_self_attention_does_not_matter():
    attention, fused = (4 * torch.randn(1, 16, 16)).softmax(-1), torch.rand(1, 4, 4)
    assert_close(
        stretch(complete(7 * attention, fused)), stretch(complete(attention, fused)), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_a_level_reaches_its_whole_weight_however_the_resize_has_lowered_its_peak(level):
    side = 64 >> level
    impulse = torch.zeros(1, side, side)
    impulse[0, side // 2, side // 2] = 1
    assert fuse_levels({level: impulse}, (64, 64)).max() == pytest.approx(LEVEL_WEIGHTS[level], abs=1e-7)


def test_a_level_of_weight_zero_says_nothing():
    maps = {level: torch.rand(1, 8 >> level, 8 >> level) for level in range(3)}
    assert_close(fuse_levels(maps, (8, 8), (0, 1, 0)), fuse_levels({1: maps[1]}, (8, 8), (0, 1)))


def test_completion_spreads_a_seed_over_its_block_and_no_further():
    attention = torch.block_diag(torch.full((8, 8), 1 / 8), torch.full((8, 8), 1 / 8))[None]
    seed = torch.zeros(1, 4, 4)
    seed[0, 0, 3] = 1
    completed = complete(attention, seed)
    block = torch.tensor([1.0] * 8 + [0.0] * 8).view(1, 4, 4)
    assert torch.equal(completed, block / 8) and torch.equal(stretch(completed), block)


def test_completion_stays_between_the_ends_of_the_map_and_a_uniform_one_leaves_nothing():
    fused = torch.randint(0, 9, (1, 4, 4)) / 8  # sums of these are exact
    completed = complete(torch.randn(1, 16, 16).softmax(-1), fused)
    assert completed.min() >= fused.min() and completed.max() <= fused.max()
    assert (stretch(complete(torch.full((1, 16, 16), 1 / 16), fused)) == 0).all()


def queries_and_keys(*heads, batch=2, places=24, width=8):
    """Of one self-attention layer for each number of heads."""
    return [tuple(2 * torch.randn(2, batch, count, places, width)) for count in heads]


def explicit(layers):
    """S [B, N, N], the mean over all heads of all layers."""
    scores = [(q.float() @ k.float().mT / q.shape[-1] ** 0.5).softmax(-1) for q, k in layers]
    return torch.cat(scores, 1).mean(1)


@pytest.mark.parametrize("power", [0, 1, 2, 3])
def test_completion_by_layers_is_the_product_with_the_power_of_the_mean_over_heads(power):
    layers, fused = queries_and_keys(1, 3), torch.rand(2, 4, 6)
    expected = fused
    for _ in range(power):
        expected = complete(explicit(layers), expected)
    assert_close(complete_by_layers(layers, fused, power), expected, atol=1e-6, rtol=0)
    assert_close(
        complete_by_layers(layers, fused, power)[1:],
        complete_by_layers([(q[1:], k[1:]) for q, k in layers], fused[1:], power),
    )


def test_completion_by_layers_multiplies_once_unless_told_otherwise():
    layers, fused = queries_and_keys(2), torch.rand(2, 4, 6)
    assert torch.equal(complete_by_layers(layers, fused), complete_by_layers(layers, fused, 1))


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_completion_by_layers_in_half_precision_is_close_and_returns_float32(dtype, atol):
    layers, fused = queries_and_keys(2, 2, 2), torch.rand(2, 4, 6)
    half = [(q.to(dtype), k.to(dtype)) for q, k in layers]
    completed = complete_by_layers(half, fused, 2)
    assert completed.dtype == torch.float32
    expected = complete(explicit(layers), complete(explicit(layers), fused))
    assert_close(completed, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_completion_by_layers_in_half_precision_resolves_small_differences_of_a_map_far_from_zero(dtype):
    layers, fused = queries_and_keys(2, 2), 0.9 + 1e-3 * torch.rand(2, 4, 6)
    half = [(q.to(dtype), k.to(dtype)) for q, k in layers]
    completed = complete_by_layers(half, fused)
    assert_close(
        completed, complete(explicit(half), fused), atol=2e-5, rtol=0
    )  # 0.9 is off by 2e-4 in float16


class LargestTensor(TorchDispatchMode):
    """Inside the block `numel` is that of the largest tensor that any operation has given."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return result


def test_completion_by_layers_never_builds_the_probabilities():
    layers, fused = queries_and_keys(2, 2, places=256), torch.rand(2, 16, 16)
    with LargestTensor() as largest:
        complete_by_layers(layers, fused, 2)
    assert 0 < largest.numel <= 2 * 2 * 256 * 8  # as the keys; the probabilities of one head are 256 * 256
    with LargestTensor() as largest:
        complete(explicit(layers), fused)
    assert largest.numel >= 256 * 256


def test_contrast_is_a_sigmoid_by_its_gain_and_centre_stretched_again():
    maps = torch.tensor([[[0.0, 0.5], [0.25, 1.0]], [[0.2, 0.2], [0.2, 0.2]]])
    sharp = sharpen(maps, 8, 0.4)
    # (sigmoid(0.8) - sigmoid(-3.2)) / (sigmoid(4.8) - sigmoid(-3.2)), and so with -1.2
    assert_close(sharp[0], torch.tensor([[0.0, 0.683141], [0.201863, 1.0]]), atol=1e-5, rtol=0)
    assert (sharp[1] == 0).all()
    assert not torch.allclose(sharp, sharpen(maps, 8, 0.5)) and not torch.allclose(
        sharp, sharpen(maps, 4, 0.4)
    )
