from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from functional.losses import pixel_cross_entropy
from models.few_shot.episodes import Episodes
from models.few_shot.pfenet import FeatureEnrichment, PFENet, bin_size
from models.few_shot.prior import resized
from models.few_shot.resnet import ResNet
from models.few_shot.vgg import VGG16
from tests.models.few_shot.test_prior import (
    chosen,
    loss_after_training,
    repeated,
    tiny_backbone,
    tiny_episodes,
)

RATIOS = (1.0, 0.5, 0.25, 0.125)


def tiny_pfenet(**options) -> PFENet:
    torch.manual_seed(0)
    return PFENet(tiny_backbone(), **{"channels": 8, "bins": (1.0, 0.5), **options})


@pytest.mark.parametrize(
    ("bins", "side", "sides"),
    [
        ((60, 30, 15, 8), 60, [60, 30, 15, 8]),
        (RATIOS, 60, [60, 30, 15, 7]),
        (RATIOS, 81, [81, 40, 20, 10]),
        (RATIOS, 30, [30, 15, 7, 3]),
        (RATIOS, 4, [4, 2, 1, 1]),
    ],
)
def test_bins_are_cells_or_truncated_shares_of_the_map(bins, side, sides):
    assert [bin_size(cells, (side, side)) for cells in bins] == [(cells, cells) for cells in sides]


def test_shares_keep_the_shape_of_the_map():
    assert bin_size(0.5, (9, 14)) == (4, 7)


def test_a_bin_larger_than_the_map_is_refused():
    with pytest.raises(ValueError, match="60 x 60 cells: images of this size give 4 x 4"):
        tiny_pfenet(bins=(60, 30))(tiny_episodes())
    with pytest.raises(ValueError, match="at least one"):
        tiny_pfenet(bins=())
    with pytest.raises(ValueError, match=r"bins are .1, 0.: give"):
        tiny_pfenet(bins=(1, 0))


def test_information_passes_from_fine_to_coarse_bins_only():
    enrich = FeatureEnrichment(6, (1, 0.5, 0.25)).eval()
    given = torch.rand(1, 6, 8, 8), torch.rand(1, 6), torch.rand(1, 8, 8)
    _, before = enrich(*given)
    assert [logits.shape[-1] for logits in before] == [8, 4, 2]
    torch.nn.init.normal_(enrich.residual[1].convs[2].weight)
    _, after = enrich(*given)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, False]


def test_each_bin_sees_query_prototype_and_prior():
    enrich = FeatureEnrichment(6, (1, 0.5)).eval()
    given = [torch.rand(1, 6, 8, 8), torch.rand(1, 6), torch.rand(1, 8, 8)]
    for part in enrich.pass_on:
        torch.nn.init.zeros_(part[0].weight)  # what comes from the finer bin is not meant
    _, before = enrich(*given)
    for i in range(3):
        _, after = enrich(*(torch.rand_like(x) if i == k else x for k, x in enumerate(given)))
        assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_identical_supports_count_as_one_and_their_order_not_at_all():
    network, episodes = tiny_pfenet().eval(), tiny_episodes(shot=3)
    one = chosen(episodes, [0])
    torch.testing.assert_close(network(repeated(one, 4))[0], network(one)[0])
    torch.testing.assert_close(network(chosen(episodes, [2, 0, 1]))[0], network(episodes)[0])


def test_supports_count_by_their_weights():
    network, episodes = tiny_pfenet().eval(), tiny_episodes(shot=2)
    weighted = replace(episodes, weights=torch.tensor([[2.0, 1.0]] * 2))
    torch.testing.assert_close(network(weighted)[0], network(chosen(episodes, [0, 0, 1]))[0])
    assert not torch.allclose(network(weighted)[0], network(episodes)[0])
    only = replace(episodes, weights=torch.tensor([[0.5, 0.0]] * 2))
    torch.testing.assert_close(network(only)[0], network(chosen(episodes, [0]))[0])


def test_losses_are_of_the_final_logits_and_the_mean_of_the_bins():
    network, episodes = tiny_pfenet().eval(), tiny_episodes()
    final, inner = network(episodes)
    losses = network.losses(episodes)
    final, *inner = (resized(logits, (32, 32)) for logits in (final, *inner))
    expected = sum(pixel_cross_entropy(logits, episodes.label) for logits in inner) / 2
    torch.testing.assert_close(losses["loss_inner"], expected.detach())
    torch.testing.assert_close(losses["loss_final"], pixel_cross_entropy(final, episodes.label).detach())
    torch.testing.assert_close(losses["loss"].detach(), losses["loss_final"] + losses["loss_inner"])


def test_all_learns_but_the_backbone_which_stays_as_it_is():
    network = tiny_pfenet(dropout=0).train()
    before = {k: v.clone() for k, v in network.backbone.state_dict().items()}
    network.losses(tiny_episodes())["loss"].backward()
    for name, parameter in network.named_parameters():
        learns = not name.startswith("backbone.")
        assert parameter.requires_grad == learns
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == learns, name
    assert not any(module.training for module in network.backbone.modules())
    assert network.head.training
    assert all(torch.equal(v, before[k]) for k, v in network.backbone.state_dict().items())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_is_an_option(dropout):
    network, episodes, queries = tiny_pfenet(dropout=dropout).train(), tiny_episodes(), []
    network.matcher.register_forward_hook(lambda *call: queries.append(call[-1].query))
    network(episodes), network(episodes)
    assert torch.equal(*queries) == (dropout == 0)


def test_predictions_are_made_at_the_size_that_is_asked_for():
    network, episodes, given = tiny_pfenet().eval(), tiny_episodes(), []

    def resize(logits):
        given.append(logits)
        return F.interpolate(logits, size=(50, 70), mode="bilinear", align_corners=True)

    mask = network.predict(episodes, resize)
    torch.testing.assert_close(given[0], resized(network(episodes)[0], (32, 32)))
    assert mask.shape == (2, 50, 70)
    assert mask.dtype == torch.int64
    assert torch.equal(mask, resize(given[0]).argmax(1))
    assert torch.equal(network.predict(episodes), given[0].argmax(1))


def test_it_learns_what_only_the_support_tells():
    loss = loss_after_training(tiny_pfenet(channels=16, dropout=0))
    assert loss < 1.3  # the same queries have opposite labels: who sees no support cannot get below 2 ln 2


@pytest.mark.parametrize(
    ("make", "bins", "size", "sides"),
    [
        (lambda: ResNet(deep_stem=True, dilated=True), (60, 30, 15, 8), 473, [60, 30, 15, 8]),
        (lambda: ResNet((3, 4, 23, 3), deep_stem=True, dilated=True), RATIOS, 641, [81, 40, 20, 10]),
        (lambda: VGG16(batch_norm=True), RATIOS, 473, [30, 15, 7, 3]),
    ],
)
def test_published_sizes(make, bins, size, sides):
    with torch.device("meta"):
        network, images = PFENet(make(), bins=bins), torch.empty(1, 3, size, size)
        episodes = Episodes(images, images[:, None], torch.ones(1, 1, size, size), torch.ones(1, 1))
        final, inner = network(episodes)
    assert final.shape == (1, 2, sides[0], sides[0])
    assert [logits.shape for logits in inner] == [(1, 2, side, side) for side in sides]
