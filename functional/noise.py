"""Gaussian noise and the noise schedule of diffusion models; random numbers come from named generators."""

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def alpha_bars(beta_start: float, beta_end: float, num_steps: int, schedule: str) -> Tensor:
    """Cumulative products of 1 - beta (alpha-bar) for all steps, [num_steps], float64.

    Args:
        schedule: "scaled_linear" (linear in the square root of beta, as Stable Diffusion) or "linear".

    Raises:
        ValueError: another schedule.
    """
    if schedule == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64) ** 2
    elif schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64)
    else:
        raise ValueError(f"beta_schedule {schedule!r} is not known: use 'scaled_linear' or 'linear'.")
    return torch.cumprod(1 - betas, dim=0)


def add_noise(latent: Tensor, noise: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """Forward diffusion sqrt(alpha_bar) latent + sqrt(1 - alpha_bar) noise (DDPM, arXiv 2006.11239, eq. 4).

    Args:
        latent, noise: [B, C, h, w].
        alpha_bar: in (0, 1], one for all images or [B].

    Returns:
        [B, C, h, w] in float32 at least: in fp16 the noise of step 0 would be 0.03125 instead of 0.02916.
    """
    alpha_bar = torch.as_tensor(alpha_bar, dtype=torch.float64)
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if alpha_bar.ndim:
        signal, sigma = signal.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    dtype = torch.promote_types(latent.dtype, torch.float32)
    # Without non_blocking the host would wait for the device.
    signal, sigma = (weight.to(latent.device, dtype, non_blocking=True) for weight in (signal, sigma))
    return signal * latent.to(dtype) + sigma * noise.to(latent.device, dtype)


def fixed_noise(size: tuple[int, int] = (64, 64), channels: int = 4, seed: int = 42) -> Tensor:
    """MADM's one noise, [1, channels, *size] float32, from a CPU generator: the same on every device."""
    return torch.randn(1, channels, *size, generator=Generator().manual_seed(seed))


def match_noise(noise: Tensor, latent: Tensor) -> Tensor:
    """Noise [1, C, h, w] like the latent [B, C, H, W]: bicubic if the size differs, one for all images."""
    if noise.shape[-2:] != latent.shape[-2:]:
        noise = F.interpolate(noise, size=latent.shape[-2:], mode="bicubic", align_corners=False)
    return noise.to(latent.device, torch.float32).expand(len(latent), -1, -1, -1)


def named_generator(name: str, seed: int = 0) -> Generator:
    """A CPU generator that depends on the name and the seed only, not on what was drawn before or where."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def named_noise(names: Sequence[str], shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Standard normal noise [len(names), *shape]; each image's part depends on its name and the seed only."""
    return torch.stack([torch.randn(shape, generator=named_generator(name, seed)) for name in names])


def dplg_timestep(step: int, low: int, high: int, end_step: int, generator: Generator | None = None) -> int:
    """Timestep of MADM's pseudo-label generation (arXiv 2410.21708): floor(r (1 - step / end_step)), then 0.

    r is drawn uniformly from the integers low..high, both included; None takes torch's global generator.
    The division is one of integers, so that no rounding of 1 - step / end_step can lose a step.
    """
    start = int(torch.randint(low, high + 1, (), generator=generator))
    return max(start * (end_step - step) // end_step, 0)
