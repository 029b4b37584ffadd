"""From the ids that label files hold to those of a class table: one look-up per pixel, so nothing chains."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from functional.classes import CITYSCAPES19, DELIVER11, IGNORE_INDEX, class_table

UNKNOWN = -1  # in a look-up table: the data set has no such id

# By stored id, the class of MADM's street tables that it becomes; None is ignored.
CITYSCAPES_STREET = (
    *("road", "sidewalk", "building", "wall", "fence", "pole"),
    *("traffic sign", "traffic sign"),  # light, sign
    *("vegetation", "vegetation"),  # vegetation, terrain
    *("sky", "person", "person"),  # sky, person, rider
    *("car", "car", "car", "car", "car", "car"),  # car, truck, bus, train, motorcycle, bicycle
)
DELIVER_STREET = (
    *(None, "building", "fence", None, "person", "pole"),  # unlabelled .. other ..
    *("road", "road", "sidewalk", "vegetation", "car", "wall", "traffic sign", "sky"),  # road line, road ..
    *(None, None, None, None),  # ground, bridge, rail track, guard rail
    *("traffic sign", None, None, None),  # traffic light, static, dynamic, water
    *("vegetation", "car", "car", "car"),  # terrain, two-wheeler, bus, truck
)
FMB_STREET = (
    *(None, "road", "sidewalk", "building"),
    *("traffic sign", "traffic sign"),  # lamp, sign
    *("vegetation", "sky", "person"),
    *("car", "car", "car", "car", "car"),  # car, truck, bus, motorcycle, bicycle
    "pole",
)
DSEC_STREET = DELIVER11.names  # id 0, "background" in DSEC-Semantic, is read as sky
TRAIN_IDS = CITYSCAPES19.names  # of files *_labelTrainIds.png

# By train id, the ids in the published label files that become it; all others are ignored.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # GTA5's too
SYNTHIA_IDS = (3, 4, 2, 21, 5, 7, 15, 9, 6, 16, 1, 10, 17, 8, 18, 19, 20, 12, 11)
MAPILLARY_IDS = (  # of version 1.2, as HRDA reads them (arXiv 2304.13615)
    *((13, 24, 41), (2, 15), 17),  # road with lane markings and manholes, sidewalk with curbs
    *(6, 3, (45, 47), 48, 50),  # pole with utility poles
    *(30, 29, 27, 19, (20, 21, 22)),  # bicyclist, motorcyclist, other rider
    *(55, 61, 54, 58, 57, 52),
)


def lookup_table(stored: Sequence[str | None], classes: str) -> np.ndarray:
    """Build the table from stored id to class id, int16 [256].

    Args:
        stored: by stored id, the name of its class; None, and a name that the class table lacks, become 255.
        classes: name of the class table.

    Returns:
        Class ids, 255 for ignored (as is stored id 255), UNKNOWN for ids beyond `stored`.
    """
    names = class_table(classes).names
    table = np.full(256, UNKNOWN, np.int16)
    table[: len(stored)] = [names.index(name) if name in names else IGNORE_INDEX for name in stored]
    table[IGNORE_INDEX] = IGNORE_INDEX
    return table


def train_id_table(ids: Sequence[int | tuple[int, ...]]) -> np.ndarray:
    """Build the table from the ids of published label files to train ids, uint8 [256], 255 for all others."""
    table = np.full(256, IGNORE_INDEX, np.uint8)
    for train_id, published in enumerate(ids):
        table[np.atleast_1d(published)] = train_id
    return table


def check_ids(ids: np.ndarray, table: np.ndarray, file: Path) -> None:
    """Refuse stored ids, uint8 of any shape, that the data set does not have.

    Raises:
        ValueError: names the file and the ids.
    """
    present = np.flatnonzero(np.bincount(ids.ravel(), minlength=256))
    if len(unknown := present[table[present] == UNKNOWN]):
        known = np.flatnonzero(table != UNKNOWN)[:-1]
        raise ValueError(
            f"{file} holds ids that its data set does not have: found {unknown[:10].tolist()}, known are 0.."
            f"{known.max()} and {IGNORE_INDEX}. Give the label files that docs/datasets.md names."
        )
