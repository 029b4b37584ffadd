"""Learning rates of the papers, step by step."""

import pytest

from lightning_modules.schedules import WarmupPoly, WarmupSteps


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.067),
        (1, 0.101404),
        (10, 0.411044),
        (27, 0.995918),
        (28, 1),
        (8888, 1),
        (8889, 0.1),
        (9629, 0.1),
        (9630, 0.01),
        (9999, 0.01),
    ],
)
def test_madm_warms_up_and_drops_twice(step, expected):
    assert WarmupSteps()(step, 10_000) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 6e-11),
        (49, 1.957657e-6),
        (99, 3.950255e-6),
        (1499, 5.771300e-5),
        (1500, 5.775e-5),
        (1549, 5.76765e-5),
        (39_999, 1.5e-9),
        (40_000, 0.0),
    ],
)
def test_diff_decays_linearly_after_its_warm_up(step, expected):
    assert 6e-5 * WarmupPoly()(step, 40_000) == pytest.approx(expected, rel=2e-6)


def test_the_options_of_the_schedules_change_them():
    assert WarmupSteps(warmup_fraction=0.5, warmup_start=0.2)(25, 100) == pytest.approx(0.6)
    assert WarmupSteps(0.0)(0, 100) == 1
    assert WarmupSteps(0.0, boundaries=[0.5], factor=0.25)(50, 100) == 0.25
    assert WarmupPoly(warmup_steps=4, warmup_start=0.5, power=2)(2, 8) == pytest.approx(0.75 * 0.75**2)
    assert WarmupPoly(warmup_steps=0)(0, 8) == 1
