import math

import pytest
import torch
import torch.nn.functional as F

from models.fusion import Bottleneck, Concatenation, Finecoder, SoftmaxAggregation

KINDS = [Concatenation, SoftmaxAggregation]
LAYERS, STEPS, WIDTH, OUT = 3, 2, 4, 64


def build(kind):
    torch.manual_seed(0)
    return kind(LAYERS, STEPS, WIDTH, OUT)


def features():
    return torch.randn(2, LAYERS * STEPS * WIDTH, 3, 5, generator=torch.Generator().manual_seed(0))


def added(module, features):
    """What the module gives if it gets one feature at a time, in the order of the path."""
    sums = None
    parts = features.unflatten(1, (LAYERS, STEPS, WIDTH))
    for step in reversed(range(STEPS)):
        for layer in range(LAYERS):
            sums = module.add(parts[:, layer, step], layer, step, sums)
    return module.finish(sums)


@pytest.mark.parametrize("kind", KINDS)
def test_features_one_at_a_time_give_what_their_concatenation_gives(kind):
    module = build(kind)
    with torch.no_grad():
        torch.testing.assert_close(added(module, features()), module(features()))


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_and_step_reaches_the_fused_map(kind):
    module, inputs = build(kind), features().requires_grad_()
    module(inputs).sum().backward()
    slices = inputs.grad.unflatten(1, (LAYERS, STEPS, WIDTH)).abs().sum((0, 3, 4, 5))
    assert slices.shape == (LAYERS, STEPS) and (slices > 0).all()


def test_the_weights_of_the_softmax_sum_to_one_and_are_uniform_at_first():
    for layers in (6, 3):  # of the blocks with and without transformers
        assert torch.allclose(SoftmaxAggregation(layers, 9, 1, 64).weights, torch.tensor(1 / (9 * layers)))
    module = build(SoftmaxAggregation)
    with torch.no_grad():
        module.mixing[1, 2] = 3.0
    weights = module.weights.detach()
    assert weights.sum().item() == pytest.approx(1)
    assert (weights[1, 2] / weights[0, 0]).item() == pytest.approx(math.exp(2.0))


def test_a_layers_weights_weigh_that_layer_alone():
    module = build(SoftmaxAggregation)
    with torch.no_grad():
        module.mixing.fill_(-1e9)
        module.mixing[1, 2] = 0.0
    other = features()
    other[:, : (2 * STEPS + 1) * WIDTH] = 0  # all but layer 2, step 1
    torch.testing.assert_close(module(other), module(features()))


def test_a_bottleneck_is_the_published_residual_block():
    torch.manual_seed(0)
    module, x = Bottleneck(8, 64), torch.randn(1, 8, 5, 5)
    norm = lambda layer, y: F.group_norm(y, 16, layer.weight, layer.bias)  # noqa: E731
    inner = norm(module.reduce_norm, F.conv2d(x, module.reduce.weight)).relu()
    inner = norm(module.middle[1], F.conv2d(inner, module.middle[0].weight, padding=1)).relu()
    inner = norm(module.expand[1], F.conv2d(inner, module.expand[0].weight))
    short = norm(module.shortcut_norm, F.conv2d(x, module.shortcut.weight))
    torch.testing.assert_close(module(x), (short + inner).relu())
    assert module.reduce.out_channels == 16 and module.reduce.bias is None


def test_the_fusion_has_the_published_sizes():
    with torch.device("meta"):
        fused = [Concatenation(6, 9, *sizes) for sizes in ((1280, 2048), (640, 1024), (320, 512))]
        finecoder = Finecoder((2048, 1024, 512, 256))
        maps = [torch.empty(1, 2048, 16, 16), torch.empty(1, 1024, 32, 32), torch.empty(1, 512, 64, 64)]
        levels = finecoder(maps)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert [count(module) for module in fused] == [180_365_312, 45_093_888, 11_274_752]
    assert count(finecoder) == 68_832_512
    with torch.device("meta"):
        assert count(Concatenation(3, 9, 1280, 2048)) == 91_891_712  # that of the deepest block, not built
    shapes = [(256, 128, 128), (512, 64, 64), (1024, 32, 32), (2048, 16, 16)]
    assert [tuple(level.shape[1:]) for level in levels] == shapes


def test_only_the_finest_level_has_context_from_above():
    torch.manual_seed(0)
    finecoder = Finecoder((64, 64, 32, 32))
    maps = [torch.randn(1, width, size, size) for width, size in ((64, 2), (64, 4), (32, 8))]
    plain = finecoder(maps)
    changed = finecoder([torch.randn(1, 64, 2, 2), *maps[1:]])
    same = [torch.equal(a, b) for a, b in zip(plain, changed, strict=True)]
    assert same == [False, True, True, False]
    norm = finecoder.norms[2]
    torch.testing.assert_close(plain[1], F.group_norm(maps[2], 32, norm.weight, norm.bias))
