import cv2
import pytest
import torch

from functional.ade20k import COLORS, WALL
from functional.classes import MINI_OBJECTS
from functional.control_images import (
    dilate,
    edge_image,
    ellipse,
    generation_size,
    hed_image,
    mask_image,
    resize_nearest,
    scribble_image,
    seg_image,
)
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


# ------------------------------------------------------------------- DifFSS's controls of one class


def square(start: int, end: int, side: int = 200) -> torch.Tensor:
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[start:end, start:end] = True
    return mask


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((375, 500), (512, 704)),
        ((333, 500), (512, 768)),
        ((500, 334), (768, 512)),
        ((480, 640), (512, 704)),
        ((427, 640), (512, 768)),
        ((224, 224), (512, 512)),
    ],
)
def test_sides_are_rounded_to_multiples_of_64_with_the_shorter_one_512(size, expected):
    assert generation_size(*size) == expected


def test_the_shorter_side_and_the_multiple_can_be_chosen():
    assert generation_size(64, 64, 64, 32) == (64, 64)
    assert generation_size(100, 400, 64, 32) == (64, 256)
    assert generation_size(400, 100, 64, 32) == (256, 64)


@pytest.mark.parametrize("size", [(512, 704), (31, 17), (375, 500)])
def test_a_label_is_resized_as_opencv_does(size):
    label = torch.randint(21, (375, 500), generator=torch.Generator().manual_seed(0))
    expected = cv2.resize(label.to(torch.uint8).numpy(), size[::-1], interpolation=cv2.INTER_NEAREST)
    assert resize_nearest(label, size).tolist() == expected.tolist()


def test_a_seg_control_has_the_colours_of_the_class_and_of_the_background_and_no_other():
    image = (seg_image(square(50, 90), COLORS[20], COLORS[WALL])[0] * 255).round().int()
    assert image[:, 60, 60].tolist() == [0, 102, 200] and image[:, 0, 0].tolist() == [120, 120, 120]
    assert len(image.flatten(1).unique(dim=1).T) == 2


@pytest.mark.parametrize("side", [3, 5, 14, 15])
def test_an_ellipse_is_opencv_s(side):
    expected = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    assert ellipse(side).int().tolist() == expected.tolist()


def test_a_mask_is_dilated_once_and_an_even_ellipse_reaches_one_pixel_further_down():
    dilated = dilate(square(90, 110), ellipse(14))
    rows = dilated.any(1).nonzero().flatten()
    assert (rows[0], rows[-1], dilated.sum()) == (84, 116, 1056)


def test_a_mask_at_the_frame_is_dilated_as_opencv_does():
    mask = square(0, 3, 30) | square(25, 30, 30)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (14, 14))
    expected = cv2.dilate(mask.numpy().astype("uint8"), kernel)
    assert dilate(mask, ellipse(14)).int().tolist() == expected.tolist()


def test_a_hed_control_shows_edges_of_the_object_and_its_rim_only():
    edges = torch.randint(1, 256, (200, 200), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    image, near = hed_image(edges, square(90, 110))[0], dilate(square(90, 110), ellipse(14))
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
    assert torch.equal((image[0] * 255).round().to(torch.uint8), torch.where(near, edges, 0))


def test_a_scribble_is_white_exactly_where_the_hed_control_is_above_127():
    edges = torch.randint(0, 256, (200, 200), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    hed, scribble = (make(edges, square(60, 120)) for make in (hed_image, scribble_image))
    assert scribble.unique().tolist() == [0, 1]
    assert torch.equal(scribble == 1, (hed * 255).round() > 127)
