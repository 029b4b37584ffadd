import pytest
import torch
from torch import nn

from models.few_shot.vgg import VGG16

PUBLISHED = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
PLANES = (2, 4, 6, 8)


def reference(batch_norm):
    """torchvision's `features`, thin: one sequence of modules, in its order."""
    torch.manual_seed(0)
    modules, before = [], 3
    for width in PUBLISHED:
        if width == "M":
            modules.append(nn.MaxPool2d(2, 2, ceil_mode=batch_norm))
            continue
        width = dict(zip((64, 128, 256, 512), PLANES, strict=True))[width]
        modules.append(nn.Conv2d(before, width, 3, padding=1))
        modules += [nn.BatchNorm2d(width), nn.ReLU()] if batch_norm else [nn.ReLU()]
        before = width
    features = nn.Sequential(*modules).train()
    features(torch.randn(2, 3, 64, 64))  # gives BatchNorms statistics
    return features.eval().requires_grad_(False)


def outputs(features, image):
    maps = []
    for module in features:
        image = module(image)
        maps.append(image)
    return maps


def loaded(features, batch_norm):
    network = VGG16(batch_norm, PLANES).eval().requires_grad_(False)
    weights = {f"features.{key}": value for key, value in features.state_dict().items()}
    network.load_state_dict(network.rename(weights))
    return network


def shapes(maps):
    return [tuple(x.shape[1:]) for x in maps]


@pytest.mark.parametrize(
    ("batch_norm", "numbers"),
    [(False, ([17, 19, 21], [24, 26, 28], [30])), (True, ([25, 28, 31], [35, 38, 41], [43]))],
)
def test_hsnets_taps_are_the_published_modules_of_torchvision_before_their_relu(batch_norm, numbers):
    features, image = reference(batch_norm), torch.randn(2, 3, 64, 64)
    expected, network = outputs(features, image), loaded(features, batch_norm)
    taps = network.taps(image)
    assert tuple(len(group) for group in taps) == network.tap_counts == (3, 3, 1)
    for group, modules in zip(taps, numbers, strict=True):
        for tap, module in zip(group, modules, strict=True):
            torch.testing.assert_close(tap, expected[module], rtol=0, atol=0)
    assert all((tap < 0).any() for group in taps[:2] for tap in group)


@pytest.mark.parametrize(("batch_norm", "ends"), [(True, (13, 23, 33, 42)), (False, (9, 16, 23, 29))])
def test_its_layers_end_where_the_published_split_of_torchvisions_modules_does(batch_norm, ends):
    features, image = reference(batch_norm), torch.randn(2, 3, 37, 50)
    expected, network = outputs(features, image), loaded(features, batch_norm)
    stages = network.stages(image)
    for stage, end in zip(stages, ends, strict=True):
        torch.testing.assert_close(stage, expected[end], rtol=0, atol=0)
    assert [stage.shape[1] for stage in stages] == list(network.channels) == [4, 6, 8, 8]
    torch.testing.assert_close(network.layer4(stages[2]), stages[3], rtol=0, atol=0)


def test_sizes_are_the_published_ones_and_only_pools_beside_batch_norm_round_them_up():
    with torch.device("meta"):
        network, plain = VGG16(batch_norm=True), VGG16()
        image, small = torch.empty(1, 3, 473, 473), torch.empty(1, 3, 400, 400)
    expected = [(128, 119, 119), (256, 60, 60), (512, 30, 30), (512, 30, 30)]
    assert shapes(network.stages(image)) == expected
    assert shapes(plain.stages(image))[1:3] == [(256, 59, 59), (512, 29, 29)]
    expected = [[(512, 50, 50)] * 3, [(512, 25, 25)] * 3, [(512, 12, 12)]]
    assert [shapes(group) for group in plain.taps(small)] == expected
    # torchvision's published totals less the classifier's 123,642,856
    for module, total in ((plain, 138_357_544), (network, 138_365_992)):
        assert sum(parameter.numel() for parameter in module.parameters()) == total - 123_642_856


def test_without_weights_convolutions_are_drawn_for_a_training_from_scratch():
    torch.manual_seed(0)
    last = VGG16(planes=(2, 2, 2, 64)).layer4[4]
    assert abs(last.weight.std() / (2 / (64 * 9)) ** 0.5 - 1) < 0.02 and not last.bias.any()
