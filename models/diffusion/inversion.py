"""Moving latents along a diffusion's timesteps, both ways, without and with fresh noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor


def ddim_step(x_t: Tensor, noise: Tensor, alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
    """Move a latent from step t to step s without fresh noise (arXiv 2010.02502, eq. 12 with sigma = 0).

    s < t denoises and s > t inverts; the formula is the same, so there is one function.

    Args:
        x_t: latent at step t, [B, C, h, w], scaled by the VAE's scaling factor.
        noise: noise that the U-Net predicts in x_t (epsilon in the paper), same shape.
        alpha_t, alpha_s: cumulative products of 1 - beta (alpha-bar in most papers), scalars in (0, 1].

    Returns:
        Latent at step s, same shape.
    """
    x_0 = (x_t - (1 - alpha_t).sqrt() * noise) / alpha_t.sqrt()
    return alpha_s.sqrt() * x_0 + (1 - alpha_s).sqrt() * noise


def step_coefficients(alpha_t: Tensor, alpha_s: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Weights (c1, c2) of the fresh and of the predicted noise in DIFF's step t -> s > t (arXiv 2406.00777).

    c1^2 + c2^2 = 1 - alpha_s, unless c1 alone exceeds it: c2 is then clamped to 1e-5.
    """
    c1 = eta * ((1 - alpha_s / alpha_t) * (1 - alpha_s) / (1 - alpha_t)).sqrt()
    return c1, (1 - alpha_s - c1**2).clamp(min=1e-10).sqrt()


def stochastic_step(
    x_t: Tensor, noise: Tensor, alpha_t: Tensor, alpha_s: Tensor, eta: float, fresh: Tensor | None = None
) -> Tensor:
    """DIFF's step t -> s: as ddim_step, but with c1 parts of `fresh` noise; eta 0 needs none."""
    c1, c2 = step_coefficients(alpha_t, alpha_s, eta)
    x_0 = (x_t - (1 - alpha_t).sqrt() * noise) / alpha_t.sqrt()
    x_s = alpha_s.sqrt() * x_0 + c2 * noise
    return x_s + c1 * fresh if eta else x_s


def window_eta(timestep: int, eta: float = 1.0) -> float:
    """DIFF's eta: fresh noise only where 10 < timestep < 250, the source of the step."""
    return eta if 10 < timestep < 250 else 0.0


@dataclass(frozen=True)
class InversionPath:
    """Timesteps of an inversion: step i evaluates the U-Net at sources[i] and moves the latent to targets[i].

    saved: indices of the steps whose features are kept, in the order of concatenation.
    """

    targets: tuple[int, ...]
    saved: tuple[int, ...]

    def __post_init__(self):
        steps = (0, *self.targets)
        ascending = all(a < b for a, b in pairwise(steps))
        places = set(self.saved)
        if (
            not ascending
            or len(places) < len(self.saved)
            or not places
            or not places <= set(range(len(steps) - 1))
        ):
            raise ValueError(
                f"A path needs ascending targets above 0, and saved steps that are different positions among "
                f"them: found targets {list(self.targets)}, saved {list(self.saved)}."
            )

    @property
    def sources(self) -> tuple[int, ...]:
        return (0, *self.targets[:-1])

    @property
    def saved_times(self) -> tuple[int, ...]:
        return tuple(self.sources[i] for i in self.saved)


# DIFF's three paths by their number of steps.
PATHS = {
    37: InversionPath(
        targets=(*range(1, 24), 26, 30, 34, 40, 45, 52, 60, 69, 80, 91, 105, 121, 139, 160),
        saved=(33, 29, 25, 22, 18, 14, 11, 7, 3),
    ),
    5: InversionPath(targets=(1, 20, 40, 60, 80), saved=(4, 3, 2, 1, 0)),
    1: InversionPath(targets=(100,), saved=(0,)),
}


def follow(
    latent: Tensor,
    timesteps: Sequence[int],
    alpha_bars: Tensor,
    predict_noise: Callable[[Tensor, int], Tensor],
) -> list[Tensor]:
    """Move a latent along timesteps without fresh noise: ascending ones invert, descending ones denoise.

    Args:
        latent: at timesteps[0], [B, C, h, w].
        alpha_bars: of the whole schedule, [steps], on the CPU.
        predict_noise: (latent, timestep) -> noise in it.

    Returns:
        The latents at timesteps[1], timesteps[2], ...
    """
    latents = []
    for t, s in pairwise(timesteps):
        # Scalars on the CPU keep their float64 and cost no synchronisation.
        latent = ddim_step(latent, predict_noise(latent, t), alpha_bars[t], alpha_bars[s])
        latents.append(latent)
    return latents
