from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from models.few_shot.episodes import Episodes
from models.few_shot.prior import Matcher, prior_mask, resized, weighted_gap
from models.few_shot.resnet import ResNet, normalize
from models.few_shot.vgg import VGG16


def tiny_episodes(batch=2, shot=2, size=32, seed=0) -> Episodes:
    draw = torch.Generator().manual_seed(seed)
    return Episodes(
        query=torch.rand(batch, 3, size, size, generator=draw),
        supports=torch.rand(batch, shot, 3, size, size, generator=draw),
        masks=torch.randint(2, (batch, shot, size // 8, size // 8), generator=draw)
        .repeat_interleave(8, 2)
        .repeat_interleave(8, 3),
        weights=torch.ones(batch, shot),
        label=torch.randint(2, (batch, size, size), generator=draw),
        base_label=torch.randint(4, (batch, size, size), generator=draw),
        base_class=torch.ones(batch, dtype=torch.int64),
    )


def repeated(episodes: Episodes, times: int) -> Episodes:
    """Each support as often as told."""
    names = ("supports", "masks", "weights")
    return replace(episodes, **{name: getattr(episodes, name).repeat_interleave(times, 1) for name in names})


def chosen(episodes: Episodes, order: list[int]) -> Episodes:
    """The supports with these numbers only, in this order."""
    names = ("supports", "masks", "weights")
    return replace(episodes, **{name: getattr(episodes, name)[:, order] for name in names})


def red_or_blue(batch=1, seed=0) -> Episodes:
    """Images of red and blue squares twice: the object is first what is red and then what is blue."""
    red = tiny_episodes(batch, 1, seed=seed).masks[:, 0], tiny_episodes(batch, 1, seed=seed + 1).masks[:, 0]
    query, support = (torch.stack([0.9 * x, 0 * x, 0.9 * (1 - x)], dim=1) for x in red)
    label, mask = (torch.cat([x, 1 - x]) for x in red)
    return Episodes(
        query=torch.cat([query, query]),
        supports=torch.cat([support, support])[:, None],
        masks=mask[:, None],
        weights=torch.ones(2 * batch, 1),
        label=label,
        base_label=label,
        base_class=torch.zeros(2 * batch, dtype=torch.int64),
    )


def loss_after_training(host: torch.nn.Module) -> torch.Tensor:
    """The loss of a few-shot host after 40 steps on red_or_blue."""
    host.train()
    episodes = red_or_blue()
    optimizer = torch.optim.Adam(host.parameters(), lr=0.005)
    for _ in range(40):
        loss = host.losses(episodes)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss


def tiny_backbone(seed=0) -> ResNet:
    torch.manual_seed(seed)
    backbone = ResNet(blocks=(1, 1, 1, 1), planes=(4, 4, 8, 8), dilated=True).eval()
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, std=0.1)  # so that zeros do not stay zeros
    return backbone


def test_a_prototype_is_the_mean_under_the_mask_whose_area_gets_a_little_more():
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 1:3, 1:3] = 1
    features = torch.full((1, 2, 4, 4), 3.0)
    features[:, :, 0] = 100
    torch.testing.assert_close(weighted_gap(features, mask), torch.full((1, 2), 12 / 4.0005))
    assert weighted_gap(features, torch.zeros_like(mask)).tolist() == [[0, 0]]


def test_the_prior_of_a_place_is_its_largest_cosine_with_the_object():
    query = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 2.0]]).view(1, 2, 1, 3)
    one = torch.tensor([[5.0, 0.0, 0.0], [0.0, 0.0, 0.0]]).view(1, 2, 1, 3)
    both = torch.tensor([[5.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).view(1, 2, 1, 3)
    prior = prior_mask(query, torch.stack([one, both], dim=1))
    torch.testing.assert_close(prior, torch.tensor([[[[1, 0, 0.5**0.5]], [[1, 1, 0]]]]))


def test_priors_reach_from_0_to_1_and_are_0_without_an_object():
    query, supports = torch.rand(2, 8, 5, 6), torch.rand(2, 3, 8, 4, 4)
    supports[1, 2] = 0
    prior = prior_mask(query, supports)
    assert prior.shape == (2, 3, 5, 6)
    assert prior[1, 2].abs().max() == 0
    torch.testing.assert_close(prior.amax((2, 3)), torch.tensor([[1.0, 1, 1], [1, 1, 0]]), atol=1e-5, rtol=0)
    assert prior.amin((2, 3)).tolist() == [[0] * 3] * 2


def test_resizing_aligns_the_corners_and_leaves_a_map_of_that_size_alone():
    maps = torch.tensor([[0.0, 2.0, 4.0], [3.0, 5.0, 7.0]]).view(1, 1, 2, 3)
    assert resized(maps, (2, 3)) is maps
    expected = [[0, 1, 2, 3, 4], [1.5, 2.5, 3.5, 4.5, 5.5], [3, 4, 5, 6, 7]]
    torch.testing.assert_close(resized(maps, (3, 5)), torch.tensor(expected).view(1, 1, 3, 5))


def test_a_match_is_what_the_steps_of_the_paper_give_one_support_at_a_time():
    backbone, episodes = tiny_backbone(), tiny_episodes(batch=2, shot=3, size=64)
    matcher = Matcher(backbone.channels, 6, dropout=0.5).eval()
    match = matcher(backbone, episodes)
    _, low, middle, high = backbone.stages(normalize(episodes.query))
    torch.testing.assert_close(match.query, matcher.query(torch.cat([middle, low], 1)))
    torch.testing.assert_close(match.low_query, low)
    torch.testing.assert_close(match.high_query, high)
    for k in range(3):
        _, low, middle, _ = backbone.stages(normalize(episodes.supports[:, k]))
        mask = F.interpolate(episodes.masks[:, k, None].float(), (8, 8), mode="bilinear", align_corners=True)
        prior = prior_mask(high, (backbone.layer4(middle * mask) * mask)[:, None])
        prototype = weighted_gap(matcher.support(torch.cat([middle, low], 1)), mask)
        torch.testing.assert_close(match.low_supports[:, k], low)
        torch.testing.assert_close(match.priors[:, k], prior[:, 0])
        torch.testing.assert_close(match.prototypes[:, k], prototype)


def test_ignored_pixels_of_a_support_are_not_the_object():
    backbone, episodes = tiny_backbone(), tiny_episodes()
    matcher = Matcher(backbone.channels, 6, dropout=0).eval()
    expected = matcher(backbone, episodes)
    episodes.masks[episodes.masks == 0] = 255
    match = matcher(backbone, episodes)
    assert torch.equal(match.prototypes, expected.prototypes)
    assert torch.equal(match.priors, expected.priors)


def test_all_supports_go_through_the_backbone_at_once_and_the_query_once():
    backbone, batches = tiny_backbone(), {"layer1": [], "layer4": []}
    for name, sizes in batches.items():
        getattr(backbone, name).register_forward_pre_hook(lambda _, x, sizes=sizes: sizes.append(len(x[0])))
    Matcher(backbone.channels, 6, dropout=0)(backbone, tiny_episodes(batch=2, shot=3))
    assert batches == {"layer1": [2, 6], "layer4": [2, 6]}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_each_support_has_a_dropout_of_its_own(dropout):
    backbone, episodes = tiny_backbone(), tiny_episodes(batch=1, shot=1)
    first, second = Matcher(backbone.channels, 32, dropout)(backbone, repeated(episodes, 2)).prototypes[0]
    assert torch.allclose(first, second) == (dropout == 0)


@pytest.mark.parametrize(
    ("make", "size", "cells"),
    [
        (lambda: ResNet(deep_stem=True, dilated=True), 473, 60),
        (lambda: ResNet(deep_stem=True, dilated=True), 641, 81),
        (lambda: VGG16(batch_norm=True), 473, 30),
    ],
)
def test_maps_have_the_published_sizes(make, size, cells):
    with torch.device("meta"):
        backbone, images = make(), torch.empty(1, 3, size, size)
        episodes = Episodes(images, images[:, None], torch.ones(1, 1, size, size), torch.ones(1, 1))
        match = Matcher(backbone.channels, 256, dropout=0.5)(backbone, episodes)
    assert match.query.shape == (1, 256, cells, cells)
    assert match.priors.shape == (1, 1, cells, cells)
    assert match.low_query.shape == (1, backbone.channels[1], cells, cells)
    assert match.low_supports.shape == (1, 1, backbone.channels[1], cells, cells)


def test_a_vgg_runs_at_the_size_of_its_layer_3():
    backbone = VGG16(batch_norm=True, planes=(2, 2, 4, 4)).eval()
    matcher, episodes = Matcher(backbone.channels, 6, dropout=0), tiny_episodes(size=64)
    low = backbone.stages(normalize(episodes.query))[1]
    match = matcher(backbone, episodes)
    assert low.shape[-2:] == (8, 8)
    torch.testing.assert_close(match.low_query, resized(low, (4, 4)))
    assert match.priors.shape == (2, 2, 4, 4)
