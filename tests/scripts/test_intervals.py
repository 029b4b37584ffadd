import numpy as np
import pytest

from scripts.mini_diffusion.intervals import bootstrap


def test_the_interval_of_a_mean_is_that_of_the_normal_law():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = bootstrap(values)
    assert found["mean"] == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.03)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.03)


def test_measurements_of_one_scene_are_drawn_together():
    values = np.repeat(np.random.default_rng(0).normal(size=50), 8)
    alone, together = bootstrap(values), bootstrap(values, np.repeat(np.arange(50), 8))
    assert together["high"] - together["low"] > 2 * (alone["high"] - alone["low"])
    assert together["mean"] == pytest.approx(alone["mean"])


def test_the_statistic_is_taken_of_the_means():
    values = np.stack([np.full(10, 3.0), np.full(10, 4.0)], 1)
    found = bootstrap(values, statistic=lambda mean: 1 - mean[..., 0] / mean[..., 1])
    assert found == pytest.approx({"mean": 0.25, "low": 0.25, "high": 0.25})
