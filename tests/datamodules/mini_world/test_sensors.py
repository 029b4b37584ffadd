"""Depth, infrared and event pictures of the street scenes."""

import numpy as np
import pytest

from datamodules.mini_world.street import CONDITIONS, render_street
from functional.classes import DELIVER11

SKY, PERSON, ROAD = (DELIVER11.names.index(name) for name in ("sky", "person", "road"))


def test_depth_is_200_in_the_sky_and_nowhere_else():
    for i in range(20):
        scene = render_street("val", i, sensors=("depth",))
        np.testing.assert_array_equal(scene["depth"] == 200, scene["label"] == SKY)
        assert scene["depth"].min() > 0.4 and scene["depth"].dtype == np.float32


def test_ground_gets_farther_towards_the_horizon():
    for i in range(20):
        scene = render_street("val", i, sensors=("depth",))
        for column in range(0, 128, 9):
            road = scene["depth"][:, column][scene["label"][:, column] == ROAD]
            assert (np.diff(road) <= 1e-3).all()  # rows run from the horizon down


def test_road_depth_follows_the_pinhole_camera():
    scene = render_street("train", 4, sensors=("depth",))
    rows, columns = np.nonzero((scene["label"] == ROAD) & (scene["depth"] < 20))
    slope, intercept = np.polyfit(rows, 1 / scene["depth"][rows, columns], 1)
    np.testing.assert_allclose(slope * rows + intercept, 1 / scene["depth"][rows, columns], atol=1e-4)


@pytest.mark.parametrize("condition", [name for name in CONDITIONS if name != "day"])  # sun heats asphalt too
def test_persons_are_warmer_than_what_surrounds_them(condition):
    found = 0
    for i in range(25):
        scene = render_street("val", i, condition=condition, sensors=("infrared",))
        person = scene["label"] == PERSON
        if person.sum() > 100:
            around = ~person & (scene["label"] != DELIVER11.names.index("car"))
            found += 1
            assert scene["infrared"][person].mean() > np.percentile(scene["infrared"][around], 90)
    assert found > 5


def test_sensors_do_not_depend_on_the_style():
    first, second = (
        render_street("val", 8, style=style, sensors=("depth", "infrared", "event"))
        for style in ("game", "real")
    )
    for name in ("depth", "infrared", "event"):
        np.testing.assert_array_equal(first[name], second[name])


def test_infrared_keeps_its_brightness_at_night_where_colour_loses_it():
    ratios = []
    for i in range(15):
        day, night = (
            render_street("val", i, condition=c, sensors=("rgb", "infrared")) for c in ("day", "night")
        )
        ratios.append([night[name].mean() / day[name].mean() for name in ("rgb", "infrared")])
    rgb, infrared = np.mean(ratios, axis=0)
    assert rgb < 0.6 < infrared


def test_events_fire_at_edges_and_do_not_flood_the_picture():
    shares, interior = [], []
    for i in range(40):
        scene = render_street("val", i, sensors=("event",))
        fired = (scene["event"] < 255).any(axis=2)
        shares.append(fired.mean())
        road = (scene["label"] == ROAD)[96:]  # near the camera, where texture moves most
        if road.any():
            interior.append(fired[96:][road].mean())
    assert max(shares) < 0.25
    assert 0.02 < np.mean(shares) < 0.15
    assert np.mean(interior) < 0.1


def test_events_carry_both_polarities_and_leave_the_rest_white():
    event = render_street("val", 1, condition="day", sensors=("event",))["event"].reshape(-1, 3).astype(int)
    fired = event[(event < 255).any(axis=1)]
    assert ((fired[:, 0] == 255) ^ (fired[:, 2] == 255)).all()
    assert (fired[:, 0] == 255).any() and (fired[:, 2] == 255).any()
    assert (event == 255).all(axis=1).mean() > 0.7
