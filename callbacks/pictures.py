"""Drawing: legends, rows of image | truth | prediction, confusion matrices; a callback for tests."""

import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback
from PIL import Image, ImageDraw, ImageFont

from callbacks.run_record import write_atomically
from functional.palette import IGNORED_COLOR, colorize, heat, overlay

Colors = Sequence[tuple[int, int, int]]
LINE = 18  # height of a line of text


def text_width(text: str) -> int:
    """Width of a text in pixels in the font of all pictures."""
    return int(ImageFont.load_default(12).getlength(text)) + 1


def legend(names: Sequence[str], colors: Colors, width: int, ignored: bool = False) -> np.ndarray:
    """Draw a colour swatch with its name for each class, in as many columns as fit.

    Args:
        names, colors: of the classes, in order of their ids.
        width: of the picture in pixels.
        ignored: also show the colour of ignored pixels.

    Returns:
        uint8 [height, width, 3].
    """
    entries = [*zip(names, colors, strict=True), *([("ignored", IGNORED_COLOR)] if ignored else [])]
    cell = max((text_width(name) for name, _ in entries), default=0) + LINE + 8
    columns = max(1, width // cell)
    rows = -(-len(entries) // columns)
    picture = Image.new("RGB", (width, rows * LINE + 4), "white")
    draw = ImageDraw.Draw(picture)
    for i, (name, color) in enumerate(entries):
        x, y = 2 + (i % columns) * cell, 2 + (i // columns) * LINE
        draw.rectangle((x, y + 2, x + LINE - 5, y + LINE - 3), fill=tuple(color), outline="black")
        draw.text((x + LINE, y + 1), name, fill="black", font=ImageFont.load_default(12))
    return np.asarray(picture)


def write_picture(picture: np.ndarray, path: Path) -> None:
    """Write a picture uint8 [H, W, 3] as PNG, whole or not at all, into a folder that is made if need be."""
    content = BytesIO()
    Image.fromarray(picture).save(content, "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())


def _titled(picture: np.ndarray, title: str) -> np.ndarray:
    bar = Image.new("RGB", (picture.shape[1], LINE), "white")
    ImageDraw.Draw(bar).text((2, 1), title, fill="black", font=ImageFont.load_default(12))
    return np.concatenate([np.asarray(bar), picture])


def side_by_side(panels: dict[str, np.ndarray], width: int) -> np.ndarray:
    """Draw pictures uint8 [H, W, 3] of one size in a row, each below its title.

    Args:
        panels: picture by title.
        width: each is at least this wide (smaller ones are enlarged by a whole factor, pixels kept).

    Returns:
        uint8 [height, total width, 3].
    """
    first = next(iter(panels.values()))
    factor = max(1, -(-width // first.shape[1]))
    gap = np.full((first.shape[0] * factor + LINE, 4, 3), 255, np.uint8)
    row = []
    for title, panel in panels.items():
        row += [_titled(panel.repeat(factor, 0).repeat(factor, 1), title), gap]
    return np.concatenate(row[:-1], 1)


def sized_like(image: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Resize an image uint8 [h, w, 3] to the size of class ids [H, W], bilinear; one of that size stays."""
    return np.asarray(Image.fromarray(image).resize(ids.shape[::-1], Image.Resampling.BILINEAR))


def comparison(
    image: np.ndarray,
    truth: np.ndarray | None,
    prediction: np.ndarray,
    names: Sequence[str],
    colors: Colors,
    width: int = 256,
) -> np.ndarray:
    """Draw image | truth | prediction | prediction over the image, and the legend of the classes below.

    Args:
        image: uint8 [h, w, 3], see sized_like.
        truth: uint8 ids [H, W], or None where there is no label.
        prediction: uint8 ids [H, W].
        names, colors: of the classes.
        width: each panel is at least this wide (smaller images are enlarged by a whole factor, pixels kept).

    Returns:
        uint8 [height, total width, 3].
    """
    image = sized_like(image, prediction)
    panels = {"image": image}
    if truth is not None:
        panels["truth"] = colorize(truth, colors)
    panels |= {"prediction": colorize(prediction, colors), "overlay": overlay(image, prediction, colors)}
    top = side_by_side(panels, width)
    shown = np.unique(prediction if truth is None else np.concatenate([truth.ravel(), prediction.ravel()]))
    present = [i for i in shown if i < len(names)]
    below = legend(
        [names[i] for i in present], [colors[i] for i in present], top.shape[1], ignored=255 in shown
    )
    return np.concatenate([top, below])


def heat_maps(
    image: np.ndarray, maps: dict[str, np.ndarray], width: int = 384, columns: int = 4
) -> np.ndarray:
    """Draw an image and, each below its name, the maps of its classes, from white (0) to dark blue (1).

    Args:
        image: uint8 [h, w, 3].
        maps: float [H, W] in [0, 1] by class.
        width: each panel is as wide as the image, within 256 (pixels are enlarged) and this.
        columns: panels in a row at most.

    Returns:
        uint8 [height, total width, 3].
    """
    height = round(image.shape[0] * min(1, width / image.shape[1]))
    size = min(width, image.shape[1]), max(height, 1)  # small first: colouring a photograph takes seconds
    panels = {"image": np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))}
    for name, values in maps.items():
        small = Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
        panels[name] = heat(np.asarray(small))
    titles, columns = list(panels), min(columns, len(panels))
    rows = [
        side_by_side({title: panels[title] for title in titles[i : i + columns]}, min(256, width))
        for i in range(0, len(titles), columns)
    ]
    full = rows[0].shape[1]
    padded = [np.pad(row, ((0, 4), (0, full - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    return np.concatenate(padded)


def confusion_picture(matrix: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Draw a confusion matrix: rows are the truth (each adds to 100 percent), columns the prediction.

    Args:
        matrix: pixel counts, [truth, prediction].
        names: of the classes.

    Returns:
        uint8 [height, width, 3]; a row of a class without pixels is grey.
    """
    matrix = np.asarray(matrix, np.float64)
    total = matrix.sum(1, keepdims=True)
    share = np.divide(matrix, total, out=np.full_like(matrix, np.nan), where=total > 0)
    cell, margin, count = 34, max(map(text_width, names)) + 8, len(names)
    picture = Image.new("RGB", (margin + cell * count + 4, LINE + margin + cell * count + 4), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    draw.text((4, 1), "rows: truth, columns: prediction, % of the truth", fill="black", font=font)
    squares = Image.fromarray(heat(share)).resize((cell * count, cell * count), Image.Resampling.NEAREST)
    picture.paste(squares, (margin, LINE + margin))
    for i, name in enumerate(names):
        draw.text((4, LINE + margin + i * cell + 10), name, fill="black", font=font)
        upright = Image.new("RGB", (margin, LINE), "white")
        ImageDraw.Draw(upright).text((4, 1), name, fill="black", font=font)
        picture.paste(upright.rotate(90, expand=True), (margin + i * cell + 8, LINE))
        for j, value in enumerate(share[i]):
            if value >= 0.005:
                place = (margin + j * cell + cell // 2, LINE + margin + i * cell + cell // 2)
                ink = "white" if value > 0.5 else "black"
                draw.text(place, f"{100 * value:.0f}", fill=ink, font=font, anchor="mm")
    return np.asarray(picture)


def to_uint8(image: torch.Tensor) -> np.ndarray:
    """Turn an image [3, H, W] in [0, 1] into uint8 [H, W, 3]."""
    return (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


class TestPictures(Callback):
    """Draws the first and the worst images of each test set with truth and prediction; confusion matrices.

    It asks the LightningModule for `matrices`, the confusion matrix of each set, for `image_rows` that end
    with set, name and score of each image of the batch, and that `test_step` returns class ids [B, H, W]. Of
    several processes the first draws the worst of its share.

    Args:
        folder: where the pictures go.
        per_set: images of each set to draw, from its start and again from those with the lowest scores.
        names, colors: of the classes.
    """

    __test__ = False  # no test class for pytest

    def __init__(self, folder: str | Path, per_set: int, names: Sequence[str], colors: Colors):
        self.folder, self.per_set, self.names, self.colors = Path(folder), per_set, names, colors
        self.seen: dict[str, int] = {}
        self.worst: dict[str, list] = {}  # by set: score, name, image, truth and prediction, lowest first

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        """Draw images of this batch while the set has not had its share, and keep the worst."""
        if not self.per_set or not trainer.is_global_zero:
            return
        for i, (set_name, name, score) in enumerate(pl_module.image_rows[-len(outputs) :]):
            seen, worst = self.seen.get(set_name, 0), self.worst.setdefault(set_name, [])
            self.seen[set_name] = seen + 1
            if seen >= self.per_set and not (len(worst) < self.per_set or score < worst[-1][0]):
                continue
            truth, prediction = (ids[i].cpu().numpy().astype(np.uint8) for ids in (batch["label"], outputs))
            shown = to_uint8(batch["image"][i]), truth, prediction
            if seen < self.per_set:
                self._save(comparison(*shown, self.names, self.colors), f"{set_name}-{name}")
            if score == score:  # an image without labels has none
                worst.append((score, name, *shown))
                worst.sort(key=lambda kept: kept[:2])
                del worst[self.per_set :]

    def on_test_end(self, trainer, pl_module) -> None:
        """Draw the worst images, and one confusion matrix for each set."""
        for set_name, worst in self.worst.items():
            for _, name, *shown in worst:
                self._save(comparison(*shown, self.names, self.colors), f"{set_name}-{name}")
        for name, scores in pl_module.matrices.items() if trainer.is_global_zero else ():
            self._save(confusion_picture(scores.compute()["matrix"].numpy(), self.names), f"confusion-{name}")

    def _save(self, picture: np.ndarray, name: str) -> None:
        write_picture(picture, self.folder / (re.sub(r"[^\w.-]+", "_", name) + ".png"))
