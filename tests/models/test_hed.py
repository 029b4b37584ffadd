import pytest
import torch

from models.hed import HED, LAYERS, WIDTHS, load_hed

SMALL = (4, 4, 8, 8, 8)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return HED(SMALL)


def test_names_and_shapes_are_those_of_the_published_weights():
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in HED().state_dict().items()}
    assert shapes.pop("norm") == (1, 3, 1, 1)
    assert sum(LAYERS) == 13 and WIDTHS == (64, 128, 256, 512, 512)
    assert shapes["block1.convs.0.weight"] == (64, 3, 3, 3)
    assert shapes["block3.convs.2.bias"] == (256,)
    assert shapes["block5.projection.weight"] == (1, 512, 1, 1)
    assert len(shapes) == 2 * (13 + 5)


def test_edges_are_bytes_of_the_image_s_size(network):
    edges = network(torch.rand(2, 3, 37, 50))
    assert edges.shape == (2, 37, 50) and edges.dtype == torch.uint8


def test_edges_are_the_sigmoid_of_the_mean_of_five_maps_cut_off_to_bytes(network):
    for number in range(1, 6):
        projection = network.get_submodule(f"block{number}").projection
        torch.nn.init.zeros_(projection.weight)
        torch.nn.init.constant_(projection.bias, float(number))
    expected = int(255 * torch.tensor(3.0).sigmoid())  # 242.9 becomes 242
    assert network(torch.rand(1, 3, 32, 32)).unique().tolist() == [expected]


def test_the_image_is_read_as_0_to_255_less_the_norm(network):
    image = torch.rand(1, 3, 32, 32)
    before = network(image)
    network.norm.data.fill_(51.0)
    assert torch.equal(network(image + 0.2), before)
    assert not torch.equal(network(image), before)


def test_weights_from_a_file_give_the_same_edges(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "hed.pth")
    image, loaded = torch.rand(1, 3, 32, 32), load_hed(tmp_path / "hed.pth")
    assert torch.equal(loaded(image), network(image))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_weights_that_lack_a_tensor_are_an_error_that_names_it(network, tmp_path):
    weights = network.state_dict()
    weights.pop("block2.convs.1.bias")
    torch.save(weights, tmp_path / "hed.pth")
    with pytest.raises(ValueError, match=r"block2\.convs\.1\.bias"):
        load_hed(tmp_path / "hed.pth")


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Bad:
        def __reduce__(self):
            return print, ("ran",)

    torch.save({"norm": Bad()}, tmp_path / "hed.pth")
    with pytest.raises(ValueError, match="cannot be read"):
        load_hed(tmp_path / "hed.pth")


def test_a_missing_file_is_an_error_that_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="lllyasviel/Annotators"):
        load_hed(tmp_path / "hed.pth")
