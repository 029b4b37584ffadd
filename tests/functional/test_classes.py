import pytest

from functional.classes import SYNTHIA13, SYNTHIA16, ClassTable, class_subset, class_table, voc_color


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


@pytest.mark.parametrize(
    "name", ["deliver11", "fmb9", "cityscapes19", "mini_objects", "voc21", "context60", "coco81"]
)
def test_no_two_classes_of_a_table_share_a_colour(name):
    colors = class_table(name).colors
    assert len(set(colors)) == len(colors)


def test_an_unknown_table_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"deliver12.*deliver11"):
        class_table("deliver12")


def test_a_table_with_a_name_too_many_is_refused():
    with pytest.raises(ValueError, match="one colour per name"):
        ClassTable("broken", ("a", "b"), ((0, 0, 0),))


CONTEXT_PROMPTS = (
    "airplane bag bed bedclothes bench bicycle bird boat book bottle building bus cabinet car cat ceiling "
    "chair cloth computer cow cup curtain dog door fence floor flower food grass ground horse keyboard light "
    "motorbike mountain mouse person plate platform plant road rock sheep shelves sidewalk sign sky snow "
    "sofa table track train tree truck monitor wall water window wood"
)


def renamed(name: str) -> dict[str, str]:
    table = class_table(name)
    return {a: b for a, b in zip(table.names, table.words, strict=True) if a != b}


@pytest.mark.parametrize("name, count", [("voc21", 21), ("context60", 60), ("coco81", 81)])
def test_the_object_tables_begin_with_the_background(name, count):
    table = class_table(name)
    assert len(table) == len(table.words) == count and table.has_background
    assert table.names[0] == table.words[0] == "background" and table.colors[0] == (0, 0, 0)


def test_the_table_of_voc_has_its_order_its_colours_and_the_words_of_the_published_prompts():
    table = class_table("voc21")
    ids = {name: table.names.index(name) for name in ("aeroplane", "bus", "person", "tvmonitor")}
    assert ids == {"aeroplane": 1, "bus": 6, "person": 15, "tvmonitor": 20}
    assert [table.colors[i] for i in ids.values()] == [
        (128, 0, 0),
        (0, 128, 128),
        (192, 128, 128),
        (0, 64, 128),
    ]
    assert renamed("voc21") == {
        "aeroplane": "plane",
        "bus": "buses",
        "diningtable": "table",
        "person": "people",
        "pottedplant": "plant",
        "tvmonitor": "monitor",
    }


def test_the_table_of_context_has_the_order_of_its_label_files():
    table = class_table("context60")
    assert table.words[1:] == tuple(CONTEXT_PROMPTS.split())
    assert renamed("context60") == {"aeroplane": "airplane", "pottedplant": "plant", "tvmonitor": "monitor"}
    assert list(table.names[1:]) == sorted(table.names[1:])


def test_the_table_of_coco_has_the_order_of_its_category_ids_and_brushes_teeth():
    table = class_table("coco81")
    ids = ("person", "traffic light", "hot dog", "couch", "tv", "hair drier", "toothbrush")
    assert [table.names.index(name) for name in ids] == [1, 10, 53, 58, 63, 79, 80]
    assert table.words[80] == "toothbrush"
    assert renamed("coco81") == {
        "motorcycle": "motorbike",
        "airplane": "aeroplane",
        "couch": "sofa",
        "potted plant": "pottedplant",
        "dining table": "diningtable",
        "tv": "tvmonitor",
    }


def test_all_ids_of_the_voc_colour_map_have_colours_of_their_own():
    assert len({voc_color(i) for i in range(256)}) == 256
    assert voc_color(8) == (64, 0, 0) and voc_color(255) == (224, 224, 192)


def test_without_prompts_a_class_is_asked_for_by_its_name():
    table = class_table("mini_objects")
    assert table.words == table.names and table.has_background
    assert not class_table("deliver11").has_background


@pytest.mark.parametrize("prompts", [("a",), ("a", "a")])
def test_prompts_that_do_not_tell_the_classes_apart_are_refused(prompts):
    colors = ((0, 0, 0), (1, 1, 1))
    assert ClassTable("fine", ("a", "b"), colors, ("c", "d")).words == ("c", "d")
    with pytest.raises(ValueError, match="one prompt per name and no prompt twice"):
        ClassTable("broken", ("a", "b"), colors, prompts)


def test_words_of_a_user_make_a_table_behind_a_background():
    table = class_table(["dog", " park  bench"])
    assert table.names == ("background", "dog", "park bench") and table.has_background
    assert table.colors == class_table("voc21").colors[:3]


@pytest.mark.parametrize("words", [[], [""], ["dog", "dog"], ["background"], [f"w{i}" for i in range(255)]])
def test_words_that_make_no_table_are_refused(words):
    with pytest.raises(ValueError, match="Classes are 1 to 254 different words"):
        class_table(words)
