"""COCO's instances become files of ids 0..80, from polygons and from run lengths of both kinds."""

import json

import numpy as np
import pytest
from PIL import Image

from config_files import UsageError
from datamodules.coco20i import COCO20iDataModule
from functional.classes import COCO81
from scripts.coco_masks import decode, draw_label, main, paint, run_lengths

NUMBERS = [n for n in range(1, 91) if n not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]  # COCO's 80
BOX = [[2, 1, 6, 1, 6, 4, 2, 4]]


def instance(category: int, segmentation, area: float, image: int = 1) -> dict:
    return {"image_id": image, "category_id": category, "segmentation": segmentation, "area": area}


def write_coco(root, annotations, categories=NUMBERS) -> None:
    (root / "annotations").mkdir()
    for split in ("train2014", "val2014"):
        image = {"id": 1, "file_name": f"COCO_{split}_000000000001.jpg", "height": 6, "width": 8}
        found = {"images": [image], "annotations": annotations, "categories": [{"id": n} for n in categories]}
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(found))


def stored(root, split: str = "train2014") -> np.ndarray:
    return np.asarray(Image.open(root / f"annotations/{split}/COCO_{split}_000000000001.png"))


def painted(segmentation, shape=(6, 8)) -> np.ndarray:
    label = np.zeros(shape, np.uint8)
    paint(label, segmentation, 7)
    return label


def test_a_polygon_covers_the_pixels_whose_centres_it_holds():
    expected = np.zeros((6, 8), np.uint8)
    expected[1:4, 2:6] = 7
    assert np.array_equal(painted(BOX), expected)
    reversed_box = np.array(BOX[0]).reshape(-1, 2)[::-1].ravel().tolist()
    assert np.array_equal(painted([reversed_box]), expected)
    triangle = painted([[0, 0, 4, 0, 0, 4]], (4, 4))
    assert (triangle > 0).tolist() == [[x + y + 1 < 4 for x in range(4)] for y in range(4)]


def test_a_random_polygon_covers_what_a_point_in_polygon_test_says():
    corners = np.random.default_rng(0).uniform(-4, 28, (9, 2))
    y, x = np.mgrid[:20, :24] + 0.5
    inside = np.zeros((20, 24), bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    assert 0 < inside.sum() < inside.size
    assert np.array_equal(painted([corners.ravel().tolist()], (20, 24)) > 0, inside)


@pytest.mark.parametrize(
    "outside", [[-9, -9, -5, -9, -5, -5], [20, 20, 25, 20, 25, 25], [3, -9, 5, -9, 5, -2]]
)
def test_a_polygon_outside_the_image_paints_nothing(outside):
    assert not painted([outside]).any()


def test_parts_of_an_instance_are_painted_each_by_itself():
    both = painted([[0, 0, 3, 0, 3, 3, 0, 3], [2, 2, 5, 2, 5, 5, 2, 5]])
    assert both[2, 2] == 7 and (both > 0).sum() == 9 + 9 - 1


def test_run_lengths_go_down_the_columns_from_background():
    assert decode([1, 2, 3], 3, 2).tolist() == [[False, False], [True, False], [True, False]]
    with pytest.raises(ValueError, match="found 5 pixels in an image of 3 x 2"):
        decode([1, 2, 2], 3, 2)


def test_packed_run_lengths_are_those_that_cocos_own_code_packs():
    assert run_lengths("61X13mN000`0") == [6, 1, 40, 4, 5, 4, 5, 4, 21]
    packed, plain = {"counts": "61X13mN000`0"}, {"counts": [6, 1, 40, 4, 5, 4, 5, 4, 21]}
    found = painted(packed, (9, 10))
    assert np.array_equal(found, painted(plain, (9, 10))) and (found > 0).sum() == 13
    assert found[6, 0] == 7 and found[2:6, 5].all()


def test_a_small_instance_is_painted_over_a_large_one_in_whatever_order():
    large, small = instance(1, [[0, 0, 8, 0, 8, 6, 0, 6]], 48), instance(90, BOX, 12)
    ids = {1: 1, 90: 80}
    for order in ([large, small], [small, large]):
        label = draw_label(6, 8, order, ids)
        assert (label == 80).sum() == 12 and (label == 1).sum() == 36


def test_files_hold_contiguous_ids_that_the_data_module_names(tmp_path, capsys):
    write_coco(tmp_path, [instance(13, BOX, 12), instance(90, {"counts": [0, 2, 46]}, 2)])
    main([str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[0] == "train2014: 1 labels written, 0 were there already"
    label = stored(tmp_path)
    assert np.array_equal(label, stored(tmp_path, "val2014")) and label.dtype == np.uint8
    assert COCO81.names[label[1, 2]] == "stop sign" and COCO81.names[label[1, 0]] == "toothbrush"
    for split in ("train2014", "val2014"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (8, 6)).save(tmp_path / split / f"COCO_{split}_000000000001.jpg")
    assert COCO20iDataModule(tmp_path).images("train").areas == [{12: 12, 80: 2}]


def test_files_that_are_there_are_left_alone_unless_told_otherwise(tmp_path, capsys):
    write_coco(tmp_path, [instance(1, BOX, 12)])
    main([str(tmp_path), "--splits", "train2014"])
    target = tmp_path / "annotations/train2014/COCO_train2014_000000000001.png"
    target.write_bytes(b"kept")
    main([str(tmp_path), "--splits", "train2014"])
    assert target.read_bytes() == b"kept" and not (tmp_path / "annotations/val2014").exists()
    assert capsys.readouterr().out.splitlines()[1] == "train2014: 0 labels written, 1 were there already"
    main([str(tmp_path), "--splits", "train2014", "--overwrite"])
    assert (stored(tmp_path) == 1).sum() == 12 and len(list(target.parent.iterdir())) == 1


def test_missing_and_other_annotations_are_errors(tmp_path):
    with pytest.raises(UsageError, match=r"no annotations .*instances_train2014\.json"):
        main([str(tmp_path)])
    write_coco(tmp_path, [], categories=[1, 2])
    with pytest.raises(UsageError, match="found 2 categories"):
        main([str(tmp_path)])
