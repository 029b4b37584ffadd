"""Reading image files with Pillow, which raises where OpenCV silently returns part of a damaged file."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


class UnreadableFile(ValueError):
    """A file that is damaged or no image at all; a message to the user, in whatever process it was found."""

    user_error = True


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


@contextmanager
def _opened(path: Path, kind: str = "image") -> Iterator[Image.Image]:
    """Inside the block the file can be decoded; what is wrong with it becomes an error that names it."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no {kind} {path}. Check the path.")
    try:
        with Image.open(path) as image:
            yield image
    except UnidentifiedImageError:
        raise UnreadableFile(
            f"{path} is not an image: Pillow recognises no format in its {path.stat().st_size} bytes. "
            "Replace the file or remove it from the folder."
        ) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        message = f"{path} cannot be read as an image: {error}. Replace the damaged file."
        raise UnreadableFile(message) from error


def read_image(path: str | Path, rescale_16_bit: bool = True) -> np.ndarray:
    """Read an image as RGB: EXIF rotation applied, transparency dropped, other modes converted.

    Args:
        rescale_16_bit: whether 16-bit grey is divided by 257 to 8 bits, and 16-bit colour cut to its upper 8;
            else both are refused.

    Returns:
        uint8 [H, W, 3].

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableFile: the file is no image, damaged or truncated.
        ValueError: it holds 16-bit values not to be rescaled.
    """
    path = Path(path)
    with _opened(path) as image:
        if rescale_16_bit or not _is_16_bit(image):
            return rgb_array(ImageOps.exif_transpose(image))
    raise ValueError(
        f"{path} holds 16-bit values (Pillow mode {image.mode}), but pictures of 8 bits are expected. "
        "Convert the files, or set rescale_16_bit: true to rescale their values."
    )


def read_label(path: str | Path, first_channel: bool = False, mode: str | None = None) -> np.ndarray:
    """Read the ids of a label file: the numbers stored in it, palette indices included, never colours.

    Args:
        first_channel: whether the ids stand in the first channel of a colour file, which may be of 16 bits;
            else one is refused.
        mode: the Pillow mode that the file must have, such as "P" for a palette, and ";16" if it has so many
            bits; None for any.

    Returns:
        uint8 [H, W].

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableFile: the file is no image, damaged or truncated.
        ValueError: what it holds are no ids of 0..255.
    """
    path = Path(path)
    with _opened(path, "label") as image:
        colors_16_bit = _is_16_bit(image) and not _is_16_bit_grey(image)
        image.load()
        ids = np.asarray(image)
    if first_channel and ids.ndim == 3:
        # Of 16 bits Pillow keeps the upper 8; OpenCV keeps all, in the order blue, green, red.
        ids = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[..., 2] if colors_16_bit else ids[..., 0]
    stored = f"{image.mode};16" if colors_16_bit else image.mode
    are_ids = ids.ndim == 2 and ids.dtype.kind in "iu" and ids.min() >= 0 and ids.max() <= 255
    if not are_ids or mode not in (None, stored):
        expected = f" in place of {mode}" if mode else ""
        raise ValueError(
            f"{path} does not hold one class id of 0..255 a pixel: found Pillow mode {stored}{expected}, "
            f"values {ids.min()} to {ids.max()}. Give the file with the ids, not the one with colours."
        )
    return ids.astype(np.uint8)


def _is_16_bit(image: Image.Image) -> bool:
    """Whether a file that is opened but not yet decoded stores 16 bits a channel."""
    # Pillow decodes 16-bit colour to the mode of 8-bit colour; only the stored mode, as "RGB;16B", tells.
    return _is_16_bit_grey(image) or any(re.search(";16[BLN]", str(tile.args)) for tile in image.tile)


def _is_16_bit_grey(image: Image.Image) -> bool:
    return image.mode == "I" or image.mode.startswith("I;16")


def rgb_array(image: Image.Image) -> np.ndarray:
    """Convert a Pillow image to uint8 [H, W, 3]; 16-bit grey (modes I and I;16) keeps its upper 8 bits.

    Raises:
        ValueError: the image holds floating-point numbers, whose range is not known.
    """
    if image.mode == "F":
        raise ValueError("it holds floating-point numbers of unknown range, not colours")
    if _is_16_bit_grey(image):
        grey = np.rint(np.asarray(image).astype(np.float64).clip(0, 65535) / 257)
        return grey.astype(np.uint8)[..., None].repeat(3, -1)
    return np.array(image.convert("RGB"))  # a copy, because Pillow's own memory is read-only
