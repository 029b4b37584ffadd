import numpy as np
import pytest

from functional.palette import colorize, heat, overlay

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
