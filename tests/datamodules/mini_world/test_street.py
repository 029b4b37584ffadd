"""Street scenes: pure functions of their names, one geometry for all looks, classes large enough to learn."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from datamodules.mini_world.street import CONDITIONS, MODALITIES, STYLES, render_street
from functional.classes import DELIVER11

ROOT = Path(__file__).parents[3]
SENSORS = ("rgb", "depth", "infrared", "event")


def digest(scene: dict) -> str:
    return hashlib.sha256(b"".join(scene[name].tobytes() for name in (*SENSORS, "label"))).hexdigest()


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    return np.stack([render_street("train", i, sensors=())["label"] for i in range(120)])


def test_a_scene_has_the_same_bytes_in_another_process_and_order():
    names = [("train", 5, "night"), ("val", 2, "snow")]
    here = [digest(render_street(s, i, size=64, condition=c, sensors=SENSORS)) for s, i, c in names]
    code = f"""
import hashlib
from datamodules.mini_world.street import render_street
for s, i, c in {names[::-1]!r}:
    scene = render_street(s, i, size=64, condition=c, sensors={SENSORS!r})
    print(hashlib.sha256(b"".join(scene[n].tobytes() for n in {(*SENSORS, "label")!r})).hexdigest())
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == here[::-1]


def test_styles_and_conditions_share_label_depth_and_geometry_but_not_the_picture():
    first = render_street("train", 7, style="real", condition="day", sensors=("rgb", "depth"))
    pictures = {first["rgb"].tobytes()}
    for style in STYLES:
        for condition in CONDITIONS:
            other = render_street("train", 7, style=style, condition=condition, sensors=("rgb", "depth"))
            np.testing.assert_array_equal(other["label"], first["label"])
            np.testing.assert_array_equal(other["depth"], first["depth"])
            assert other["condition"] == other["caption_facts"]["condition"] == condition
            pictures.add(other["rgb"].tobytes())
    assert len(pictures) == len(STYLES) * len(CONDITIONS)


def test_asking_for_more_sensors_does_not_change_the_picture():
    alone, all_of_them = render_street("val", 3), render_street("val", 3, sensors=MODALITIES)
    np.testing.assert_array_equal(alone["rgb"], all_of_them["rgb"])
    assert set(alone) == {"rgb", "label", "condition", "caption_facts"}


def test_splits_and_indices_never_give_the_same_scene():
    seen = {
        render_street(s, i, size=64, sensors=())["label"].tobytes()
        for s in ("train", "val", "test")
        for i in range(60)
    }
    assert len(seen) == 180


@pytest.mark.parametrize("size", [64, 100, 256, 512])
def test_any_size_shows_the_same_geometry(size):
    small = render_street("train", 11)["label"]
    scene = render_street("train", 11, size=size, sensors=MODALITIES)
    assert scene["rgb"].shape == scene["event"].shape == (size, size, 3) and scene["rgb"].dtype == np.uint8
    assert scene["label"].shape == scene["depth"].shape == scene["infrared"].shape == (size, size)
    index = ((np.arange(128) + 0.5) * size / 128).astype(int)
    assert (scene["label"][np.ix_(index, index)] == small).mean() > 0.93


def test_labels_are_ids_of_the_class_table(labels):
    assert labels.dtype == np.uint8
    assert set(np.unique(labels)) == set(range(len(DELIVER11)))


def test_every_class_is_large_and_frequent_enough_to_be_learnt(labels):
    for number, name in enumerate(DELIVER11.names):
        share = (labels == number).mean(axis=(1, 2))
        assert share.mean() > 0.017, name
        assert (share > 0.004).mean() >= 0.45, name


def test_most_classes_are_missing_from_a_good_part_of_the_scenes(labels):
    for name in ("building", "fence", "person", "pole", "vegetation", "car", "wall", "traffic sign"):
        present = (labels == DELIVER11.names.index(name)).any(axis=(1, 2)).mean()
        assert present < 0.85, name


def test_the_scene_draws_its_condition_with_day_most_often():
    found = [render_street("train", i, size=64, sensors=())["condition"] for i in range(150)]
    assert set(found) == set(CONDITIONS)
    assert 0.28 < found.count("day") / len(found) < 0.52


def test_facts_name_every_countable_class_that_is_visible():
    for i in range(40):
        scene = render_street("val", i, size=64, sensors=())
        facts = scene["caption_facts"]
        assert set(facts) == {"condition", "layout", "attributes", "numbers"}
        assert set(facts["attributes"]) == set(facts["numbers"])
        for name in ("fence", "person", "pole", "car", "wall", "traffic sign"):
            if (scene["label"] == DELIVER11.names.index(name)).any():
                assert facts["numbers"][name] >= 1 and facts["attributes"][name]


def high_frequency(image: np.ndarray) -> float:
    grey = image.astype(np.float32).mean(axis=2)
    return float(
        np.median(
            np.abs(grey[1:-1, 1:-1] * 4 - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, 2:] - grey[1:-1, :-2])
        )
    )


def test_game_is_saturated_and_smooth_where_real_is_dull_and_noisy():
    for i in range(6):
        game, real = (
            render_street("val", i, style=style, condition="day")["rgb"] for style in ("game", "real")
        )
        saturation = [np.ptp(image.astype(int), axis=2).mean() for image in (game, real)]
        assert saturation[0] > 1.2 * saturation[1]
        assert high_frequency(real) > 2 * high_frequency(game)


def test_night_is_dark_but_leaves_every_class_some_light():
    totals, brightness = {name: [] for name in DELIVER11.names}, []
    for i in range(25):
        day, night = (render_street("val", i, condition=condition) for condition in ("day", "night"))
        brightness.append((day["rgb"].mean(), night["rgb"].mean()))
        for number, name in enumerate(DELIVER11.names):
            if (night["label"] == number).sum() > 60:
                totals[name].append(night["rgb"][night["label"] == number].mean())
    by_day, by_night = np.mean(brightness, axis=0)
    assert by_night < 0.6 * by_day
    for name, means in totals.items():
        assert np.mean(means) > (4 if name == "sky" else 15), name


def test_fog_hides_far_surfaces():
    clear, fog = (
        render_street("val", 1, style="game", condition=c, sensors=("rgb", "depth")) for c in ("day", "fog")
    )
    far = (clear["depth"] > 40) & (clear["depth"] < 200)
    near = clear["depth"] < 6
    assert fog["rgb"][far].std() < 0.5 * clear["rgb"][far].std()
    assert fog["rgb"][far].mean() > fog["rgb"][near].mean()


def test_snow_whitens_the_pavement():
    day, snow = (render_street("val", 1, style="game", condition=c) for c in ("day", "snow"))
    ground = np.isin(day["label"], [DELIVER11.names.index("sidewalk"), DELIVER11.names.index("vegetation")])
    saturation = [np.ptp(image["rgb"][ground].astype(int), axis=1).mean() for image in (day, snow)]
    assert saturation[1] < 0.7 * saturation[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"style": "film"},
        {"condition": "hail"},
        {"size": 32},
        {"sensors": ("radar",)},
        {"split": "dev"},
        {"index": -1},
    ],
)
def test_wrong_options_are_refused_with_the_choices(wrong):
    with pytest.raises(ValueError, match=r"(?i)choose|give"):
        render_street(**({"split": "train", "index": 0} | wrong))
