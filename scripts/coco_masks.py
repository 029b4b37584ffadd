"""Write COCO-20i's labels: for each image of COCO 2014 a file of ids 0..80, from its instances.

    python -m scripts.coco_masks data/coco

Reads annotations/instances_{train,val}2014.json in the root; writes annotations/{train,val}2014/COCO_*.png.
Ids 1..80 are the places of the 80 categories in the order of their numbers, of which some are not used. All
instances, crowds too, are painted from large to small: a small one mostly lies in front. Files that are there
already are left alone, so that an interrupted command goes on where it stopped.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config_files import short_errors
from functional.classes import COCO81
from mistakes import edge_errors
from scripts.convert_labels import write_label


def run_lengths(packed: str) -> list[int]:
    """Unpack COCO's compressed run lengths.

    Each character holds five bits above 48, lowest first, and whether more follow (32); the last one's bit 16
    is the sign. From the fourth run on, differences to the run before last are stored.
    """
    runs: list[int] = []
    value = shift = 0
    for character in packed:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def decode(runs: Sequence[int], height: int, width: int) -> np.ndarray:
    """Turn run lengths, of 0 and 1 in turn, down the columns, into a mask bool [height, width].

    Raises:
        ValueError: they do not fill the mask.
    """
    if sum(runs) != height * width or min(runs) < 0:
        raise ValueError(
            f"Run lengths do not fit their image: found {sum(runs)} pixels in an image of {height} x {width}."
            " Get the annotations again."
        )
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def fill(label: np.ndarray, polygon: Sequence[float], class_id: int) -> None:
    """Paint the pixels of a label uint8 [H, W] whose centres lie in a polygon [x, y, x, y, ..].

    The centre of the first pixel is (0.5, 0.5). A row's pixels are inside from an odd crossing with the
    outline to the next even one. OpenCV's filling would add the outline, half a pixel on each side.
    """
    corners = np.array(polygon, float).reshape(-1, 2)
    left, top = np.maximum(np.floor(corners.min(0)).astype(int), 0)
    box = label[top : max(int(np.ceil(corners[:, 1].max())), 0), left:]
    start = corners - (left + 0.5, top + 0.5)  # centres have whole coordinates
    end = np.roll(start, -1, axis=0)
    first, last = np.sort(np.clip(np.ceil([start[:, 1], end[:, 1]]), 0, len(box)).astype(int), axis=0)
    edge = np.repeat(np.arange(len(start)), last - first)  # once for each row that it crosses
    row = np.arange(len(edge)) - np.repeat(np.cumsum(last - first) - last, last - first)
    (x, y), (dx, dy) = start[edge].T, (end - start)[edge].T
    column = np.clip(np.ceil(x + (row - y) * dx / dy), 0, box.shape[1]).astype(int)
    crossings = np.zeros((len(box), box.shape[1] + 1), np.uint8)
    np.add.at(crossings, (row, column), 1)
    box[np.cumsum(crossings, axis=1, dtype=np.uint8)[:, :-1] % 2 == 1] = class_id


def paint(label: np.ndarray, segmentation: list | dict, class_id: int) -> None:
    """Paint an instance into a label uint8 [H, W]: polygons, or run lengths {"counts": list or text}."""
    if isinstance(segmentation, dict):
        runs = segmentation["counts"]
        label[decode(run_lengths(runs) if isinstance(runs, str) else runs, *label.shape)] = class_id
        return
    for polygon in segmentation:
        fill(label, polygon, class_id)


def draw_label(height: int, width: int, instances: Sequence[dict], ids: dict[int, int]) -> np.ndarray:
    """Draw an image's label, uint8 [height, width].

    Args:
        instances: annotations as COCO has them.
        ids: by number of a category, the id that is painted.
    """
    label = np.zeros((height, width), np.uint8)
    for instance in sorted(instances, key=lambda one: -one["area"]):
        paint(label, instance["segmentation"], ids[instance["category_id"]])
    return label


def write_labels(root: Path, split: str, overwrite: bool = False) -> tuple[int, int]:
    """Write the labels of a split; return how many were written and how many were there already.

    Raises:
        FileNotFoundError: there are no annotations.
        ValueError: they are not those of COCO's 80 categories.
    """
    path = root / f"annotations/instances_{split}.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"There are no annotations {path}. Unpack annotations_trainval2014.zip of cocodataset.org in "
            f"{root}, or give its folder."
        )
    found = json.loads(path.read_text("utf-8"))
    ids = {number: place for place, number in enumerate(sorted(c["id"] for c in found["categories"]), 1)}
    if len(ids) != len(COCO81.names) - 1:
        raise ValueError(
            f"{path} is not COCO's: found {len(ids)} categories. Take the instances of COCO 2014, which have "
            f"{len(COCO81.names) - 1}."
        )
    instances = defaultdict(list)
    for instance in found["annotations"]:
        instances[instance["image_id"]].append(instance)
    folder = root / "annotations" / split
    folder.mkdir(exist_ok=True)
    written = 0
    for image in tqdm(found["images"], split, unit="label", disable=None, leave=False):
        target = folder / f"{Path(image['file_name']).stem}.png"
        if target.exists() and not overwrite:
            continue
        label = draw_label(image["height"], image["width"], instances[image["id"]], ids)
        write_label(label, target)
        written += 1
    return written, len(found["images"]) - written


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, help="folder of COCO")
    parser.add_argument(
        "--splits", nargs="+", default=["train2014", "val2014"], help="default: train2014 val2014"
    )
    parser.add_argument("--overwrite", action="store_true", help="draw again what is there already")
    args = parser.parse_args(argv)
    with edge_errors():
        for split in args.splits:
            written, kept = write_labels(args.root, split, args.overwrite)
            print(f"{split}: {written} labels written, {kept} were there already")


if __name__ == "__main__":
    with short_errors():
        main()
