"""Contact sheets of the mini world: every condition, style, sensor, class and category, with captions.

python -m scripts.gallery --output docs/mini_world
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from datamodules.mini_world.captions import SMALLEST_SHARE
from datamodules.mini_world.dataset import MiniObjectsDataset, MiniStreetDataset
from datamodules.mini_world.objects import CATEGORIES, render_objects
from datamodules.mini_world.street import CONDITIONS, render_street
from functional.classes import DELIVER11, MINI_OBJECTS, ClassTable
from functional.palette import colorize

GAP, LINE, FONT_SIZE = 4, 13, 11
# What a column of the sheet of conditions shows: its title, and the options of the dataset.
COLUMNS = {
    "game": {"style": "game"},
    "real": {"style": "real"},
    "depth": {"modality": "depth"},
    "infrared": {"modality": "infrared"},
    "event": {"modality": "event"},
}


def with_text(image: np.ndarray, text: str, lines: int) -> np.ndarray:
    """Put a white strip with so many lines of text below an image [H, W, 3]; too long a text is an error."""
    wrapped = wrap(text, max(1, int(image.shape[1] / 5.6)))
    if len(wrapped) > lines:
        raise ValueError(
            f"{text!r} needs {len(wrapped)} lines of a picture {image.shape[1]} pixels wide: allow more."
        )
    canvas = Image.new("RGB", (image.shape[1], image.shape[0] + lines * LINE), "white")
    canvas.paste(Image.fromarray(image))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(FONT_SIZE)
    for row, line in enumerate(wrapped):
        draw.text((1, image.shape[0] + row * LINE), line, fill="black", font=font)
    return np.asarray(canvas)


def grid(tiles: Sequence[np.ndarray], columns: int, gap: int = GAP) -> np.ndarray:
    """Set tiles [H, W, 3] of one size in rows, with a white gap behind each; the last row may be short."""
    height, width = (side + gap for side in tiles[0].shape[:2])
    rows = -(-len(tiles) // columns)
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * height, i % columns * width
        sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return sheet


def legend(table: ClassTable, width: int) -> np.ndarray:
    """Colour and name of each class, in as many rows as this width asks for."""
    column = 100
    columns = width // column
    canvas = Image.new("RGB", (width, -(-len(table) // columns) * (LINE + 4)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(FONT_SIZE)
    for i, (name, color) in enumerate(zip(table.names, table.colors, strict=True)):
        x, y = i % columns * column, i // columns * (LINE + 4)
        draw.rectangle((x, y + 1, x + LINE, y + LINE), fill=color)
        draw.text((x + LINE + 4, y), name, fill="black", font=font)
    return np.asarray(canvas)


def enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    """Repeat each pixel of [H, W, 3] a whole number of times in both directions."""
    return image.repeat(factor, 0).repeat(factor, 1)


def richest_scenes(number: int, searched: int) -> list[int]:
    """The street scenes of val, out of the first so many, with most classes and the small ones largest."""
    labels = [render_street("val", i, size=64, sensors=())["label"] for i in range(searched)]
    shares = np.array([np.bincount(label.ravel(), minlength=len(DELIVER11)) / label.size for label in labels])
    worth = (shares >= SMALLEST_SHARE).sum(1) + np.minimum(shares, 0.04).sum(1)
    return np.argsort(-worth, kind="stable")[:number].tolist()


def street_conditions_sheet(searched: int) -> np.ndarray:
    """One scene: a row for each condition, a column for each style and sensor, and the label."""
    (index,) = richest_scenes(1, searched)
    tiles = []
    for condition in CONDITIONS:
        for title, options in COLUMNS.items():
            sample = MiniStreetDataset("val", 1, conditions=[condition], offset=index, **options)[0]
            tiles.append(with_text(sample["image"], f"{condition}, {title}", 1))
        tiles.append(with_text(colorize(sample["label"], DELIVER11.colors), "label", 1))
    sheet = grid(tiles, len(COLUMNS) + 1)
    return np.concatenate([sheet, legend(DELIVER11, sheet.shape[1])])


def street_scenes_sheet(number: int, searched: int) -> np.ndarray:
    """Several scenes in their own conditions: image, label and caption."""
    tiles = []
    for index in richest_scenes(number, searched):
        sample = MiniStreetDataset("val", 1, size=160, offset=index)[0]
        label = colorize(sample["label"], DELIVER11.colors)
        tiles.append(with_text(np.concatenate([sample["image"], label]), sample["caption"], 7))
    sheet = grid(tiles, 5)
    return np.concatenate([sheet, legend(DELIVER11, sheet.shape[1])])


def categories_sheet() -> np.ndarray:
    """Every category alone, with its name."""
    tiles = []
    for i, name in enumerate(CATEGORIES):
        image = render_objects("val", 100 + i, categories=[name], count=1)["rgb"]
        tiles.append(with_text(enlarge(image, 2), name, 1))
    return grid(tiles, 7)


def object_scenes_sheet(number: int) -> np.ndarray:
    """Several object scenes: image, label and caption."""
    dataset, tiles = MiniObjectsDataset("val", number), []
    for sample in dataset:
        pair = np.concatenate([sample["image"], colorize(sample["label"], MINI_OBJECTS.colors)])
        tiles.append(with_text(enlarge(pair, 2), sample["caption"], 4))
    sheet = grid(tiles, 5)
    return np.concatenate([sheet, legend(MINI_OBJECTS, sheet.shape[1])])


def write_gallery(folder: Path, scenes: int, searched: int) -> list[Path]:
    """Write the four sheets as PNG files and return their paths."""
    sheets = {
        "street_conditions": street_conditions_sheet(searched),
        "street_scenes": street_scenes_sheet(scenes, searched),
        "object_categories": categories_sheet(),
        "object_scenes": object_scenes_sheet(scenes),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, sheet in sheets.items():
        Image.fromarray(sheet).save(folder / f"{name}.png", optimize=True)
    return [folder / f"{name}.png" for name in sheets]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("docs/mini_world"), help="folder for the PNG files"
    )
    parser.add_argument("--scenes", type=int, default=10, help="scenes on the sheets of mixed scenes")
    parser.add_argument("--search", type=int, default=100, help="scenes to choose those of the street from")
    options = parser.parse_args(arguments)
    for path in write_gallery(options.output, options.scenes, options.search):
        print(f"{path} ({path.stat().st_size / 1024:.0f} KiB)")


if __name__ == "__main__":
    main()
