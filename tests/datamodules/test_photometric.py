"""Photometric distortion: each change by hand, their order, and what is drawn how often."""

from dataclasses import fields

import cv2
import numpy as np
import pytest

from datamodules.photometric import Distortion, distort, draw_distortion, linear

COLORFUL = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


def pixel(*rgb: int) -> np.ndarray:
    return np.array([[rgb]], np.uint8)


def changed(image: np.ndarray, **options) -> list[int]:
    return distort(image, Distortion(**options))[0, 0].tolist()


def test_without_a_change_the_image_stays_as_it_is():
    assert np.array_equal(distort(COLORFUL, Distortion()), COLORFUL)


def test_brightness_is_added_cut_to_the_range_of_bytes_and_rounded_down():
    assert changed(pixel(10, 100, 250), brightness=20.9) == [30, 120, 255]
    assert changed(pixel(10, 100, 250), brightness=-20.1) == [0, 79, 229]


def test_contrast_multiplies_and_is_rounded_down():
    assert changed(pixel(11, 101, 200), contrast=1.5) == [16, 151, 255]
    assert changed(pixel(11, 101, 200), contrast=0.5) == [5, 50, 100]


def test_saturation_multiplies_the_s_of_hsv():
    # Red has S = 255; half of it is 127, rounded down, and the other channels 255 (1 - 127/255) = 128.
    assert changed(pixel(255, 0, 0), saturation=0.5) == [255, 128, 128]
    assert changed(pixel(90, 90, 90), saturation=1.5) == [90, 90, 90]


def test_hue_turns_and_wraps_at_180():
    assert changed(pixel(255, 0, 0), hue=17) == cv2.cvtColor(
        np.array([[[17, 255, 255]]], np.uint8), cv2.COLOR_HSV2RGB
    )[0, 0].tolist()  # fmt: skip
    assert changed(pixel(255, 0, 0), hue=-18) == cv2.cvtColor(
        np.array([[[162, 255, 255]]], np.uint8), cv2.COLOR_HSV2RGB
    )[0, 0].tolist()  # fmt: skip
    assert changed(pixel(255, 0, 0), hue=-180) == [255, 0, 0]


def test_contrast_comes_after_brightness_and_before_saturation_or_after_hue():
    # (100 + 10) * 1.5 = 165 and not 100 * 1.5 + 10; in the other place after the rounding of brightness.
    assert changed(pixel(100, 100, 100), brightness=10.0, contrast=1.5) == [165, 165, 165]
    first, last = (
        distort(COLORFUL, Distortion(contrast=1.4, contrast_first=first, saturation=0.6, hue=9))
        for first in (True, False)
    )
    by_hand = distort(linear(COLORFUL, 1.4), Distortion(saturation=0.6, hue=9))
    assert np.array_equal(first, by_hand)
    by_hand = linear(distort(COLORFUL, Distortion(saturation=0.6, hue=9)), 1.4)
    assert np.array_equal(last, by_hand) and not np.array_equal(first, last)


def test_saturation_comes_before_hue():
    both = distort(COLORFUL, Distortion(saturation=0.6, hue=9))
    assert np.array_equal(both, distort(distort(COLORFUL, Distortion(saturation=0.6)), Distortion(hue=9)))


def test_the_given_image_is_not_written_to_and_bytes_stay_bytes():
    image = COLORFUL.copy()
    result = distort(image, Distortion(5.5, 1.2, False, 0.7, -3))
    assert result.dtype == np.uint8 and result.shape == image.shape and np.array_equal(image, COLORFUL)


def test_each_change_is_drawn_half_of_the_time_from_its_own_range():
    rng = np.random.default_rng(0)
    drawn = [draw_distortion(rng) for _ in range(2000)]
    ranges = {"brightness": (-32, 32), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5), "hue": (-18, 17)}
    for name, (low, high) in ranges.items():
        values = [value for change in drawn if (value := getattr(change, name)) is not None]
        assert len(values) / 2000 == pytest.approx(0.5, abs=0.05)
        assert low <= min(values) < low + 0.05 * (high - low)
        assert high >= max(values) > high - 0.05 * (high - low)
    assert {change.hue for change in drawn} == {None, *range(-18, 18)}
    first = [change.contrast_first for change in drawn if change.contrast is not None]
    assert np.mean(first) == pytest.approx(0.5, abs=0.07)


def test_the_changes_are_drawn_independently_of_each_other():
    rng = np.random.default_rng(0)
    drawn = [draw_distortion(rng) for _ in range(600)]
    names = [field.name for field in fields(Distortion) if field.name != "contrast_first"]
    kinds = {tuple(getattr(change, name) is None for name in names) for change in drawn}
    assert len(kinds) == 16
