import pytest
import torch
import torch.nn.functional as F

from functional.sliding_window import scaled_and_flipped, segment_image, sliding_window


def image_of(height: int, width: int, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def itself(image):
    return image


def blur(image):
    """Logits that depend on what surrounds a pixel, and on left and right."""
    kernel = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    return F.conv2d(image, kernel, padding=1)


class Record:
    """Predicts an image by itself and keeps the sizes that it was asked for."""

    def __init__(self):
        self.sizes = []

    def __call__(self, image):
        self.sizes.append(tuple(image.shape[-2:]))
        return image


# smaller than the window in one side and in both, as large, not divisible, one pixel over, divisible
SIZES = [(5, 20), (7, 6), (8, 8), (19, 22), (9, 8), (9, 9), (16, 24)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [(4, 4), (8, 8), (3, 7), (1, 5)])
def test_a_prediction_that_is_the_image_comes_back_from_windows(size, stride):
    image = image_of(*size)
    torch.testing.assert_close(sliding_window(itself, image, (8, 8), stride), image)


@pytest.mark.parametrize("size", SIZES)
def test_a_constant_stays_constant_in_windows_and_at_odd_scales(size):
    image = torch.full((1, 3, *size), 0.3)
    torch.testing.assert_close(sliding_window(itself, image, (8, 8), (5, 6)), image)
    probabilities = scaled_and_flipped(itself, image, (0.37, 1, 1.9), flip=True)
    torch.testing.assert_close(probabilities, torch.full_like(image, 1 / 3))


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        ((5, 20), [(5, 8)] * 3),  # columns from 0, 8 and 12
        ((7, 6), [(7, 6)]),
        ((8, 8), [(8, 8)]),
        ((9, 8), [(8, 8)] * 2),  # rows from 0 and 1
        ((16, 24), [(8, 8)] * 6),
    ],
)
def test_windows_lie_inside_the_image_and_are_no_more_than_needed(size, sizes):
    record = Record()
    sliding_window(record, image_of(*size), (8, 8), (8, 8))
    assert record.sizes == sizes


def test_windows_overlap_by_their_stride_and_the_last_one_is_moved_back_to_the_edge():
    numbers = iter([1.0, 2.0, 4.0])
    found = sliding_window(lambda x: torch.full_like(x, next(numbers)), image_of(4, 9), (4, 4), (4, 3))
    # columns 0..3, 3..6, 5..8
    expected = torch.tensor([1, 1, 1, 1.5, 2, 3, 3, 4, 4]).expand(2, 3, 4, 9)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("window", [(12, 10), (50, 10), (50, 50)])
def test_one_window_is_the_plain_call(window):
    image = image_of(12, 10)
    assert torch.equal(sliding_window(blur, image, window, window), blur(image))


def test_the_number_of_classes_is_the_predictions():
    found = sliding_window(lambda x: x[:, :1].half(), image_of(9, 9), (8, 8), (4, 4))
    assert found.shape == (2, 1, 9, 9) and found.dtype == torch.float32


def test_scale_1_without_flip_gives_the_probabilities_of_the_plain_call():
    image = image_of(11, 13)
    torch.testing.assert_close(scaled_and_flipped(blur, image, [1], False), blur(image).softmax(1))


def test_a_flip_is_undone():
    image = image_of(9, 14)
    torch.testing.assert_close(scaled_and_flipped(itself, image, [1], True), image.softmax(1))


def test_a_flip_averages_the_probabilities_of_the_image_and_its_mirror_image():
    image = image_of(9, 14)
    mirrored = blur(image.flip(-1)).flip(-1)
    expected = (blur(image).softmax(1) + mirrored.softmax(1)) / 2
    torch.testing.assert_close(scaled_and_flipped(blur, image, [1], True), expected)
    # the mean of the logits would be something else
    assert not torch.allclose(expected, ((blur(image) + mirrored) / 2).softmax(1), atol=1e-3)


def test_scales_are_averaged_at_the_size_of_the_image():
    image, logits = image_of(6, 6), {3: 0.0, 6: 1.0, 9: 5.0}

    def predict(x):
        return torch.stack([torch.zeros_like(x[:, 0]), torch.full_like(x[:, 0], logits[x.shape[-1]])], 1)

    found = scaled_and_flipped(predict, image, (0.5, 1, 1.5), flip=False)
    second = (torch.tensor([0.0, 1.0, 5.0]).sigmoid()).mean()
    torch.testing.assert_close(found[:, 1], second.expand(2, 6, 6))
    torch.testing.assert_close(found.sum(1), torch.ones(2, 6, 6))


@pytest.mark.parametrize("scale", [0.01, 0.3, 0.77, 1.01, 2.5])
def test_any_scale_keeps_the_size_for_a_network_that_pads_to_its_stride(scale):
    def padded(x):
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % 64, 0, -height % 64), mode="replicate")
        coarse = F.avg_pool2d(x, 64)
        return F.interpolate(coarse, size=x.shape[-2:], mode="bilinear")[..., :height, :width]

    found = scaled_and_flipped(padded, image_of(70, 50), [scale], flip=True)
    assert found.shape == (2, 3, 70, 50)
    torch.testing.assert_close(found.sum(1), torch.ones(2, 70, 50))


def test_a_scaled_image_has_the_nearest_whole_size():
    record = Record()
    scaled_and_flipped(record, image_of(10, 7), (0.5, 0.01, 1.25), flip=False)
    assert record.sizes == [(5, 4), (1, 1), (13, 9)]


def test_an_image_is_segmented_plainly_unless_something_is_asked_for():
    image, asked = image_of(8, 12), []

    def predict(x):
        asked.append(x)
        return x

    assert segment_image(predict, image) is image and segment_image(predict, image, scales=[1]) is image
    assert len(asked) == 2 and all(x is image for x in asked)


def test_each_option_changes_the_class_scores():
    image = image_of(12, 12)
    options = [{"window": (8, 8)}, {"window": (8, 8), "window_stride": (4, 2)}, {"scales": [0.5]}]
    options += [{"flip": True}, {"window": (8, 8), "flip": True}, {"scales": [0.5, 1]}]
    found = [blur(image), *(segment_image(blur, image, **each) for each in options)]
    assert not any(torch.allclose(a, b) for i, a in enumerate(found) for b in found[:i])


def test_each_scaled_and_each_mirrored_image_is_seen_in_windows_at_half_their_size():
    record = Record()
    segment_image(record, image_of(8, 8), window=(8, 6), scales=[1, 2], flip=True)
    # 8 x 8: columns from 0 and 2; 16 x 16: rows from 0, 4 and 8, columns from 0, 3, 6, 9 and 10
    assert record.sizes == [(8, 6)] * 2 * (2 + 15)
    assert segment_image(itself, image_of(3, 3), window=(1, 1)).shape == (2, 3, 3, 3)


@pytest.mark.parametrize(
    ("window", "stride"), [((0, 8), (1, 1)), ((8, -8), (1, 1)), ((8, 8), (0, 4)), ((8, 8), (4, 9))]
)
def test_a_window_or_stride_that_would_leave_pixels_out_is_an_error(window, stride):
    with pytest.raises(ValueError) as error:
        sliding_window(itself, image_of(16, 16), window, stride)
    assert f"found window {list(window)} and stride {list(stride)}" in str(error.value)


@pytest.mark.parametrize("scales", [[], [0], [1, -0.5], [float("nan")], [float("inf")]])
def test_scales_that_are_no_sizes_are_an_error(scales):
    with pytest.raises(ValueError, match=r"numbers above 0: found \["):
        scaled_and_flipped(itself, image_of(8, 8), scales, flip=False)
