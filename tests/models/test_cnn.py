import pytest
import torch

from models.cnn import ConvSegmenter


@pytest.mark.parametrize("size", [(64, 64), (33, 70), (1, 1)])
def test_logits_have_the_size_of_the_image_whatever_it_is(size):
    network = ConvSegmenter(5, (8, 8, 16, 16), 8, 8).eval()
    assert network(torch.rand(2, 3, *size)).shape == (2, 5, *size)


def test_its_levels_have_the_strides_2_to_16_and_all_of_it_learns():
    network, shapes = ConvSegmenter(5, (8, 8, 16, 24), 8, 8), []
    network.head.register_forward_pre_hook(lambda _, inputs: shapes.extend(f.shape[1:] for f in inputs[0]))
    network(torch.rand(2, 3, 32, 64)).square().mean().backward()
    assert [tuple(shape) for shape in shapes] == [(8, 16, 32), (8, 8, 16), (16, 4, 8), (24, 2, 4)]
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters() if parameter.ndim > 1)
