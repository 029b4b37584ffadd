import io

import cv2
import numpy as np
import pytest
from PIL import Image

from datamodules.reading import UnreadableFile, read_image, read_label

RED_LEFT = np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8).repeat(4, 0)  # [4, 2, 3]: red column, blue column


def test_rgb_comes_back_as_it_was_written(tmp_path):
    Image.fromarray(RED_LEFT).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), RED_LEFT)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_rotation_in_exif_is_applied(tmp_path, suffix):
    pixels = RED_LEFT.repeat(16, 0).repeat(16, 1)
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[274] = 6  # the camera was turned: show rotated by 90 degrees clockwise
    image.save(tmp_path / f"x.{suffix}", exif=exif)
    found = read_image(tmp_path / f"x.{suffix}").astype(int)
    assert abs(found - np.rot90(pixels, -1)).mean() <= 9  # JPEG blurs the edge


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_other_modes_become_three_channels_of_eight_bits(tmp_path, mode):
    Image.fromarray(RED_LEFT).convert(mode).save(tmp_path / "x.png")
    found = read_image(tmp_path / "x.png")
    assert found.shape == (4, 2, 3) and found.dtype == np.uint8
    if mode in ("RGBA", "P"):
        np.testing.assert_array_equal(found, RED_LEFT)


def test_cmyk_is_converted(tmp_path):
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tmp_path / "x.jpg")
    assert (abs(read_image(tmp_path / "x.jpg").astype(int) - [255, 0, 0]) <= 3).all()


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    Image.fromarray(np.array([[0, 257, 25700, 65535]], np.uint16)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png")[0, :, 0].tolist() == [0, 1, 100, 255]


def test_floating_point_numbers_are_refused(tmp_path):
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=r"x\.tif.*unknown range"):
        read_image(tmp_path / "x.tif")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, suffix):
    whole = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(whole, "jpeg" if suffix == "jpg" else "png")
    for size in range(64, len(whole.getvalue()) - 64, 500):
        (tmp_path / f"cut.{suffix}").write_bytes(whole.getvalue()[:size])
        for read in (read_image, read_label):
            with pytest.raises(UnreadableFile, match=rf"cut\.{suffix} (cannot be read|is not an image)"):
                read(tmp_path / f"cut.{suffix}")


def test_text_an_empty_file_and_a_missing_one_are_named(tmp_path):
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("text", "empty"):
        for read in (read_image, read_label):
            with pytest.raises(UnreadableFile, match=rf"{name}\.png is not an image"):
                read(tmp_path / f"{name}.png")
    with pytest.raises(FileNotFoundError, match=r"no image .*missing"):
        read_image(tmp_path / "missing.png")


def test_a_label_is_read_as_the_stored_numbers(tmp_path):
    ids = np.array([[0, 1, 33], [18, 255, 7]], np.uint8)
    indexed = Image.fromarray(ids).convert("P")
    indexed.putpalette([200, 100, 0] * 256)
    indexed.putdata(ids.ravel().tolist())
    for name, image in {"grey": Image.fromarray(ids), "palette": indexed}.items():
        image.save(tmp_path / f"{name}.png")
        np.testing.assert_array_equal(read_label(tmp_path / f"{name}.png"), ids)
    Image.fromarray(ids.astype(np.uint16)).save(tmp_path / "wide.png")
    np.testing.assert_array_equal(read_label(tmp_path / "wide.png"), ids)
    Image.fromarray(np.dstack([ids, ids + 1, ids + 2])).save(tmp_path / "colour.png")
    np.testing.assert_array_equal(read_label(tmp_path / "colour.png", first_channel=True), ids)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((2, 2, 3), np.uint8),
        np.zeros((2, 2, 4), np.uint8),
        np.zeros((2, 2, 2), np.uint8),
        np.full((2, 2), 256, np.uint16),
    ],
)
def test_what_holds_no_ids_is_not_read_as_a_label_nor_skipped_as_damaged(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.png does not hold one class id") as raised:
        read_label(tmp_path / "x.png")
    assert not isinstance(raised.value, UnreadableFile)


def test_sixteen_bit_grey_is_refused_where_it_is_not_to_be_rescaled(tmp_path):
    Image.fromarray(np.zeros((2, 2), np.uint16)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").dtype == np.uint8
    with pytest.raises(ValueError, match=r"x\.png holds 16-bit values \(Pillow mode I;16\)"):
        read_image(tmp_path / "x.png", rescale_16_bit=False)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_colour_is_refused_or_rescaled_as_grey_is(tmp_path, suffix, channels):
    path = tmp_path / f"x.{suffix}"
    cv2.imwrite(str(path), np.full((2, 2, channels), 25700, np.uint16))
    assert (read_image(path) == 100).all()
    with pytest.raises(ValueError, match=rf"x\.{suffix} holds 16-bit values \(Pillow mode RGB"):
        read_image(path, rescale_16_bit=False)
    cv2.imwrite(str(path), np.full((2, 2, channels), 100, np.uint8))
    assert (read_image(path, rescale_16_bit=False) == 100).all()


def test_ids_in_the_first_channel_of_sixteen_bit_colours_keep_their_value(tmp_path):
    ids = np.array([[0, 22], [255, 7]])
    cv2.imwrite(str(tmp_path / "x.png"), np.dstack([ids + 256, ids + 1, ids]).astype(np.uint16))
    for mode in (None, "RGB;16"):
        np.testing.assert_array_equal(read_label(tmp_path / "x.png", first_channel=True, mode=mode), ids)
    with pytest.raises(ValueError, match=r"found Pillow mode RGB;16 in place of RGB, values 0 to 255"):
        read_label(tmp_path / "x.png", first_channel=True, mode="RGB")
    cv2.imwrite(str(tmp_path / "x.png"), np.dstack([ids, ids, ids + 1]).astype(np.uint16))
    with pytest.raises(ValueError, match="values 1 to 256"):
        read_label(tmp_path / "x.png", first_channel=True)


def test_a_truncated_label_of_sixteen_bit_colours_is_an_error(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "x.png"), noise)
    whole = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"x\.png cannot be read"):
        read_label(tmp_path / "x.png", first_channel=True)


def test_grey_values_are_no_ids_of_a_palette(tmp_path):
    Image.fromarray(np.array([[7, 8]], np.uint8)).save(tmp_path / "x.png")
    assert read_label(tmp_path / "x.png").tolist() == [[7, 8]]
    with pytest.raises(ValueError, match=r"found Pillow mode L in place of P"):
        read_label(tmp_path / "x.png", mode="P")
