"""Sizes of few-shot images: HSNet's square, BAM's padded fit, and BAM's augmentation."""

import cv2
import numpy as np
import pytest
from PIL import Image

from datamodules.few_shot_transforms import (
    FitAndPad,
    ScaleRotateBlurFlipCrop,
    SquareResize,
    fitted_size,
)

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (30, 40, 3), np.uint8)
MASK = np.zeros((30, 40), np.uint8)
MASK[10:20, 10:20] = 1


@pytest.mark.parametrize(
    "shape, size, fitted",
    [((375, 500), 473, (352, 472)), ((480, 640), 641, (480, 640)), ((500, 500), 473, (472, 472))],
)
def test_the_sizes_of_bams_resize(shape, size, fitted):
    assert fitted_size(shape, size) == fitted and fitted_size(shape[::-1], size) == fitted[::-1]
    assert min(fitted_size((3, 500), 473)) == 8  # a very narrow image keeps some rows


def test_bam_fits_without_a_filter_against_aliasing_and_pads_below_and_at_the_right():
    image, mask = FitAndPad(24)(IMAGE, MASK)
    assert image.shape == (24, 24, 3) and mask.shape == (24, 24)
    assert np.array_equal(image[:16], cv2.resize(IMAGE, (24, 16), interpolation=cv2.INTER_LINEAR))
    assert not image[16:].any() and (mask[16:] == 255).all() and set(np.unique(mask[:16])) == {0, 1}


def test_bam_scores_on_a_square_of_the_longer_side_in_which_the_padding_is_ignored():
    target = FitAndPad(24).target(MASK)
    assert np.array_equal(target[:30], MASK) and target.shape == (40, 40) and (target[30:] == 255).all()


def test_hsnet_resizes_to_a_square_with_pillows_filter_and_scores_the_mask_as_it_is():
    image, mask = SquareResize(20)(IMAGE, MASK)
    pillow = Image.fromarray(IMAGE).resize((20, 20), Image.Resampling.BILINEAR)
    assert np.array_equal(image, pillow) and mask.shape == (20, 20) and set(np.unique(mask)) == {0, 1}
    assert SquareResize(20).target(MASK) is MASK


def augment(seed: int = 0, image=IMAGE, mask=MASK, **options):
    plain = {"crop_size": (30, 40), "scale": (1, 1), "degrees": 0, "blur": 0, "flip": 0}
    return ScaleRotateBlurFlipCrop(**{**plain, **options})(image, mask, seed)


def test_without_any_change_an_image_stays_as_it_is():
    image, mask = augment()
    assert np.array_equal(image, IMAGE) and np.array_equal(mask, MASK)


def test_each_part_of_the_augmentation_changes_the_image():
    assert np.array_equal(augment(flip=1)[0], IMAGE[:, ::-1]) and np.array_equal(
        augment(flip=1)[1], MASK[:, ::-1]
    )
    assert np.array_equal(augment(blur=1)[0], cv2.GaussianBlur(IMAGE, (5, 5), 0))
    assert np.array_equal(augment(blur=1)[1], MASK)
    turned = [augment(seed, degrees=10)[1] for seed in range(20)]
    assert 3 < sum(np.array_equal(mask, MASK) for mask in turned) < 17
    assert any((mask == 255).any() for mask in turned)
    grown, mask = augment(scale=(2, 2), crop_size=(60, 80))
    assert grown.shape == (60, 80, 3) and np.count_nonzero(mask == 1) == 400


def test_what_lies_outside_the_image_is_of_mean_colour_and_ignored_at_all_sides():
    image, mask = augment(crop_size=(36, 50))
    assert np.array_equal(image[3:33, 5:45], IMAGE) and np.array_equal(mask[3:33, 5:45], MASK)
    assert (image[0] == (124, 116, 104)).all() and (mask[:3] == 255).all() and (mask[:, 45:] == 255).all()


def test_a_crop_keeps_most_of_the_object_unless_too_much_is_asked():
    def kept(**options):
        return [np.count_nonzero(augment(seed, crop_size=(14, 14), **options)[1] == 1) for seed in range(40)]

    assert (
        np.mean([count >= 85 for count in kept()]) > 0.8
        and np.mean([count >= 85 for count in kept(keep=0)]) < 0.3
    )


def test_the_seed_alone_decides():
    options = {"scale": (0.9, 1.1), "degrees": 10, "blur": 0.5, "flip": 0.5, "crop_size": (16, 24)}
    first, again, other = augment(3, **options), augment(3, **options), augment(4, **options)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0]) and first[0].shape == (16, 24, 3)
