"""The augmentation is seeded by its sample, keeps image and label together, and every option changes it."""

import numpy as np
import pytest
from PIL import Image

from datamodules.transforms import RandomCropFlipJitter, ResizeCropFlip

LABEL = (np.arange(32 * 48).reshape(32, 48) // 100).astype(np.uint8)
LABEL[0] = 255
IMAGE = np.stack([LABEL * 10] * 3, -1)
QUIET = {"flip": 0.0, "jitter": 0.0, "scale": (1.0, 1.0), "ratio": (1.5, 1.5)}


def test_the_same_seed_gives_the_same_sample_and_another_seed_another():
    transform, again = RandomCropFlipJitter((16, 24)), RandomCropFlipJitter((16, 24))
    image, label = transform(IMAGE, LABEL, seed=5)
    transform(IMAGE, LABEL, seed=6)
    for repeated in (transform(IMAGE, LABEL, seed=5), again(IMAGE, LABEL, seed=5)):
        assert np.array_equal(image, repeated[0]) and np.array_equal(label, repeated[1])
    assert not np.array_equal(image, transform(IMAGE, LABEL, seed=6)[0])


def test_the_crop_has_the_asked_size_and_labels_stay_ids():
    for seed in range(20):
        image, label = RandomCropFlipJitter((16, 24))(IMAGE, LABEL, seed)
        assert image.shape == (16, 24, 3) and image.dtype == np.uint8
        assert label.shape == (16, 24) and label.dtype == np.uint8
        assert set(np.unique(label)) <= set(np.unique(LABEL))


def test_without_randomness_the_sample_stays_as_it_is():
    image, label = RandomCropFlipJitter((32, 48), **QUIET)(IMAGE, LABEL, seed=0)
    assert np.array_equal(image, IMAGE) and np.array_equal(label, LABEL)


def test_a_flip_turns_image_and_label_together():
    image, label = RandomCropFlipJitter((32, 48), **QUIET | {"flip": 1.0})(IMAGE, LABEL, seed=0)
    assert np.array_equal(image, IMAGE[:, ::-1]) and np.array_equal(label, LABEL[:, ::-1])


def test_flip_and_jitter_happen_independently_of_each_other():
    transform = RandomCropFlipJitter((32, 48), **QUIET | {"flip": 0.5, "jitter": 0.5})
    kinds = set()
    for seed in range(40):
        image, label = transform(IMAGE, LABEL, seed)
        flipped = np.array_equal(label, LABEL[:, ::-1])
        kinds.add((flipped, not np.array_equal(image, IMAGE[:, ::-1] if flipped else IMAGE)))
    assert len(kinds) == 4


@pytest.mark.parametrize("option", ["brightness", "contrast", "saturation"])
def test_each_colour_factor_changes_the_image_and_not_the_label(option):
    colorful = np.random.default_rng(0).integers(60, 200, (32, 48, 3), dtype=np.uint8)
    off = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0}
    arguments = {**QUIET, "jitter": 1.0, **off}
    unchanged, _ = RandomCropFlipJitter((32, 48), **arguments)(colorful, LABEL, seed=1)
    changed, label = RandomCropFlipJitter((32, 48), **arguments | {option: 0.5})(colorful, LABEL, seed=1)
    assert np.abs(unchanged.astype(int) - colorful).max() <= 1
    assert not np.array_equal(changed, unchanged)
    assert np.array_equal(label, LABEL)


def test_scale_and_ratio_bound_the_crop():
    ramp = np.tile(np.arange(48, dtype=np.uint8), (32, 1))
    image = np.stack([ramp] * 3, -1)
    wide, _ = RandomCropFlipJitter((32, 48), **QUIET)(image, ramp, seed=0)
    small, _ = RandomCropFlipJitter((32, 48), **QUIET | {"scale": (0.25, 0.25)})(image, ramp, seed=0)
    narrow, _ = RandomCropFlipJitter((32, 48), **QUIET | {"scale": (0.25, 0.25), "ratio": (0.5, 0.5)})(
        image, ramp, 0
    )
    spans = [int(view.max()) - int(view.min()) for view in (wide, small, narrow)]
    assert spans[0] == 47 and 22 <= spans[1] <= 24 and spans[2] < spans[1]


def test_the_published_augmentation_resizes_as_pillow_does_then_crops_and_flips():
    image, label = ResizeCropFlip((16, 24), resize=(16, 24), flip=0.0)(IMAGE, LABEL, seed=0)
    assert np.array_equal(image, Image.fromarray(IMAGE).resize((24, 16), Image.Resampling.BILINEAR))
    assert np.array_equal(label, Image.fromarray(LABEL).resize((24, 16), Image.Resampling.NEAREST))
    flipped, _ = ResizeCropFlip((16, 24), resize=(16, 24), flip=1.0)(IMAGE, LABEL, seed=0)
    assert np.array_equal(flipped, image[:, ::-1])


def test_crops_take_every_offset_and_are_a_function_of_the_seed():
    places = np.arange(4 * 5, dtype=np.uint8).reshape(4, 5)
    image, crop = np.dstack([places] * 3), ResizeCropFlip((2, 3), flip=0.5)
    corners = set()
    for seed in range(200):
        pixels, label = crop(image, places, seed)
        assert np.array_equal(pixels[..., 0], label) and np.array_equal(label, crop(image, places, seed)[1])
        corners.add((int(label[0].min()), bool(label[0, 0] > label[0, 1])))
    assert corners == {(5 * y + x, flip) for y in range(3) for x in range(3) for flip in (False, True)}


def test_a_crop_larger_than_the_image_is_an_error_with_both_sizes():
    with pytest.raises(ValueError, match="found 32x48 pixels for crop_size 40x24"):
        ResizeCropFlip((40, 24))(IMAGE, LABEL, seed=0)


def test_grey_takes_the_colours_and_leaves_the_crop_as_it_is():
    colorful = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    cut, label = ResizeCropFlip((16, 24))(colorful, LABEL, seed=3)
    grey, same = ResizeCropFlip((16, 24), grey=True)(colorful, LABEL, seed=3)
    luma = cut @ np.array([0.299, 0.587, 0.114])
    assert np.abs(grey - luma[..., None]).max() <= 1 and np.ptp(grey, axis=2).max() == 0
    assert np.array_equal(same, label)
