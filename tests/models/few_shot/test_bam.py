from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from functional.losses import pixel_cross_entropy
from models.few_shot.bam import ASPP, BAM, ShotWeights, other_classes, scene_difference
from models.few_shot.episodes import Episodes
from models.few_shot.prior import resized
from models.few_shot.pspnet import PSPNet
from models.few_shot.resnet import ResNet
from models.few_shot.vgg import VGG16
from tests.models.few_shot.test_prior import (
    chosen,
    loss_after_training,
    repeated,
    tiny_backbone,
    tiny_episodes,
)


def tiny_bam(shot=None, **options) -> BAM:
    return BAM(PSPNet(tiny_backbone(), 4, bins=(1, 2), channels=8), shot, **{"channels": 8, **options})


def at_work(bam: BAM) -> BAM:
    """With numbers in its ensemble that let all inputs count."""
    with torch.no_grad():
        bam.adjust.weight.copy_(torch.tensor([0.9, 0.3]).view(1, 2, 1, 1))
        bam.ensemble.weight.copy_(torch.tensor([0.8, 0.5]).view(1, 2, 1, 1))
    return bam.eval()


def test_the_scene_difference_of_two_channels_is_as_computed_by_hand():
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)
    supports = torch.stack([torch.ones(1, 2, 1, 2), query], dim=1)
    torch.testing.assert_close(scene_difference(query, supports), torch.tensor([[0.5**0.5, 0]]))


def test_the_scene_difference_does_not_see_the_strength_of_a_channel():
    query, supports = torch.rand(2, 5, 4, 4), torch.rand(2, 3, 5, 4, 4)
    strength = torch.tensor([0.1, 1, 2, 5, 9])[:, None, None]
    expected = scene_difference(query, supports)
    torch.testing.assert_close(scene_difference(strength * query, supports), expected)
    torch.testing.assert_close(scene_difference(query, strength * supports), expected)
    assert 0 < expected.min() < expected.max() < 1


def test_other_classes_leave_out_the_background_and_the_episodes_own_class():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().view(1, 4, 1, 1).repeat(3, 1, 1, 1)
    assert other_classes(logits).flatten().tolist() == pytest.approx([0.9] * 3)
    left = other_classes(logits, torch.tensor([2, 0, 3]))
    assert left.flatten().tolist() == pytest.approx([0.6, 0.9, 0.5])


@pytest.mark.parametrize("dim", [0, 2, 5])
def test_learned_weights_follow_their_supports_into_any_order(dim):
    torch.manual_seed(0)
    layer, psi, alpha = ShotWeights(4, dim), torch.rand(3, 4), torch.rand(3, 4) + 0.5
    torch.nn.init.normal_(layer.layers.weight if dim == 0 else layer.layers[2].weight)
    weights, order = layer(psi, alpha), [2, 0, 3, 1]
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    torch.testing.assert_close(layer(psi[:, order], alpha[:, order]), weights[:, order])
    assert len(set(weights[0].tolist())) == 4


def test_sorted_scores_are_put_back_to_their_supports():
    layer, psi = ShotWeights(3, 0), torch.tensor([[0.3, 0.1, 0.2]])
    torch.nn.init.eye_(layer.layers.weight)  # scores = sorted differences
    torch.testing.assert_close(layer(psi, torch.ones(1, 3)), psi.softmax(1))


def test_a_layer_without_hidden_part_starts_with_equal_weights():
    weights = ShotWeights(3, 0)(torch.rand(2, 3), torch.tensor([[1.0, 1, 1], [2, 1, 1]]))
    torch.testing.assert_close(weights, torch.tensor([[1 / 3] * 3, [0.5, 0.25, 0.25]]))


def test_given_weights_multiply_learned_ones():
    layer, psi = ShotWeights(3, 2), torch.rand(1, 3)
    plain = layer(psi, torch.ones(1, 3))
    expected = plain * torch.tensor([1.0, 0.5, 0.1])
    weights = layer(psi, torch.tensor([[1.0, 0.5, 0.1]]))
    torch.testing.assert_close(weights, expected / expected.sum())


def test_without_a_layer_the_given_weights_are_taken():
    alpha = torch.tensor([[1.0, 0.5, 0.5]])
    for bam in (tiny_bam(), tiny_bam(shot=1)):
        assert bam.weigh(torch.rand(1, 3), alpha).tolist() == [[0.5, 0.25, 0.25]]
    assert not torch.allclose(tiny_bam(shot=3).weigh(torch.rand(1, 3), alpha), alpha / 2)


def test_learned_weights_want_exactly_their_number_of_supports():
    with pytest.raises(ValueError, match=r"exactly 5 supports: 2 were given.*shot: 2"):
        tiny_bam(shot=5).eval()(tiny_episodes(shot=2))
    with pytest.raises(ValueError, match="at least 1 support: shot is 0"):
        tiny_bam(shot=0)


def test_learned_weights_refuse_a_support_that_does_not_count_but_would_move_the_others():
    episodes = replace(tiny_episodes(shot=3), weights=torch.tensor([[1.0, 1, 0.5], [1, 0, 0]]))
    with pytest.raises(ValueError, match=r"2 of 6 have weight 0.*missing to duplicate or error.*shot: null"):
        tiny_bam(shot=3).eval()(episodes)
    tiny_bam().eval()(episodes)


@pytest.mark.parametrize("shot", [None, 3])
def test_identical_supports_count_as_one(shot):
    one, bam = tiny_episodes(shot=1), at_work(tiny_bam(shot))
    single = at_work(tiny_bam())
    single.load_state_dict({k: v for k, v in bam.state_dict().items() if not k.startswith("shot_weights")})
    for repeats, alone in zip(bam(repeated(one, 3)), single(one), strict=True):
        torch.testing.assert_close(repeats, alone)


@pytest.mark.parametrize("shot", [None, 3])
def test_the_order_of_the_supports_does_not_matter_but_their_weights_do(shot):
    bam = at_work(tiny_bam(shot))
    episodes = replace(tiny_episodes(shot=3), weights=torch.tensor([[1.0, 0.2, 0.6], [1.0, 0.5, 0.1]]))
    final = bam(episodes)[0]
    torch.testing.assert_close(bam(chosen(episodes, [2, 0, 1]))[0], final)
    assert not torch.allclose(bam(replace(episodes, weights=torch.ones(2, 3)))[0], final)


def test_a_support_of_weight_0_is_as_none():
    bam = at_work(tiny_bam())
    episodes = replace(tiny_episodes(shot=3), weights=torch.tensor([[1.0, 0, 1]] * 2))
    torch.testing.assert_close(bam(episodes)[0], bam(chosen(episodes, [0, 2]))[0])


def test_the_ensemble_starts_as_the_meta_learners_probabilities():
    final, meta, base = tiny_bam().eval()(tiny_episodes())
    assert torch.equal(final, meta.softmax(1))
    assert base.shape == (2, 4, 4, 4)


def test_the_ensemble_adds_scene_difference_and_other_classes():
    bam, episodes, seen = at_work(tiny_bam()), tiny_episodes(shot=1), []
    bam.matcher.register_forward_hook(lambda *call: seen.append(call[-1]))
    final, meta, base = bam(episodes, torch.tensor([1, 0]))
    psi = scene_difference(seen[0].low_query, seen[0].low_supports)[..., None, None]
    assert psi.min() > 0
    background, foreground = (0.9 * meta.softmax(1) + 0.3 * psi).split(1, dim=1)
    background = 0.8 * background + 0.5 * other_classes(base, torch.tensor([1, 0]))
    torch.testing.assert_close(final, torch.cat([background, foreground], dim=1))


def test_the_aspp_looks_in_five_ways():
    aspp = ASPP(2)
    for module in aspp.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.ones_(module.weight)
            torch.nn.init.zeros_(module.bias)
    point = torch.zeros(1, 2, 39, 39)
    point[:, 0, 19, 19] = 1
    views = aspp(point)[0, ::2]
    assert aspp(-point).max() == 0
    assert [int((view > 0).sum()) for view in views] == [39 * 39, 1, 9, 9, 9]
    assert [int(view[19].nonzero()[-1]) - 19 for view in views[1:]] == [0, 6, 12, 18]


def test_losses_are_of_the_final_and_the_meta_logits():
    bam, episodes = at_work(tiny_bam()), tiny_episodes()
    final, meta, base = (resized(logits, (32, 32)) for logits in bam(episodes, episodes.base_class))
    losses = bam.losses(episodes)
    torch.testing.assert_close(losses["loss_final"], pixel_cross_entropy(final, episodes.label).detach())
    torch.testing.assert_close(losses["loss_meta"], pixel_cross_entropy(meta, episodes.label).detach())
    torch.testing.assert_close(losses["loss_base"], pixel_cross_entropy(base, episodes.base_label))
    torch.testing.assert_close(losses["loss"].detach(), losses["loss_final"] + losses["loss_meta"])
    no_class = bam.losses(replace(episodes, base_class=torch.zeros(2, dtype=torch.int64)))
    assert no_class["loss_final"] != losses["loss_final"]


def test_episodes_without_base_classes_are_nothing_to_learn_from():
    with pytest.raises(ValueError, match="no base_label and no base_class"):
        tiny_bam().losses(replace(tiny_episodes(), base_label=None, base_class=None))


@pytest.mark.parametrize("shot", [None, 2])
def test_all_learns_but_the_base_learner_which_stays_as_it_is(shot):
    bam = tiny_bam(shot, kshot_dim=0, dropout=0).train()
    before = {k: v.clone() for k, v in bam.base_learner.state_dict().items()}
    bam.losses(tiny_episodes())["loss"].backward()
    for name, parameter in bam.named_parameters():
        learns = not name.startswith("base_learner.")
        assert parameter.requires_grad == learns
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == learns, name
    assert not any(module.training for module in bam.base_learner.modules())
    assert bam.head.training
    assert all(torch.equal(v, before[k]) for k, v in bam.base_learner.state_dict().items())


def test_dropout_and_the_hidden_layer_are_options():
    torch.manual_seed(0)
    bam, episodes = tiny_bam(dropout=0).train(), tiny_episodes()
    bam.head.eval()
    assert torch.equal(bam(episodes)[1], bam(episodes)[1])
    bam = tiny_bam(dropout=0.5).train()
    bam.head.eval()
    assert not torch.equal(bam(episodes)[1], bam(episodes)[1])
    assert tiny_bam(shot=5, kshot_dim=3).shot_weights.layers[0].out_features == 3


def test_predictions_are_made_at_the_size_that_is_asked_for():
    bam, episodes, given = at_work(tiny_bam()), tiny_episodes(), []

    def resize(logits):
        given.append(logits)
        return F.interpolate(logits, size=(50, 70), mode="bilinear", align_corners=True)

    mask = bam.predict(episodes, resize)
    assert given[0].shape == (2, 2, 32, 32)
    assert mask.shape == (2, 50, 70)
    assert mask.dtype == torch.int64
    assert torch.equal(mask, resize(given[0]).argmax(1))
    assert torch.equal(bam.predict(episodes), given[0].argmax(1))


def test_it_learns_what_only_the_support_tells():
    torch.manual_seed(0)
    loss = loss_after_training(tiny_bam(channels=16, dropout=0))
    assert loss < 1.3  # the same queries have opposite labels: who sees no support cannot get below 2 ln 2


@pytest.mark.parametrize(
    ("make", "size", "cells", "learned"),
    [
        (lambda: ResNet(deep_stem=True, dilated=True), 473, 60, 4_917_254),
        (lambda: ResNet(deep_stem=True, dilated=True), 641, 81, 4_917_254),
        (lambda: VGG16(batch_norm=True), 473, 30, 4_917_254 - 2 * (1536 - 768) * 256),
    ],
)
def test_published_sizes_and_widths(make, size, cells, learned):
    with torch.device("meta"):
        bam, images = BAM(PSPNet(make(), 16)), torch.empty(1, 3, size, size)
        final, _, base = bam(
            Episodes(images, images[:, None], torch.ones(1, 1, size, size), torch.ones(1, 1))
        )
    assert final.shape == (1, 2, cells, cells)
    assert base.shape == (1, 16, cells, cells)
    # Reductions, merge, ASPP with bias, fusion, residual, head, ensemble; counted by hand for ResNet-50.
    assert sum(parameter.numel() for parameter in bam.parameters() if parameter.requires_grad) == learned
