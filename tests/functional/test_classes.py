import pytest

from functional.classes import SYNTHIA13, SYNTHIA16, ClassTable, class_subset, class_table


def test_the_street_table_has_the_order_and_colours_of_the_eleven_class_palette():
    table = class_table("deliver11")
    assert table.names[:4] == ("sky", "building", "fence", "person") and len(table) == 11
    assert table.colors[table.names.index("traffic sign")] == (250, 170, 30)


def test_the_table_of_nine_classes_is_that_of_eleven_without_fence_and_wall():
    eleven, nine = class_table("deliver11"), class_table("fmb9")
    kept = [i for i, name in enumerate(eleven.names) if name not in ("fence", "wall")]
    assert nine.names == tuple(eleven.names[i] for i in kept) and len(nine) == 9
    assert nine.colors == tuple(eleven.colors[i] for i in kept)
    assert nine.names.index("road") == 4 and nine.names.index("traffic sign") == 8


def test_the_table_of_nineteen_classes_has_the_train_ids_and_colours_of_cityscapes():
    table = class_table("cityscapes19")
    numbers = {name: (i, table.colors[i]) for i, name in enumerate(table.names)}
    assert len(table) == 19 and table.names[0] == "road" and table.names[18] == "bicycle"
    assert numbers["traffic light"] == (6, (250, 170, 30)) and numbers["traffic sign"] == (7, (220, 220, 0))
    assert numbers["terrain"] == (9, (152, 251, 152)) and numbers["rider"] == (12, (255, 0, 0))
    assert numbers["train"] == (16, (0, 80, 100)) and numbers["motorcycle"] == (17, (0, 0, 230))


def test_the_subsets_leave_out_what_synthia_lacks_and_then_what_is_thin_or_rare():
    names = class_table("cityscapes19").names
    assert [names.index(name) for name in SYNTHIA16] == [*range(9), *range(10, 14), 15, 17, 18]
    assert [names.index(name) for name in SYNTHIA13] == [*range(3), *range(6, 9), *range(10, 14), 15, 17, 18]
    assert class_subset("synthia16") == SYNTHIA16 and class_subset("synthia13") == SYNTHIA13


def test_an_unknown_subset_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'synthia19': choose one of synthia16, synthia13"):
        class_subset("synthia19")


@pytest.mark.parametrize("name", ["deliver11", "fmb9", "cityscapes19", "mini_objects"])
def test_no_two_classes_of_a_table_share_a_colour(name):
    colors = class_table(name).colors
    assert len(set(colors)) == len(colors)


def test_an_unknown_table_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"deliver12.*deliver11"):
        class_table("deliver12")


def test_a_table_with_a_name_too_many_is_refused():
    with pytest.raises(ValueError, match="one colour per name"):
        ClassTable("broken", ("a", "b"), ((0, 0, 0),))
