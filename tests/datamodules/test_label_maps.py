"""The id maps, number by number; an id that a data set does not have is an error, not a class."""

from pathlib import Path

import numpy as np
import pytest

from datamodules.label_maps import (
    CITYSCAPES_IDS,
    CITYSCAPES_STREET,
    DELIVER_STREET,
    DSEC_STREET,
    FMB_STREET,
    MAPILLARY_IDS,
    SYNTHIA_IDS,
    TRAIN_IDS,
    check_ids,
    lookup_table,
    train_id_table,
)
from functional.classes import class_table

TO_11 = [5, 6, 1, 9, 2, 4, 10, 10, 7, 7, 0, 3, 3, 8, 8, 8, 8, 8, 8]
TO_9 = [4, 5, 1, 255, 255, 3, 8, 8, 6, 6, 0, 2, 2, 7, 7, 7, 7, 7, 7]
DELIVER_FROM_1 = [1, 2, 255, 3, 4, 5, 5, 6, 7, 8, 9, 10, 0, 255, 255, 255, 255, 10, 255, 255, 255, 7, 8, 8, 8]

# Name, then the ids of Cityscapes and GTA5, SYNTHIA and Mapillary 1.2, in the order of the train ids.
PUBLISHED = [
    ("road", [7], [3], [13, 24, 41]),
    ("sidewalk", [8], [4], [2, 15]),
    ("building", [11], [2], [17]),
    ("wall", [12], [21], [6]),
    ("fence", [13], [5], [3]),
    ("pole", [17], [7], [45, 47]),
    ("traffic light", [19], [15], [48]),
    ("traffic sign", [20], [9], [50]),
    ("vegetation", [21], [6], [30]),
    ("terrain", [22], [16], [29]),
    ("sky", [23], [1], [27]),
    ("person", [24], [10], [19]),
    ("rider", [25], [17], [20, 21, 22]),
    ("car", [26], [8], [55]),
    ("truck", [27], [18], [61]),
    ("bus", [28], [19], [54]),
    ("train", [31], [20], [58]),
    ("motorcycle", [32], [12], [57]),
    ("bicycle", [33], [11], [52]),
]


@pytest.mark.parametrize("column, ids", [(1, CITYSCAPES_IDS), (2, SYNTHIA_IDS), (3, MAPILLARY_IDS)])
def test_each_published_id_becomes_its_train_id_and_all_others_are_ignored(column, ids):
    table, names = train_id_table(ids), class_table("cityscapes19").names
    expected = {i: names.index(row[0]) for row in PUBLISHED for i in row[column]}
    assert len(expected) == sum(len(row[column]) for row in PUBLISHED)
    assert table.tolist() == [expected.get(i, 255) for i in range(256)]


@pytest.mark.parametrize(
    "stored, classes, expected",
    [
        (CITYSCAPES_STREET, "deliver11", TO_11),
        (CITYSCAPES_STREET, "fmb9", TO_9),
        (TRAIN_IDS, "cityscapes19", list(range(19))),
        (DELIVER_STREET, "deliver11", [255, *DELIVER_FROM_1]),
        (FMB_STREET, "fmb9", [255, 4, 5, 1, 8, 8, 6, 0, 2, 7, 7, 7, 7, 7, 3]),
        (DSEC_STREET, "deliver11", list(range(11))),
    ],
)
def test_each_stored_id_becomes_the_class_of_the_specification(stored, classes, expected):
    table = lookup_table(stored, classes)
    assert table[: len(expected)].tolist() == expected
    assert (table[len(expected) : 255] == -1).all() and table[255] == 255


def test_the_nine_classes_are_the_eleven_without_fence_and_wall():
    eleven, nine = class_table("deliver11"), class_table("fmb9")
    kept = [i for i, name in enumerate(eleven.names) if name not in ("fence", "wall")]
    assert nine.names == tuple(eleven.names[i] for i in kept)
    assert nine.colors == tuple(eleven.colors[i] for i in kept)


def test_a_mapped_id_is_not_mapped_again():
    road_then_pole = np.array([0, 5], np.uint8)  # road becomes 5, which as a stored id is pole
    assert lookup_table(CITYSCAPES_STREET, "deliver11")[road_then_pole].tolist() == [5, 4]


def test_every_name_of_a_map_is_a_class():
    for stored in (CITYSCAPES_STREET, DELIVER_STREET, FMB_STREET, DSEC_STREET):
        assert set(stored) - {None} <= set(class_table("deliver11").names)


def test_unknown_ids_are_an_error_that_names_file_and_ids():
    table = lookup_table(FMB_STREET, "fmb9")
    check_ids(np.array([[0, 14, 255]], np.uint8), table, Path("a.png"))
    with pytest.raises(ValueError, match=r"a\.png holds ids .*found \[15, 200\], known are 0\.\.14 and 255"):
        check_ids(np.array([[0, 200, 15]], np.uint8), table, Path("a.png"))
