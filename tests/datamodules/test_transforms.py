"""The augmentation is seeded by its sample, keeps image and label together, and every option changes it."""

import cv2
import numpy as np
import pytest
from PIL import Image

from datamodules.photometric import distort, draw_distortion
from datamodules.transforms import (
    FitCropFlipDistort,
    RandomCropFlipJitter,
    ResizeCropFlip,
    fit_size,
    resize_to_fit,
)

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


# --- DIFF's augmentation

PLAIN = {"flip": 0.0, "distort": False}
HALVES = np.zeros((16, 32), np.uint8)  # two classes side by side
HALVES[:, 16:] = 3


@pytest.mark.parametrize(
    "size, box, expected",
    [
        ((1052, 1914), (720, 1280), (704, 1280)),
        ((720, 1280), (512, 1024), (512, 910)),
        ((1080, 1920), (512, 1024), (512, 910)),
        ((1024, 2048), (512, 1024), (512, 1024)),
        ((1280, 720), (512, 1024), (910, 512)),  # upright
        ((10, 20), (20, 40), (20, 40)),  # enlarged
    ],
)
def test_a_size_is_fitted_into_a_box_and_keeps_its_ratio(size, box, expected):
    assert fit_size(size, box) == expected


def test_images_are_fitted_without_anti_aliasing():
    columns = np.zeros((8, 64, 3), np.uint8)
    columns[:, ::4] = 255
    fitted = resize_to_fit(columns, (2, 16))
    # Between two of four columns, both dark: an anti-aliased filter would see the bright one.
    assert fitted.shape == (2, 16, 3) and (fitted == 0).all()


def test_the_training_image_is_fitted_bilinearly_and_its_label_to_the_nearest_pixel():
    colorful = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    image, label = FitCropFlipDistort((16, 24), fit=(16, 30), **PLAIN)(colorful, LABEL, seed=0)
    assert np.array_equal(image, cv2.resize(colorful, (24, 16), interpolation=cv2.INTER_LINEAR))
    assert np.array_equal(label, cv2.resize(LABEL, (24, 16), interpolation=cv2.INTER_NEAREST))
    native, _ = FitCropFlipDistort((32, 48), **PLAIN)(colorful, LABEL, seed=0)
    assert np.array_equal(native, colorful)


def test_a_crop_shows_image_and_label_of_one_place_and_is_a_function_of_the_seed():
    image = np.dstack([LABEL] * 3)
    transform = FitCropFlipDistort((8, 12), distort=False)
    crops = [transform(image, LABEL, seed) for seed in range(60)]
    for (pixels, label), seed in zip(crops, range(60), strict=True):
        again = transform(image, LABEL, seed)
        assert np.array_equal(pixels, again[0]) and np.array_equal(label, again[1])
        assert np.array_equal(pixels[..., 0], label) and label.shape == (8, 12)
    assert len({label.tobytes() for _, label in crops}) > 20


def test_a_crop_of_one_class_is_drawn_again():
    transform, careless = FitCropFlipDistort((8, 8), **PLAIN), ResizeCropFlip((8, 8), flip=0.0)
    image = np.dstack([HALVES] * 3)
    shares = [(transform(image, HALVES, seed)[1] == 3).mean() for seed in range(100)]
    # 3 of 25 places show 3 to 5 columns of each class, and one of eleven draws with 1 - 0.88 ** 11 = 0.75.
    assert sum(0.25 < share < 0.75 for share in shares) >= 60
    careless_shares = [(careless(image, HALVES, seed)[1] == 3).mean() for seed in range(100)]
    assert sum(0.25 < share < 0.75 for share in careless_shares) <= 30


def test_after_ten_redraws_the_crop_is_kept_as_it_is(monkeypatch):
    drawn = []
    draw = FitCropFlipDistort.draw_view
    monkeypatch.setattr(FitCropFlipDistort, "draw_view", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    image, label = np.zeros((16, 16, 3), np.uint8), np.full((16, 16), 4, np.uint8)
    FitCropFlipDistort((8, 8))(image, label, seed=0)
    assert len(drawn) == 11
    FitCropFlipDistort((8, 8))(image, np.full((16, 16), 255, np.uint8), seed=0)
    assert len(drawn) == 22  # a crop without labels is none of several classes


@pytest.mark.parametrize("share, draws", [(0.75, 11), (0.76, 1)])
def test_the_share_of_a_class_is_that_of_the_labelled_pixels_and_must_stay_below_the_limit(
    monkeypatch, share, draws
):
    label = np.full((4, 4), 255, np.uint8)
    label[0], label[0, 0] = 7, 2  # 3 of 4 labelled pixels
    drawn = []
    draw = FitCropFlipDistort.draw_view
    monkeypatch.setattr(FitCropFlipDistort, "draw_view", lambda *a: drawn.append(1) or draw(*a))
    FitCropFlipDistort((4, 4), max_class_share=share)(np.zeros((4, 4, 3), np.uint8), label, seed=0)
    assert len(drawn) == draws


def test_an_image_smaller_than_the_crop_is_filled_with_grey_and_ignored_pixels():
    image, label = FitCropFlipDistort((20, 40), flip=1.0, distort=False)(
        np.dstack([HALVES] * 3), HALVES, seed=0
    )
    assert image.shape == (20, 40, 3) and label.shape == (20, 40)
    assert np.array_equal(label[:16, :32], HALVES[:, ::-1])
    assert (image[16:] == 128).all() and (image[:, 32:] == 128).all()
    assert (label[16:] == 255).all() and (label[:, 32:] == 255).all()


def test_a_label_smaller_than_its_image_is_filled_too():
    image, label = FitCropFlipDistort((16, 32), **PLAIN)(np.zeros((16, 32, 3), np.uint8), HALVES[:14], 0)
    assert image.shape == (16, 32, 3) and label.shape == (16, 32)
    assert (label[14:] == 255).all() and np.array_equal(label[:14], HALVES[:14])


def test_half_of_the_crops_are_flipped_unless_told_otherwise():
    image = np.dstack([HALVES] * 3)
    crops = [FitCropFlipDistort((16, 32), distort=False)(image, HALVES, seed)[1] for seed in range(200)]
    assert np.mean([label[0, 0] == 3 for label in crops]) == pytest.approx(0.5, abs=0.1)
    always = FitCropFlipDistort((16, 32), flip=1.0, distort=False)
    assert all(always(image, HALVES, seed)[1][0, 0] == 3 for seed in range(20))


def test_colours_are_distorted_after_crop_and_flip_and_only_if_asked_for():
    colorful = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    changed = 0
    for seed in range(10):
        plain, same = FitCropFlipDistort((16, 24), distort=False)(colorful, LABEL, seed)
        image, label = FitCropFlipDistort((16, 24))(colorful, LABEL, seed)
        assert np.array_equal(label, same) and image.dtype == np.uint8
        changed += not np.array_equal(image, plain)
    assert changed >= 8


def test_the_distortion_is_drawn_from_the_samples_own_stream(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "datamodules.transforms.draw_distortion", lambda rng: seen.append(draw_distortion(rng)) or seen[-1]
    )
    colorful = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    plain, _ = FitCropFlipDistort((16, 24), distort=False)(colorful, LABEL, seed=4)
    image, _ = FitCropFlipDistort((16, 24))(colorful, LABEL, seed=4)
    FitCropFlipDistort((16, 24))(colorful, LABEL, seed=4)
    assert np.array_equal(image, distort(plain, seen[0])) and seen[0] == seen[1]
