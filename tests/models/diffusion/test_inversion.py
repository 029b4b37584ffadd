import pytest
import torch

from functional.noise import alpha_bars
from models.diffusion.inversion import (
    PATHS,
    ddim_step,
    follow,
    step_coefficients,
    stochastic_step,
    window_eta,
)

ALPHA_BARS = alpha_bars(0.00085, 0.012, 1000, "scaled_linear")


def test_inverting_then_denoising_with_the_same_noise_returns_the_latent():
    x, noise = torch.randn(2, 2, 4, 8, 8)
    alpha_t, alpha_s = torch.tensor(0.5), torch.tensor(0.9)
    torch.testing.assert_close(ddim_step(ddim_step(x, noise, alpha_t, alpha_s), noise, alpha_s, alpha_t), x)


def test_the_paths_have_the_published_steps_and_saved_times():
    assert PATHS[37].sources == (
        *range(23),
        *(23, 26, 30, 34, 40, 45, 52, 60, 69, 80, 91, 105, 121, 139),
    )
    assert PATHS[37].saved_times == (91, 52, 30, 22, 18, 14, 11, 7, 3)
    assert PATHS[5].saved_times == (60, 40, 20, 1, 0)
    assert PATHS[1].saved_times == (0,)
    for steps, path in PATHS.items():
        assert len(path.sources) == len(path.targets) == steps
        assert path.targets[:-1] == path.sources[1:]


@pytest.mark.parametrize(
    ("t", "s", "c1", "c2"),
    [
        (11, 12, 0.031386, 0.101858),
        (22, 23, 0.031708, 0.143154),
        (23, 26, 0.057419, 0.145087),
        (91, 105, 0.150195, 0.299114),
        (139, 160, 0.204243, 0.380440),
        (20, 40, 0.200957, 1e-5),  # the clamp: c1^2 alone exceeds 1 - alpha_s
        (40, 60, 0.184081, 0.158870),
        (60, 80, 0.182049, 0.220344),
    ],
)
def test_the_weights_of_fresh_and_predicted_noise_are_the_published_ones(t, s, c1, c2):
    found = step_coefficients(ALPHA_BARS[t], ALPHA_BARS[s], eta=1.0)
    assert [float(c) for c in found] == pytest.approx([c1, c2], abs=6e-7)
    if c2 > 1e-5:
        assert float(found[0] ** 2 + found[1] ** 2) == pytest.approx(float(1 - ALPHA_BARS[s]), abs=1e-12)


def test_without_eta_the_stochastic_step_is_the_ddim_step():
    x, noise, fresh = torch.randn(3, 1, 4, 8, 8, dtype=torch.float64)
    c1, c2 = step_coefficients(ALPHA_BARS[11], ALPHA_BARS[12], eta=0.0)
    assert float(c1) == 0 and float(c2) == pytest.approx(float((1 - ALPHA_BARS[12]).sqrt()))
    deterministic = ddim_step(x, noise, ALPHA_BARS[11], ALPHA_BARS[12])
    torch.testing.assert_close(
        stochastic_step(x, noise, ALPHA_BARS[11], ALPHA_BARS[12], 0.0, fresh), deterministic
    )
    assert not torch.allclose(
        stochastic_step(x, noise, ALPHA_BARS[11], ALPHA_BARS[12], 1.0, fresh), deterministic
    )


def test_fresh_noise_enters_strictly_between_10_and_250():
    assert [window_eta(t) for t in (0, 10, 11, 249, 250)] == [0, 0, 1, 1, 0]
    assert window_eta(100, eta=0.5) == 0.5


def test_a_unet_of_zeros_scales_the_latent_by_the_published_factors():
    latent = torch.randn(1, 4, 8, 8)
    latents = follow(latent, (0, *PATHS[37].targets), ALPHA_BARS, lambda z, t: torch.zeros_like(z))
    assert len(latents) == 37
    torch.testing.assert_close(latents[-1], 0.9023539 * latent, rtol=1e-6, atol=0)
    torch.testing.assert_close(latents[33], 0.9427237 * latent, rtol=1e-6, atol=0)


def test_an_inverted_latent_is_denoised_to_the_start_along_the_reversed_timesteps():
    latent = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    steps = (0, *PATHS[5].targets)
    noise = torch.randn_like(latent)
    inverted = follow(latent, steps, ALPHA_BARS, lambda z, t: noise)[-1]
    restored = follow(inverted, steps[::-1], ALPHA_BARS, lambda z, t: noise)[-1]
    torch.testing.assert_close(restored, latent)
