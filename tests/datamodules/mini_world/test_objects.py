import hashlib
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest

from datamodules.mini_world.objects import BACKGROUNDS, CATEGORIES, COLORS, FOLDS, RESERVE, render_objects
from datamodules.mini_world.shapes import SHAPES
from functional.classes import MINI_OBJECTS

GREYEST = ("white", "black")


def scenes(number, split="train", **options):
    return [render_objects(split, index, **options) for index in range(number)]


def test_there_are_at_least_24_categories_8_colours_and_6_backgrounds():
    assert len(CATEGORIES) >= 24 and len(COLORS) >= 8 and len(BACKGROUNDS) >= 6
    assert MINI_OBJECTS.names == ("background", *CATEGORIES)


def test_four_folds_of_five_and_the_reserve_share_out_all_categories():
    assert [len(fold) for fold in FOLDS] == [5, 5, 5, 5] and len(RESERVE) >= 4
    assert sorted(name for fold in (*FOLDS, RESERVE) for name in fold) == sorted(CATEGORIES)


@pytest.mark.parametrize("size", [64, 97, 512])
def test_a_scene_has_a_colour_image_and_a_label_of_the_asked_size(size):
    scene = render_objects("val", 3, size=size)
    assert scene["rgb"].shape == (size, size, 3) and scene["rgb"].dtype == np.uint8
    assert scene["label"].shape == (size, size) and scene["label"].dtype == np.uint8


def test_the_label_shows_background_and_exactly_the_named_objects():
    for scene in scenes(60):
        expected = {0} | {1 + CATEGORIES.index(name) for name, _ in scene["objects"]}
        assert set(np.unique(scene["label"]).tolist()) == expected


def test_the_same_scene_has_the_same_bytes_in_another_process_and_order():
    code = (
        "from datamodules.mini_world.objects import render_objects as r; import hashlib; r('test', 9);"
        "s = r('val', 5); print(hashlib.sha256(s['rgb'].tobytes() + s['label'].tobytes()).hexdigest())"
    )
    found = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    scene = render_objects("val", 5)
    expected = hashlib.sha256(scene["rgb"].tobytes() + scene["label"].tobytes()).hexdigest()
    assert [text.strip() for text in found] == [expected, expected]


def test_splits_and_indices_give_different_scenes():
    pictures = {s["rgb"].tobytes() for split in ("train", "val", "test") for s in scenes(30, split)}
    assert len(pictures) == 90


def test_a_scene_is_the_same_at_every_size():
    for index in range(12):
        small, large = render_objects("val", index), render_objects("val", index, size=256)
        assert small["objects"] == large["objects"]
        assert (small["label"] == large["label"][2::4, 2::4]).mean() > 0.97


def test_counts_come_as_often_as_stated_and_can_be_fixed():
    counts = np.bincount([len(s["objects"]) for s in scenes(500)], minlength=4)[1:] / 500
    assert counts == pytest.approx([0.45, 0.45, 0.10], abs=0.07)
    for count in (1, 2, 3):
        assert {len(s["objects"]) for s in scenes(10, count=count)} == {count}


def test_categories_restrict_what_is_drawn_and_repeat_only_when_they_must():
    drawn = [[name for name, _ in s["objects"]] for s in scenes(40, categories=["mug", "key", "boat"])]
    assert {name for names in drawn for name in names} == {"mug", "key", "boat"}
    assert all(len(set(names)) == len(names) for names in drawn)
    assert render_objects("train", 0, categories=["mug"], count=2)["objects"][1][0] == "mug"


def test_every_category_colour_and_background_occurs():
    drawn = scenes(400)
    assert {name for s in drawn for name, _ in s["objects"]} == set(CATEGORIES)
    assert {color for s in drawn for _, color in s["objects"]} == set(COLORS)
    assert {s["caption_facts"]["background"] for s in drawn} == set(BACKGROUNDS)


def test_objects_overlap_little_and_are_large_enough_to_see():
    for scene in scenes(40, count=3, size=128):
        areas = [np.mean(scene["label"] == 1 + CATEGORIES.index(name)) for name, _ in scene["objects"]]
        assert min(areas) > 0.008
    for scene in scenes(40, count=1):
        assert (scene["label"] > 0).mean() > 0.03


def test_an_object_has_its_colour():
    for scene in scenes(80, count=1, size=128):
        (_, color), inside = scene["objects"][0], scene["rgb"][scene["label"] > 0].astype(float)
        if color not in GREYEST:
            tint = inside.mean(0) - inside.mean()
            wanted = np.array(COLORS[color], float) - np.mean(COLORS[color])
            assert tint @ wanted > 0.9 * np.linalg.norm(tint) * np.linalg.norm(wanted), scene["objects"]


def test_silhouettes_can_be_told_apart_whatever_the_pose():
    """Each outline is less than 85 % the same as any other, mirrored or not."""
    masks = {}
    for name, parts in SHAPES.items():
        mask = np.zeros((96, 96), np.uint8)
        for _, contours in parts:
            cv2.fillPoly(mask, [np.rint(c * 42 + 48).astype(np.int32) for c in contours], 1)
        masks[name] = mask > 0
    for a in CATEGORIES:
        for b in CATEGORIES:
            if a < b:
                overlaps = [
                    (masks[a] & m).sum() / (masks[a] | m).sum() for m in (masks[b], masks[b][:, ::-1])
                ]
                assert max(overlaps) < 0.85, (a, b, max(overlaps))


@pytest.mark.parametrize(
    "options",
    [{"split": "dev"}, {"index": -1}, {"size": 63}, {"size": 513}, {"count": 4}, {"count": 0},
     {"categories": ["mugg"]}, {"categories": "mug"}, {"categories": []}],
)  # fmt: skip
def test_wrong_options_are_errors_that_show_them(options):
    with pytest.raises(ValueError, match=re.escape(str(next(iter(options.values()))))):
        render_objects(**{"split": "train", "index": 0} | options)
