import pytest
import torch
from torch.testing import assert_close

from functional.attention_maps import (
    LEVEL_WEIGHTS,
    complete,
    fuse_levels,
    level_of,
    level_size,
    mean_by_level,
    stretch,
    word_map,
)

CROSS = "transformer_blocks.0.attn2"


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
    attention, fused = torch.randn(1, 16, 16).softmax(-1), torch.rand(1, 4, 4)
    assert_close(
        stretch(complete(7 * attention, fused)), stretch(complete(attention, fused)), atol=1e-6, rtol=0
    )
