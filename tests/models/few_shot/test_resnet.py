import pytest
import torch
from transformers import ResNetConfig, ResNetModel

from models.few_shot.resnet import ResNet, normalize

TINY = {"blocks": (1, 2, 3, 2), "planes": (2, 4, 8, 16)}


def tiny(**options):
    """A small network whose BatchNorms have statistics as after a training."""
    torch.manual_seed(0)
    network = ResNet(**TINY, **options).train()
    for _ in range(3):
        network.stages(torch.randn(4, 3, 64, 64))
    return network.eval().requires_grad_(False)


def shapes(blocks, size, **options):
    with torch.device("meta"):
        network, image = ResNet(blocks, **options), torch.empty(1, 3, size, size)
    maps = [tuple(stage.shape[1:]) for stage in network.stages(image)]
    return maps, [[tuple(tap.shape[1:]) for tap in taps] for taps in network.taps(image)]


@pytest.mark.parametrize(("size", "side"), [(473, 60), (641, 81), (633, 80)])
def test_layers_2_to_4_of_the_dilated_deep_stem_network_have_the_published_sizes(size, side):
    stages, _ = shapes((3, 4, 6, 3), size, deep_stem=True, dilated=True)
    assert stages[1:] == [(512, side, side), (1024, side, side), (2048, side, side)]


@pytest.mark.parametrize(("blocks", "counts"), [((3, 4, 6, 3), (4, 6, 3)), ((3, 4, 23, 3), (4, 23, 3))])
def test_hsnets_taps_of_resnet_50_and_101_at_400_have_the_published_numbers_and_sizes(blocks, counts):
    stages, taps = shapes(blocks, 400)
    assert stages == [(256, 100, 100), (512, 50, 50), (1024, 25, 25), (2048, 13, 13)]
    assert [len(group) for group in taps] == list(counts)
    assert [set(group) for group in taps] == [{stage} for stage in stages[1:]]


@pytest.mark.parametrize(
    ("blocks", "parameters"),
    # torchvision's published totals less the classifier's 2048 * 1000 + 1000
    [((3, 4, 6, 3), 25_557_032 - 2_049_000), ((3, 4, 23, 3), 44_549_160 - 2_049_000)],
)
def test_resnet_50_and_101_have_torchvisions_parameters(blocks, parameters):
    with torch.device("meta"):
        network = ResNet(blocks)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    names = network.state_dict().keys()
    for name in ("conv1.weight", "bn1.bias", "layer1.0.downsample.1.running_var", "layer4.2.conv3.weight"):
        assert name in names
    assert "layer1.1.downsample.0.weight" not in names


def our_name(key):
    """Such as encoder.stages.0.layers.1.layer.2.normalization.bias -> layer1.1.bn3.bias."""
    if key.startswith("embedder"):
        return key.replace("embedder.embedder.convolution", "conv1").replace(
            "embedder.embedder.normalization", "bn1"
        )
    _, _, stage, _, block, part, *rest = key.split(".")
    if part == "shortcut":
        names = ("downsample", "0" if rest[0] == "convolution" else "1", rest[1])
    else:
        names = (f"{'conv' if rest[1] == 'convolution' else 'bn'}{int(rest[0]) + 1}", rest[2])
    return ".".join([f"layer{int(stage) + 1}", block, *names])


def test_its_outputs_are_those_of_transformers_resnet_with_the_same_weights():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=2, hidden_sizes=[8, 16, 32, 64], depths=list(TINY["blocks"]))
    reference, network, image = ResNetModel(config).train(), tiny(), torch.randn(2, 3, 65, 48)
    reference(image)  # gives the BatchNorms statistics
    reference.eval().requires_grad_(False)
    network.load_state_dict({our_name(key): value for key, value in reference.state_dict().items()})
    torch.testing.assert_close(network.stages(image)[3], reference(image).last_hidden_state)


@pytest.mark.parametrize("options", [{}, {"deep_stem": True, "dilated": True}])
def test_a_tap_is_a_blocks_sum_before_its_last_relu_and_no_later_layer_overwrites_it(options):
    network, image = tiny(**options), torch.randn(2, 3, 64, 64)
    taps, stages = network.taps(image), network.stages(image)
    assert tuple(len(group) for group in taps) == network.tap_counts == (2, 3, 2)
    for group, stage in zip(taps, stages[1:], strict=True):
        assert all((tap < 0).any() for tap in group)
        torch.testing.assert_close(group[-1].relu(), stage, rtol=0, atol=0)
    second = network.layer2[1]
    torch.testing.assert_close(taps[0][1], second.residual_sum(taps[0][0].relu()), rtol=0, atol=0)


def test_the_stride_is_in_the_3x3_convolution_and_every_dilated_block_has_its_layers_dilation():
    for dilated, strides, dilations in (
        (False, (1, 2, 2, 2), (1, 1, 1, 1)),
        (True, (1, 2, 1, 1), (1, 1, 2, 4)),
    ):
        network = tiny(dilated=dilated)
        layers = (network.layer1, network.layer2, network.layer3, network.layer4)
        for layer, stride, dilation in zip(layers, strides, dilations, strict=True):
            assert {block.conv1.stride for block in layer} == {(1, 1)}
            assert [block.conv2.stride[0] for block in layer] == [stride] + [1] * (len(layer) - 1)
            assert {block.conv2.dilation for block in layer} == {(dilation, dilation)}
            assert {block.conv2.padding for block in layer} == {(dilation, dilation)}
            assert layer[0].downsample[0].stride == (stride, stride)


def test_the_deep_stem_has_three_convolutions_that_all_count():
    network, image = tiny(deep_stem=True), torch.randn(1, 3, 32, 32)
    before = network.stages(image)[0]
    sizes = [tuple(getattr(network, f"conv{i}").weight.shape) for i in (1, 2, 3)]
    assert sizes == [(2, 3, 3, 3), (2, 2, 3, 3), (4, 2, 3, 3)]
    for name in ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3"):
        changed = tiny(deep_stem=True)
        getattr(changed, name).weight[0] += 1
        assert not torch.equal(changed.stages(image)[0], before), name


def test_layer4_can_be_run_on_a_layer3_map_of_its_own():
    network = tiny(dilated=True)
    stages = network.stages(torch.randn(1, 3, 64, 64))
    torch.testing.assert_close(network.layer4(stages[2]), stages[3], rtol=0, atol=0)
    assert [stage.shape[1] for stage in stages] == list(network.channels) == [8, 16, 32, 64]


def test_images_are_normalised_by_the_statistics_of_imagenet():
    image = torch.tensor([0.485, 0.456, 1.0]).view(3, 1, 1).expand(2, 5, 3, 4, 4)
    expected = torch.tensor([0.0, 0.0, (1 - 0.406) / 0.225]).view(3, 1, 1).expand_as(image)
    torch.testing.assert_close(normalize(image), expected)


def test_without_weights_convolutions_are_drawn_to_keep_the_gradients_size_through_relu():
    torch.manual_seed(0)
    weight = ResNet((1, 1, 1, 1), (2, 2, 2, 64)).layer4[0].conv2.weight
    assert abs(weight.std() / (2 / (64 * 9)) ** 0.5 - 1) < 0.02  # Kaiming, fan out


def test_channels_last_is_the_memory_order_of_all_maps_and_changes_no_number():
    torch.manual_seed(0)
    plain = ResNet((1, 1, 1, 1), (4, 4, 8, 8)).eval()
    other = ResNet((1, 1, 1, 1), (4, 4, 8, 8), channels_last=True).eval()
    other.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 64, 64)
    for a, b in zip(plain.stages(image), other.stages(image), strict=True):
        torch.testing.assert_close(a, b)
        assert not a.is_contiguous(memory_format=torch.channels_last)
        assert b.is_contiguous(memory_format=torch.channels_last)
