import pytest

from functional.classes import ClassTable, class_table


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


@pytest.mark.parametrize("name", ["deliver11", "fmb9", "mini_objects"])
def test_no_two_classes_of_a_table_share_a_colour(name):
    colors = class_table(name).colors
    assert len(set(colors)) == len(colors)


def test_an_unknown_table_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"deliver12.*deliver11"):
        class_table("deliver12")


def test_a_table_with_a_name_too_many_is_refused():
    with pytest.raises(ValueError, match="one colour per name"):
        ClassTable("broken", ("a", "b"), ((0, 0, 0),))
