"""95 % intervals of what is averaged over scenes."""

from collections.abc import Callable

import numpy as np

Interval = dict[str, float]  # "mean", "low" and "high"


def bootstrap(
    values: np.ndarray,
    scenes: np.ndarray | None = None,
    statistic: Callable[[np.ndarray], np.ndarray] = lambda mean: mean,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of a statistic of means, by drawing whole scenes with replacement (percentiles 2.5 and 97.5).

    Args:
        values: one row for each measurement, [N] or [N, K].
        scenes: number of the scene of each row, [N]; None: each row is a scene of its own.
        statistic: of the mean over the rows, [K] or a scalar; its last axis is K.
    """
    values = np.asarray(values, dtype=np.float64)
    scenes = np.arange(len(values)) if scenes is None else np.asarray(scenes)
    groups, place = np.unique(scenes, return_inverse=True)
    sums = np.zeros((len(groups), *values.shape[1:]))
    np.add.at(sums, place, values)
    counts = np.bincount(place).astype(np.float64)
    drawn = np.random.default_rng(seed).integers(len(groups), size=(resamples, len(groups)))
    total = counts[drawn].sum(1).reshape(-1, *[1] * (values.ndim - 1))
    low, high = np.percentile(statistic(sums[drawn].sum(1) / total), (2.5, 97.5))
    return {"mean": float(statistic(values.mean(0))), "low": float(low), "high": float(high)}
