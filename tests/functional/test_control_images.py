import pytest
import torch

from functional.classes import MINI_OBJECTS
from functional.control_images import edge_image, mask_image
from functional.palette import colorize


def test_a_mask_shows_each_class_in_its_colour_and_ignored_pixels_in_white():
    label = torch.tensor([[0, 1, 255]])
    image = mask_image(label, MINI_OBJECTS.colors)
    assert image.shape == (1, 3, 1, 3) and image.dtype == torch.float32
    assert (image[0, :, 0].T * 255).round().int().tolist() == [[0, 0, 0], [0, 0, 142], [255, 255, 255]]


def test_a_mask_has_the_colours_of_the_coloured_label_at_every_pixel():
    label = torch.randint(len(MINI_OBJECTS), (2, 5, 7), generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(colorize(label.numpy(), MINI_OBJECTS.colors)).permute(0, 3, 1, 2) / 255
    assert torch.equal(mask_image(label, MINI_OBJECTS.colors), expected)
    assert torch.equal(mask_image(label.to(torch.uint8), MINI_OBJECTS.colors), expected)


def test_a_class_without_a_colour_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"\[2\] with 2 classes"):
        mask_image(torch.tensor([[0, 2]]), [(0, 0, 0), (9, 9, 9)])


def test_an_edge_marks_both_sides_and_nothing_else():
    label = torch.zeros(7, 7, dtype=torch.long)
    label[2:5, 2:5] = 3
    rows = ["0000000", "0011100", "0111110", "0110110", "0111110", "0011100", "0000000"]
    expected = torch.tensor([[float(pixel) for pixel in row] for row in rows])
    image = edge_image(label)
    assert image.shape == (1, 3, 7, 7) and all(torch.equal(channel, expected) for channel in image[0])


def test_two_classes_that_touch_have_an_edge_and_one_class_has_none():
    label = torch.tensor([[[4, 4, 5, 5]], [[255, 255, 255, 0]], [[6, 6, 6, 6]]])
    assert edge_image(label)[:, 0, 0].tolist() == [[0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]]


def test_flips_and_turns_of_a_label_flip_and_turn_its_edges():
    label = torch.randint(3, (2, 6, 6), generator=torch.Generator().manual_seed(0))
    for change in (lambda x: x.flip(-1), lambda x: x.flip(-2), lambda x: x.rot90(1, (-2, -1))):
        assert torch.equal(edge_image(change(label)), change(edge_image(label)))


@pytest.mark.parametrize("label", [torch.zeros(2, 2), torch.zeros(1, 3, 4, 4, dtype=torch.long)])
def test_what_is_no_label_map_is_refused(label):
    for make in (edge_image, lambda label: mask_image(label, MINI_OBJECTS.colors)):
        with pytest.raises(ValueError, match=r"integer class ids \[H, W\] or \[B, H, W\]: found torch"):
            make(label)
