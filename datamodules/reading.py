"""Reading image files with Pillow, which raises where OpenCV silently returns part of a damaged file."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def read_image(path: str | Path) -> np.ndarray:
    """Read an image as RGB: EXIF rotation applied, transparency dropped, other modes converted.

    Returns:
        uint8 [H, W, 3].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no image, damaged or truncated.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no image {path}. Check the path.")
    try:
        with Image.open(path) as image:
            image.load()
            return rgb_array(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise ValueError(
            f"{path} is not an image: Pillow recognises no format in its {path.stat().st_size} bytes. "
            "Replace the file or remove it from the folder."
        ) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}. Replace the damaged file.") from error


def rgb_array(image: Image.Image) -> np.ndarray:
    """Convert a Pillow image to uint8 [H, W, 3]; 16-bit grey (modes I and I;16) keeps its upper 8 bits.

    Raises:
        ValueError: the image holds floating-point numbers, whose range is not known.
    """
    if image.mode == "F":
        raise ValueError("it holds floating-point numbers of unknown range, not colours")
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.rint(np.asarray(image).astype(np.float64).clip(0, 65535) / 257)
        return grey.astype(np.uint8)[..., None].repeat(3, -1)
    return np.asarray(image.convert("RGB"))
