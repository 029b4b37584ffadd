"""HSNet: the paper's shapes and counts, its 4D convolution against a slow one, its vote and its training."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.few_shot import hsnet
from models.few_shot.episodes import Episodes
from models.few_shot.hsnet import CenterPivotConv4d, HSNet, hypercorrelation, resize_query, vote
from models.few_shot.resnet import ResNet, normalize
from models.few_shot.vgg import VGG16


def tiny(squeeze_channels=(4, 8, 8), blocks=(1, 2, 1, 1), seed=0) -> HSNet:
    torch.manual_seed(seed)
    return HSNet(ResNet(blocks, planes=(4, 4, 4, 4)), squeeze_channels)


def some_episodes(shot=1, size=64, batch=2, seed=1) -> Episodes:
    generator = torch.Generator().manual_seed(seed)
    pixels = (size, size)
    return Episodes(
        query=torch.rand(batch, 3, *pixels, generator=generator),
        supports=torch.rand(batch, shot, 3, *pixels, generator=generator),
        masks=torch.randint(0, 2, (batch, shot, *pixels), generator=generator),
        weights=torch.ones(batch, shot),
        label=torch.randint(0, 2, (batch, *pixels), generator=generator),
    )


@torch.no_grad()
def median_margin(host: HSNet, episodes: Episodes) -> torch.Tensor:
    """By how much the background is ahead in the median pixel: a host without training sees it everywhere."""
    logits = host(episodes.query, episodes.supports, episodes.masks)
    return (logits[:, :, 0] - logits[:, :, 1]).median()


def agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two predictions are the same but for the few pixels whose margin is a rounding error."""
    return a.shape == b.shape and (a != b).float().mean() < 1e-3


def centre_pivot_by_loops(conv: CenterPivotConv4d, x: torch.Tensor) -> torch.Tensor:
    """The 4D sum itself: over the two axes through the kernel's centre, position by position."""
    b, _, h, w, u, v = x.shape
    stride, pad = conv.support.stride[0], conv.support.padding[0]
    out = torch.zeros(b, conv.query.out_channels, h, w, -(-u // stride), -(-v // stride))
    out += (conv.query.bias + conv.support.bias)[:, None, None, None, None]
    steps = range(-pad, pad + 1)
    for i in range(h):
        for j in range(w):
            for m in range(out.shape[-2]):
                for n in range(out.shape[-1]):
                    for di in steps:
                        for dj in steps:
                            if 0 <= i + di < h and 0 <= j + dj < w:
                                weight = conv.query.weight[:, :, di + pad, dj + pad]
                                at_query = x[:, :, i + di, j + dj, m * stride, n * stride]
                                out[:, :, i, j, m, n] += at_query @ weight.T
                            k, q = m * stride + di, n * stride + dj
                            if 0 <= k < u and 0 <= q < v:
                                weight = conv.support.weight[:, :, di + pad, dj + pad]
                                out[:, :, i, j, m, n] += x[:, :, i, j, k, q] @ weight.T
    return out


@pytest.mark.parametrize(
    ("kernel_size", "stride", "query", "support"),
    [
        (3, 1, (3, 2), (2, 3)),
        (3, 2, (2, 3), (5, 4)),
        (5, 4, (2, 2), (9, 5)),
        (3, 1, (3, 3), (1, 1)),  # the rest ends as one position of the support
        (5, 4, (3, 2), (4, 4)),
        (5, 4, (2, 3), (2, 1)),
        (3, 2, (1, 2), (1, 2)),
    ],
)
@torch.no_grad()
def test_a_center_pivot_convolution_is_the_4d_sum_over_taps_at_either_centre(
    kernel_size, stride, query, support
):
    torch.manual_seed(0)
    conv = CenterPivotConv4d(2, 3, kernel_size, stride)
    x = torch.randn(2, 2, *query, *support)
    torch.testing.assert_close(conv(x), centre_pivot_by_loops(conv, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("support", [(1, 1), (2, 1), (5, 5)])
def test_gradients_do_not_depend_on_the_road_that_a_size_of_support_takes(support):
    torch.manual_seed(0)
    conv = CenterPivotConv4d(2, 3, 3, stride=2)
    x = torch.randn(2, 2, 3, 3, *support)
    conv(x).square().sum().backward()
    found = [parameter.grad.clone() for parameter in conv.parameters()]
    conv.zero_grad()
    at_query = F.conv2d(
        x[..., ::2, ::2].permute(0, 4, 5, 1, 2, 3).flatten(0, 2),
        conv.query.weight,
        conv.query.bias,
        padding=1,
    )
    kept = x[..., ::2, ::2].shape[-2:]
    at_query = at_query.unflatten(0, (2, *kept)).permute(0, 3, 4, 5, 1, 2)
    at_support = conv.support(x.permute(0, 2, 3, 1, 4, 5).flatten(0, 2))
    at_support = at_support.unflatten(0, (2, 3, 3)).permute(0, 3, 1, 2, 4, 5)
    (at_query + at_support).square().sum().backward()
    for gradient, parameter in zip(found, conv.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("backbone", "count"),
    [
        (lambda: ResNet((3, 4, 6, 3)), 2_573_794),
        (lambda: ResNet((3, 4, 23, 3)), 2_587_394),
        (lambda: VGG16(), 2_570_018),
    ],
)
def test_the_published_networks_have_the_published_number_of_learnable_parameters(backbone, count):
    with torch.device("meta"):
        host = HSNet(backbone())
    assert sum(p.numel() for p in host.parameters() if p.requires_grad) == count


def test_at_400_pixels_maps_have_the_shapes_of_the_paper():
    with torch.device("meta"):
        host = HSNet(ResNet())
        query, supports = torch.empty(1, 3, 400, 400), torch.empty(1, 1, 3, 400, 400)
        masks = torch.zeros(1, 1, 400, 400, dtype=torch.long)
        correlations = [torch.empty(1, taps, n, n, n, n) for taps, n in ((4, 50), (6, 25), (3, 13))]
        squeezed = [squeeze(c) for squeeze, c in zip(host.squeeze, correlations, strict=True)]
        logits = host.decoder(squeezed[0].mean((-2, -1)))
        found = host.correlate(host.taps(query), supports, masks)
    assert [c.shape for c in found] == [c.shape for c in correlations]
    assert [tuple(z.shape) for z in squeezed] == [(1, 128, n, n, 2, 2) for n in (50, 25, 13)]
    assert logits.shape == (1, 2, 100, 100)


@pytest.mark.parametrize("backbone", [ResNet((1, 1, 2, 1), (4, 4, 4, 4)), VGG16(planes=(4, 4, 8, 8))])
@pytest.mark.parametrize("size", [64, 128])
@torch.no_grad()
def test_small_images_give_logits_at_the_querys_size_for_each_support(backbone, size):
    episodes = some_episodes(shot=3, size=size)
    logits = HSNet(backbone, (4, 8, 8))(episodes.query, episodes.supports, episodes.masks)
    assert logits.shape == (2, 3, 2, size, size)
    assert logits.isfinite().all()


@torch.no_grad()
def test_one_network_takes_images_of_several_sizes_one_after_the_other():
    host = tiny()
    for size in (64, 96, 64):
        episodes = some_episodes(size=size)
        assert host.predict(episodes).shape == (2, size, size)
    first, again = (host.predict(some_episodes(size=64)) for _ in range(2))
    assert first.equal(again)


@torch.no_grad()
def test_layers_are_mixed_from_coarse_to_fine_and_the_supports_positions_averaged():
    torch.manual_seed(0)
    host = tiny()
    query, supports = torch.rand(1, 3, 288, 32), torch.rand(1, 1, 3, 288, 32)
    masks = torch.ones(1, 1, 288, 32, dtype=torch.long)

    def resize(x, size):
        return F.interpolate(x, size, mode="bilinear", align_corners=True)

    correlations = host.correlate(host.taps(query), supports, masks)
    fine, middle, x = (squeeze(c) for squeeze, c in zip(host.squeeze, correlations, strict=True))
    assert x.shape[-2:] == (2, 1)  # what is left of the support
    for mix, finer in zip(host.mix, (middle, fine), strict=True):
        x = torch.stack([resize(x[..., m, 0], finer.shape[2:4]) for m in range(2)], -1)[..., None]
        x = mix(x + finer)
    x = host.decoder[:4]((x[..., 0, 0] + x[..., 1, 0]) / 2)
    logits = resize(host.decoder[5:](resize(x, (72, 8))), (288, 32))
    torch.testing.assert_close(host(query, supports, masks)[:, 0], logits, atol=1e-5, rtol=1e-4)


def test_only_the_querys_positions_are_resized():
    x = torch.arange(24.0).view(1, 2, 2, 1, 2, 3)
    found = resize_query(x, (3, 1))
    torch.testing.assert_close(found[:, :, [0, 2]], x)
    torch.testing.assert_close(found[:, :, 1], x.mean(2))


def test_sizes_whose_layers_end_differently_are_an_error_that_says_which_to_use():
    host = HSNet(VGG16(planes=(4, 4, 4, 4)), (4, 4, 4))
    with pytest.raises(ValueError, match=r"\[\(2, 2\), \(1, 1\), \(1, 1\)\].*\(264, 264\).*multiples of 32"):
        host.predict(some_episodes(size=264, batch=1))


def test_widths_that_cannot_be_normalised_in_groups_are_an_error():
    with pytest.raises(ValueError, match=r"squeeze_channels is \[4, 6, 8\]\. Give multiples of 4"):
        tiny((4, 6, 8))


def test_squeeze_channels_set_the_width_of_every_part():
    host = tiny((4, 12, 8))
    assert [m.out_channels for m in host.decoder if isinstance(m, nn.Conv2d)] == [8, 12, 12, 2]
    widths = [m.query.out_channels for m in host.squeeze[0] if isinstance(m, CenterPivotConv4d)]
    assert widths == [4, 12, 8]
    assert all(m.query.out_channels == 8 for mix in host.mix for m in mix if isinstance(m, CenterPivotConv4d))


def test_a_hypercorrelation_is_the_clamped_cosine_of_every_pair_of_positions_times_the_masks_support():
    torch.manual_seed(0)
    query = [torch.randn(2, 5, 2, 3) for _ in range(2)]
    supports = [torch.randn(6, 5, 3, 3) for _ in range(2)]  # 3 supports a query
    found = hypercorrelation(query, supports, torch.ones(6, 1, 3, 3))
    assert found.shape == (6, 2, 2, 3, 3, 3)
    assert found.min() == 0
    assert found.max() <= 1
    by_hand = F.cosine_similarity(query[1][1, :, 1, 2], supports[1][4, :, 0, 1], dim=0)
    torch.testing.assert_close(found[4, 1, 1, 2, 0, 1], by_hand.clamp(min=0), atol=1e-4, rtol=0)


def test_where_the_supports_mask_is_empty_nothing_correlates():
    torch.manual_seed(0)
    query, supports = [torch.rand(1, 5, 4, 4)], [torch.rand(1, 5, 4, 4)]
    assert not hypercorrelation(query, supports, torch.zeros(1, 1, 8, 8)).any()
    thin = torch.zeros(1, 1, 4, 5)
    thin[..., 2] = 1  # between the first and the last of 4 columns lie parts of it
    assert hypercorrelation(query, supports, thin).gt(0).any(-2)[0, 0, 0, 0].tolist() == [
        False,
        True,
        True,
        False,
    ]
    half = torch.zeros(1, 1, 4, 4)
    half[..., :2] = 1
    found = hypercorrelation(query, supports, half)
    assert (found[..., :2] > 0).all()
    assert not found[..., 2:].any()


@torch.no_grad()
def test_void_pixels_of_a_supports_mask_are_masked_away_like_background():
    host, episodes = tiny(), some_episodes()
    void = replace(episodes, masks=torch.where(episodes.masks == 1, 1, 255))
    args = (episodes.query, episodes.supports)
    torch.testing.assert_close(host(*args, void.masks), host(*args, episodes.masks))
    everything = torch.ones_like(episodes.masks)
    assert not host(*args, everything).allclose(host(*args, episodes.masks))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([0, 1, 2, 3], [0, 0, 1, 1]),
        ([0, 1, 0, 0], [0, 1, 0, 0]),
        ([0, 1, 2, 5], [0, 0, 0, 1]),
        ([0, 1, 2, 4], [0, 0, 1, 1]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_a_vote_needs_half_of_the_most_votes_that_any_pixel_has(counts, expected):
    masks = torch.arange(5)[:, None, None] < torch.tensor([counts])  # pixel p has counts[p] of 5 supports
    assert vote(masks[None], torch.ones(1, 5)).tolist() == [[expected]]


def test_each_image_of_a_batch_votes_by_itself():
    masks = torch.zeros(2, 5, 1, 2, dtype=torch.bool)
    masks[0, :, 0, 0], masks[0, :2, 0, 1] = True, True  # 5 and 2 votes
    masks[1, :3, 0, 0], masks[1, :2, 0, 1] = True, True  # 3 and 2 votes
    assert vote(masks, torch.ones(2, 5)).tolist() == [[[1, 0]], [[1, 1]]]


def test_weights_of_one_give_the_unweighted_rule():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(8, 5, 16, 16, generator=generator) > torch.rand(8, 1, 16, 16, generator=generator)
    count = masks.sum(1)
    unweighted = count / count.amax((1, 2), keepdim=True).clamp(min=1) >= 0.5
    assert vote(masks, torch.ones(8, 5)).equal(unweighted.long())


def test_fractional_weights_count_and_the_heaviest_support_bounds_the_maximum_from_below():
    real, aux = [[True, False, False]], [[False, True, False]]
    masks = torch.tensor([[real, aux, aux]])
    # v = 1, 0.6, 0: the auxiliary ones together have more than half of 1, one of them has not
    assert vote(masks, torch.tensor([[1.0, 0.3, 0.3]])).tolist() == [[[1, 1, 0]]]
    assert vote(masks, torch.tensor([[1.0, 0.3, 0.0]])).tolist() == [[[1, 0, 0]]]
    # No pixel of the real one: max v = 0.4 alone would accept, but m is the real one's weight 1
    masks[:, 0] = False
    assert vote(masks, torch.tensor([[1.0, 0.2, 0.2]])).tolist() == [[[0, 0, 0]]]
    assert vote(masks, torch.tensor([[0.0, 0.2, 0.2]])).tolist() == [[[0, 1, 0]]]


def test_the_order_of_fractional_weights_does_not_decide_a_tie():
    weights = torch.tensor([0.3, 0.1, 0.1, 0.6, 1.1])
    says = torch.tensor([1, 1, 1, 1, 0]).bool()  # exactly half of the weight, and of the most votes
    masks = torch.stack([says, torch.ones(5, dtype=torch.bool)], 1)[:, None]  # [K, 1, 2 pixels]
    for seed in range(12):
        order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
        assert vote(masks[order][None], weights[order][None]).tolist() == [[[1, 1]]]


def test_duplicates_of_one_support_and_one_without_weight_change_nothing_and_order_does_not_matter():
    host, episodes = tiny(), some_episodes(shot=4)
    host.decoder[-1].bias.data[1] += median_margin(host, episodes)  # or all would be background
    one = replace(
        episodes, supports=episodes.supports[:, :1], masks=episodes.masks[:, :1], weights=torch.ones(2, 1)
    )
    alone = host.predict(one)
    assert 0 < alone.float().mean() < 1
    logits = host(one.query, one.supports, one.masks)[:, 0]
    assert agree(alone, logits.argmax(1))
    copies = replace(one, supports=one.supports.repeat(1, 3, 1, 1, 1), masks=one.masks.repeat(1, 3, 1, 1))
    assert agree(host.predict(replace(copies, weights=torch.ones(2, 3))), alone)

    assert not agree(host.predict(episodes), alone)
    weighted = replace(episodes, weights=torch.tensor([[1.0, 0.4, 0.4, 0.4]]).repeat(2, 1))
    only_first = replace(episodes, weights=torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(2, 1))
    assert agree(host.predict(only_first), alone)
    order = torch.tensor([2, 0, 3, 1])
    for case in (episodes, weighted):
        shuffled = Episodes(case.query, case.supports[:, order], case.masks[:, order], case.weights[:, order])
        assert agree(host.predict(shuffled), host.predict(case))


def test_the_backbone_sees_each_query_once_and_every_image_normalised(monkeypatch):
    host, episodes, seen = tiny(), some_episodes(shot=3), []
    taps = host.backbone.taps
    monkeypatch.setattr(host.backbone, "taps", lambda image: seen.append(image) or taps(image))
    host.predict(episodes)
    query, supports = seen
    torch.testing.assert_close(query, normalize(episodes.query))
    torch.testing.assert_close(supports, normalize(episodes.supports.flatten(0, 1)))


@pytest.mark.parametrize("shot", [1, 5])
@pytest.mark.parametrize(("at_once", "most"), [(0, 1), (2, 2), (3.5, 3), (12, 10), (None, 15)])
def test_supports_are_taken_in_turn_so_that_correlations_stay_small(shot, at_once, most, monkeypatch):
    host, episodes, pairs, queries = tiny(), some_episodes(shot=shot, batch=3), [], []
    host.decoder[-1].bias.data[1] += median_margin(host, episodes)  # or all would be background
    expected = vote(host(episodes.query, episodes.supports, episodes.masks).argmax(2) == 1, episodes.weights)
    assert 0 < expected.float().mean() < 1

    correlate, of_layer2 = host.correlate, 2 * 8**4  # numbers of one support: two maps of 8 x 8
    taps = host.backbone.taps
    monkeypatch.setattr(host, "correlate", lambda *a: pairs.append(found := correlate(*a)) or found)
    monkeypatch.setattr(host.backbone, "taps", lambda x: queries.append(len(x)) or taps(x))
    if at_once is not None:
        monkeypatch.setattr(hsnet, "CORRELATIONS_AT_ONCE", int(at_once * of_layer2))
    assert agree(host.predict(episodes), expected)
    sizes = [max(c.numel() for c in found) / of_layer2 for found in pairs]
    assert sum(sizes) == 3 * shot
    assert max(sizes) == min(most, 3 * shot)
    assert queries == [3, *sizes]  # those of the queries are made once


@torch.no_grad()
def test_supports_of_another_size_than_the_query_count_by_theirs(monkeypatch):
    host, small, seen = tiny(), some_episodes(shot=4, batch=1), []
    large = replace(some_episodes(shot=4, batch=1, size=128), query=small.query)
    correlate = host.correlate
    monkeypatch.setattr(host, "correlate", lambda *a: seen.append(len(a[1][0])) or correlate(*a))
    monkeypatch.setattr(hsnet, "CORRELATIONS_AT_ONCE", 4 * 2 * 8**4)
    host.predict(small), host.predict(large)
    assert seen == [4, 1, 1, 1, 1]


@torch.no_grad()
def test_each_support_predicts_as_if_it_were_alone():
    host, episodes = tiny(), some_episodes(shot=3)
    together = host(episodes.query, episodes.supports, episodes.masks)
    for k in range(3):
        alone = host(episodes.query, episodes.supports[:, k : k + 1], episodes.masks[:, k : k + 1])
        torch.testing.assert_close(together[:, k : k + 1], alone, atol=1e-5, rtol=1e-4)


def test_resize_is_given_the_logits_of_every_support_and_sets_the_predictions_size():
    host, episodes, seen = tiny(), some_episodes(shot=3), []

    def resize(logits):
        seen.append(logits.shape)
        return F.interpolate(logits, (40, 50), mode="bilinear")

    prediction = host.predict(episodes, resize)
    assert seen == [(6, 2, 64, 64)]
    assert prediction.shape == (2, 40, 50)
    assert prediction.dtype == torch.int64


def test_the_loss_counts_void_as_background_and_looks_at_the_first_support_only():
    host, episodes = tiny(), some_episodes(shot=3)
    loss = host.losses(episodes)["loss"]
    logits = host(episodes.query, episodes.supports[:, :1], episodes.masks[:, :1])[:, 0]
    torch.testing.assert_close(loss, F.cross_entropy(logits, episodes.label))
    void = replace(episodes, label=torch.where(episodes.label == 0, 255, 1))
    torch.testing.assert_close(host.losses(void)["loss"], loss)
    order = torch.tensor([0, 2, 1])
    swapped = replace(
        episodes,
        supports=episodes.supports[:, order],
        masks=episodes.masks[:, order],
        weights=torch.rand(2, 3),
    )
    torch.testing.assert_close(host.losses(swapped)["loss"], loss)
    other = replace(episodes, supports=episodes.supports.flip(1), masks=episodes.masks.flip(1))
    assert not host.losses(other)["loss"].allclose(loss)


def test_gradients_reach_every_part_but_the_backbone_which_stays_in_eval_mode():
    host = tiny().train()
    before = {key: value.clone() for key, value in host.backbone.state_dict().items()}
    host.losses(some_episodes(size=256, batch=1))["loss"].backward()
    for name, parameter in host.named_parameters():
        assert parameter.requires_grad != name.startswith("backbone."), name
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == parameter.requires_grad, name
    assert host.training
    assert not any(module.training for module in host.backbone.modules())
    assert all(value.equal(before[key]) for key, value in host.backbone.state_dict().items())


def test_a_few_steps_on_one_batch_lower_the_loss():
    host, episodes = tiny(), some_episodes()
    label = torch.zeros(2, 64, 64, dtype=torch.long)
    label[:, 16:48, 16:48] = 1
    episodes = replace(episodes, label=label)
    optimizer = torch.optim.Adam([p for p in host.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        losses.append(host.losses(episodes)["loss"])
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
