"""Learning rate schedules: the multiplier of the base rate at a step, counted from 0."""

from bisect import bisect_right
from collections.abc import Sequence


class WarmupSteps:
    """Linear warm-up, then constant with sharp drops, all at fractions of the run (MADM).

    Args:
        warmup_fraction: share of the run in which the multiplier climbs.
        warmup_start: multiplier of the first step.
        boundaries: shares of the run at which the multiplier drops.
        factor: what each drop multiplies by.
    """

    def __init__(
        self,
        warmup_fraction: float = 500 / 184375,
        warmup_start: float = 0.067,
        boundaries: Sequence[float] = (0.88888, 0.96296),
        factor: float = 0.1,
    ):
        self.warmup_fraction, self.warmup_start = warmup_fraction, warmup_start
        self.boundaries, self.factor = sorted(boundaries), factor

    def __call__(self, step: int, max_steps: int) -> float:
        done = step / max_steps
        if done <= self.warmup_fraction and self.warmup_fraction > 0:
            return self.warmup_start + (1 - self.warmup_start) * done / self.warmup_fraction
        return self.factor ** bisect_right(self.boundaries, done)


class WarmupPoly:
    """Polynomial decay to zero, times a linear warm-up over the first steps (DIFF).

    Args:
        warmup_steps: steps in which the warm-up factor climbs to 1.
        warmup_start: warm-up factor of the first step.
        power: exponent of the decay.
    """

    def __init__(self, warmup_steps: int = 1500, warmup_start: float = 1e-6, power: float = 1.0):
        self.warmup_steps, self.warmup_start, self.power = warmup_steps, warmup_start, power

    def __call__(self, step: int, max_steps: int) -> float:
        # Lightning asks for the rate of the step after the last one too.
        multiplier = max(1 - step / max_steps, 0.0) ** self.power
        if step < self.warmup_steps:
            multiplier *= 1 - (1 - step / self.warmup_steps) * (1 - self.warmup_start)
        return multiplier
