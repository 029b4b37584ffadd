import pytest

from functional.ade20k import COCO, COLORS, PASCAL, UNKNOWN, WALL, ade_class


def test_each_class_of_pascal_and_coco_has_an_index_with_a_colour_of_its_own():
    assert len(PASCAL) == 20 and len(COCO) == 80
    used = set(PASCAL) | set(COCO) | {WALL, UNKNOWN}
    assert len({COLORS[index] for index in used}) == len(used) == 37


def test_the_palette_is_that_of_ade20k():
    assert len(COLORS) == 150 and all(len(color) == 3 for color in COLORS)
    assert COLORS[6] == COLORS[48] == (140, 140, 140) and len(set(COLORS)) == 149
    known = {0: (120, 120, 120), 2: (6, 230, 230), 28: (255, 9, 92), 41: (0, 255, 20), 60: (11, 200, 200)}
    known |= {
        84: (255, 184, 184),
        108: (255, 0, 31),
        114: (112, 224, 255),
        126: (255, 0, 122),
        149: (92, 0, 255),
    }
    assert {index: COLORS[index] for index in known} == known


def test_the_published_tables_are_looked_up_by_the_id_of_the_data_set():
    assert ade_class("pascal", 7, "car", {}) == 20 and COLORS[20] == (0, 102, 200)
    assert ade_class("pascal", 19, "train", {}) == 20
    assert ade_class("coco", 1, "person", {}) == 12 and ade_class("coco", 41, "wine glass", {}) == 147


def test_other_sets_take_the_fallback_unless_a_file_names_the_class():
    assert ade_class("fss", 1, "abacus", {}) == UNKNOWN == 108
    assert ade_class("fss", 1, "abacus", {"abacus": 67}) == 67
    assert ade_class("pascal", 7, "car", {"car": 83}) == 83


@pytest.mark.parametrize("index", [150, -1, "animal"])
def test_an_index_that_ade20k_does_not_have_is_an_error_that_names_it(index):
    assert ade_class("fss", 1, "abacus", {"abacus": 149}) == 149
    with pytest.raises(ValueError, match=rf"'abacus'.*class {index!r}, .*from 0 to 149"):
        ade_class("fss", 1, "abacus", {"abacus": index})
