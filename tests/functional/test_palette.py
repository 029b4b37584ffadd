import numpy as np
import pytest
import torch

from functional.classes import class_table
from functional.palette import colorize, decode_palette, encode_palette, heat, overlay, palette_table

COLORS = ((10, 20, 30), (200, 100, 0))


def test_every_id_gets_its_color_and_ignored_pixels_become_white():
    label = np.array([[0, 1], [255, 1]], np.uint8)
    expected = [[[10, 20, 30], [200, 100, 0]], [[255, 255, 255], [200, 100, 0]]]
    assert colorize(label, COLORS).tolist() == expected
    assert colorize(label, COLORS).dtype == np.uint8


def test_an_id_without_color_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"\[7\] with 2 classes"):
        colorize(np.array([[0, 7]], np.uint8), COLORS)


def test_an_overlay_mixes_by_opacity_and_leaves_ignored_pixels_alone():
    image = np.full((1, 2, 3), 100, np.uint8)
    label = np.array([[1, 255]], np.uint8)
    assert overlay(image, label, COLORS, opacity=0.5).tolist() == [[[150, 100, 50], [100, 100, 100]]]
    assert overlay(image, label, COLORS, opacity=1.0)[0, 0].tolist() == [200, 100, 0]
    assert overlay(image, label, COLORS, opacity=0.0).tolist() == image.tolist()


def test_heat_runs_from_white_to_dark_blue_and_unknown_is_grey():
    colors = heat(np.array([0.0, 1.0, np.nan]))
    assert colors.tolist() == [[255, 255, 255], [8, 48, 107], [200, 200, 200]]
    assert heat(np.linspace(0, 1, 20)).sum(-1).astype(int).tolist() == sorted(
        heat(np.linspace(0, 1, 20)).sum(-1).astype(int).tolist(), reverse=True
    )


@pytest.mark.parametrize("name", ["deliver11", "fmb9"])
def test_a_label_survives_its_colours_and_noise_below_half_their_smallest_distance(name):
    colors = class_table(name).colors
    table, label = palette_table(colors), torch.arange(len(colors)).view(1, 1, -1).repeat(2, 1, 1)
    image = encode_palette(label, table)
    assert image.shape == (2, 3, 1, len(colors)) and table.shape == (256, 3)
    assert torch.equal(decode_palette(image, table[: len(colors)]), label)
    noise = torch.randn(200, 3, 1, len(colors), generator=torch.Generator().manual_seed(0))
    noise *= 0.0724 / noise.norm(dim=1, keepdim=True)
    noisy = decode_palette(image[:1] + noise, table[: len(colors)])
    assert torch.equal(noisy, label[:1].expand(200, -1, -1))


def test_the_closest_colours_of_the_palette_are_fence_and_pole():
    table = palette_table(class_table("deliver11").colors)[:11]
    distances = torch.cdist(table, table) + torch.eye(11)
    assert distances.min().item() == pytest.approx(0.1451, abs=5e-5)
    assert divmod(int(distances.argmin()), 11) == (2, 4)


def test_colours_of_road_and_car_and_of_ignored_pixels_are_the_published_ones():
    label = torch.tensor([[[5, 8, 255]]])
    colors = 2 * encode_palette(label, palette_table(class_table("deliver11").colors)) - 1
    expected = torch.tensor([[0.0039, -0.4980, 0.0039], [-1, -1, 0.1137], [-1, -1, -1]])
    torch.testing.assert_close(colors[0, :, 0].T, expected, atol=5e-5, rtol=0)


def test_what_lies_outside_the_range_is_clipped_before_it_is_decoded():
    colors = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.9, 0.0]])
    image = torch.tensor([1.0, 0.4, -9.0]).view(1, 3, 1, 1)
    assert decode_palette(image, colors).item() == 0
    assert decode_palette(torch.tensor([9.0, 1.5, 0.0]).view(1, 3, 1, 1), colors).item() == 1
