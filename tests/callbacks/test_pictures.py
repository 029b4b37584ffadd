import numpy as np
import torch

from callbacks.pictures import comparison, confusion_picture, heat_maps, legend, to_uint8

NAMES, COLORS = ("road", "traffic sign"), ((10, 20, 30), (200, 100, 0))


def has_color(picture, color) -> bool:
    return bool((picture == np.array(color, np.uint8)).all(-1).any())


def test_a_legend_shows_each_color_in_the_width_asked_for():
    picture = legend(NAMES, COLORS, 300)
    assert picture.shape[1] == 300 and has_color(picture, COLORS[0]) and has_color(picture, COLORS[1])
    assert legend(NAMES, COLORS, 120).shape[0] > picture.shape[0]  # one below the other


def test_a_comparison_shows_the_classes_that_occur_in_truth_or_prediction():
    image = np.full((8, 8, 3), 90, np.uint8)
    truth, prediction = np.zeros((8, 8), np.uint8), np.ones((8, 8), np.uint8)
    truth[0, 0] = 255
    picture = comparison(image, truth, prediction, NAMES, COLORS, width=64)
    assert picture.shape[1] == 4 * 64 + 3 * 4
    assert all(has_color(picture, color) for color in (*COLORS, (90, 90, 90)))
    assert comparison(image, None, prediction, NAMES, COLORS, width=64).shape[1] == 3 * 64 + 2 * 4
    assert not has_color(comparison(image, None, prediction, NAMES, COLORS, width=64), COLORS[0])


def test_an_image_of_another_size_than_its_label_is_drawn_in_the_labels_size():
    image, ids = np.full((6, 5, 3), 90, np.uint8), np.zeros((8, 16), np.uint8)
    picture = comparison(image, ids, ids, NAMES, COLORS, width=16)
    assert np.array_equal(picture, comparison(np.full((8, 16, 3), 90, np.uint8), ids, ids, NAMES, COLORS, 16))


def test_heat_maps_stand_in_a_grid_after_the_image_each_below_its_name():
    image = np.full((6, 8, 3), 90, np.uint8)
    maps = {"dog": np.ones((6, 8), np.float32), "grass": np.zeros((6, 8), np.float32)}
    picture = heat_maps(image, maps)
    height, width = 6 * 32 + 18, 256  # a panel with its title
    assert picture.shape == (height + 4, 3 * width + 2 * 4, 3)
    shown, dog, grass = (picture[18:height, i * 260 : i * 260 + width] for i in range(3))
    assert (shown == 90).all() and (dog == (8, 48, 107)).all() and (grass == 255).all()
    titles = [picture[:18, i * 260 : i * 260 + width].tobytes() for i in range(3)]
    assert len(set(titles)) == 3
    in_two_rows = heat_maps(image, maps, columns=2)
    assert in_two_rows.shape == (2 * (height + 4), 2 * width + 4, 3)
    np.testing.assert_array_equal(in_two_rows[height + 4 + 18 : -4, :width], grass)
    assert heat_maps(image, {}).shape == (height + 4, width, 3)


def test_heat_maps_of_a_large_image_are_small():
    image, values = np.full((300, 1000, 3), 90, np.uint8), np.zeros((300, 1000), np.float32)
    values[:, 500:] = 1
    picture = heat_maps(image, {"dog": values}, width=100)
    assert picture.shape == (30 + 18 + 4, 2 * 100 + 4, 3)
    assert (picture[18:48, 104:150] == 255).all() and (picture[18:48, 160:] == (8, 48, 107)).all()


def test_a_confusion_matrix_is_darkest_where_all_pixels_of_a_class_are():
    picture = confusion_picture(np.array([[10, 0], [0, 0]]), NAMES)
    assert has_color(picture, (8, 48, 107))  # all of road is road
    assert has_color(picture, (200, 200, 200))  # there is no traffic sign
    assert not has_color(confusion_picture(np.array([[5, 5], [5, 5]]), NAMES), (8, 48, 107))


def test_an_image_tensor_becomes_bytes():
    assert to_uint8(torch.tensor([0.0, 0.5, 2.0]).view(3, 1, 1)).tolist() == [[[0, 128, 255]]]
