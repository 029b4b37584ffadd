"""Write the labels of data sets in the 19 train ids of Cityscapes: *_labelTrainIds.png beside each file.

    python -m scripts.convert_labels gta5=data/gta5 synthia=data/synthia mapillary=data/mapillary --workers 8

Files that are there already are left alone, so that an interrupted command goes on where it stopped. What
cannot be converted is named, and makes exit code 1, when all others are done.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from config_files import short_errors
from datamodules.label_maps import CITYSCAPES_IDS, MAPILLARY_IDS, SYNTHIA_IDS, train_id_table
from datamodules.reading import read_label
from mistakes import edge_errors
from scripts.check_data import arguments, named_folders

ENDING = "_labelTrainIds.png"


@dataclass(frozen=True)
class Published:
    """The label files of a data set as they are published.

    Args:
        files: their pattern below the root.
        ids: by train id, the ids that become it.
        mode: Pillow mode of the files, see read_label; colour files hold the ids in their first channel.
        ending: what ENDING takes the place of in their names.
    """

    files: str
    ids: Sequence[int | tuple[int, ...]]
    mode: str = "P"
    ending: str = ".png"


SETS = {
    "cityscapes": Published("gtFine/*/*/*_gtFine_labelIds.png", CITYSCAPES_IDS, "L", "_labelIds.png"),
    "gta5": Published("labels/*.png", CITYSCAPES_IDS),
    "mapillary": Published("validation/labels/*.png", MAPILLARY_IDS),
    "synthia": Published("GT/LABELS/*.png", SYNTHIA_IDS, "RGB;16"),
}


def convert(published: Published, table: np.ndarray, source: Path) -> str:
    """Write the train ids of a label file; return what is wrong with it, or nothing."""
    try:
        ids = read_label(source, first_channel=True, mode=published.mode)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    write_label(table[ids], train_id_file(published, source))
    return ""


def write_label(ids: np.ndarray, target: Path) -> None:
    """Write train ids uint8 [H, W]; nobody finds part of a file, whenever the command is interrupted."""
    temporary = target.with_name(f".{target.name}.tmp")
    Image.fromarray(ids).save(temporary, "png")
    os.replace(temporary, target)


def train_id_file(published: Published, source: Path) -> Path:
    return source.with_name(source.name.removesuffix(published.ending) + ENDING)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv, __doc__, "--overwrite", "convert again what is there already")
    faults = 0
    with edge_errors(), ThreadPoolExecutor(args.workers) as pool:
        for name, root in named_folders(args.sets, SETS):
            published = SETS[name]
            found = sorted(
                path for path in Path(root).glob(published.files) if not path.name.endswith(ENDING)
            )
            if not found:
                raise FileNotFoundError(
                    f"{name} has no published labels: looked for {Path(root) / published.files} and found "
                    "none. docs/datasets.md shows the layout and where to get it."
                )
            due = [path for path in found if args.overwrite or not train_id_file(published, path).exists()]
            done = pool.map(partial(convert, published, train_id_table(published.ids)), due)
            told = list(filter(None, tqdm(done, name, len(due), unit="label", disable=None, leave=False)))
            print(
                f"{name}: {len(due) - len(told)} labels written, {len(found) - len(due)} were there already"
            )
            for fault in told:
                print(f"  FAULT {fault}")
            faults += len(told)
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    with short_errors():
        main()
