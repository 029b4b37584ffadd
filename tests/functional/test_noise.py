import pytest
import torch

from functional.noise import (
    add_noise,
    alpha_bars,
    dplg_timestep,
    fixed_noise,
    match_noise,
    named_generator,
    named_noise,
)

ALPHA_BARS = alpha_bars(0.00085, 0.012, 1000, "scaled_linear")


def test_alpha_bars_are_those_of_stable_diffusion():
    expected = {
        0: 0.99915000,
        1: 0.99829603,
        11: 0.98953755,
        20: 0.98131436,
        91: 0.90524496,
        105: 0.88797250,
        139: 0.84314022,
        160: 0.81355040,
    }
    assert ALPHA_BARS.dtype == torch.float64
    for step, value in expected.items():
        assert float(ALPHA_BARS[step]) == pytest.approx(value, abs=5e-9)
    for step, value in {50: 0.951577, 100: 0.894223, 150: 0.827812, 200: 0.753692, 500: 0.276333}.items():
        assert float(ALPHA_BARS[step]) == pytest.approx(value, abs=5e-7)


def test_the_linear_schedule_differs_and_an_unknown_one_is_refused():
    assert float(alpha_bars(0.1, 0.3, 2, "linear")[1]) == pytest.approx(0.9 * 0.7)
    with pytest.raises(ValueError, match="cosine"):
        alpha_bars(0.1, 0.3, 2, "cosine")


def test_noise_at_step_0_and_100_has_the_published_weights():
    latent, noise = torch.randn(2, 1, 4, 8, 8)
    expected = 0.999575 * latent + 0.029155 * noise
    torch.testing.assert_close(add_noise(latent, noise, ALPHA_BARS[0]), expected, atol=3e-6, rtol=0)
    one = torch.ones(1, 4, 8, 8)
    torch.testing.assert_close(add_noise(one, one, ALPHA_BARS[100]), 1.27086 * one, rtol=1e-5, atol=0)


def test_noise_is_added_in_float32_to_half_precision_latents_and_per_image():
    latent = torch.zeros(2, 4, 8, 8, dtype=torch.float16)
    noised = add_noise(latent, torch.ones(2, 4, 8, 8), ALPHA_BARS[torch.tensor([0, 100])])
    assert noised.dtype == torch.float32
    assert float(noised[0, 0, 0, 0]) == pytest.approx(0.029155, abs=1e-6)
    assert float(noised[1, 0, 0, 0]) == pytest.approx(0.32523, abs=1e-5)


def test_the_fixed_noise_has_its_published_first_values():
    first = fixed_noise().flatten()[:6]
    expected = torch.tensor([1.9269, 1.4873, 0.9007, -2.1055, 0.6784, -1.2345])
    torch.testing.assert_close(first, expected, atol=5e-5, rtol=0)
    assert fixed_noise().shape == (1, 4, 64, 64)
    assert not torch.equal(fixed_noise(seed=43), fixed_noise())
    torch.randn(5)
    assert torch.equal(fixed_noise(), fixed_noise())  # whatever the global generator did


def test_the_fixed_noise_is_resized_only_to_another_size():
    noise = fixed_noise((8, 8))
    same = match_noise(noise, torch.zeros(3, 4, 8, 8))
    assert all(torch.equal(image, noise[0]) for image in same)
    other = match_noise(noise, torch.zeros(2, 4, 16, 4))
    expected = torch.nn.functional.interpolate(noise, (16, 4), mode="bicubic")
    assert torch.equal(other[1:], expected)


def test_named_noise_does_not_depend_on_order_or_company():
    both = named_noise(["a.png", "b.png"], (4, 8, 8), seed=1)
    torch.randn(3)
    assert torch.equal(named_noise(["b.png"], (4, 8, 8), seed=1)[0], both[1])
    assert torch.equal(named_noise(["b.png", "a.png"], (4, 8, 8), seed=1).flip(0), both)
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(named_noise(["a.png"], (4, 8, 8), seed=2)[0], both[0])


@pytest.mark.parametrize(
    ("low", "end_step", "table"),
    [
        (60, 5000, {0: (60, 61), 1: (59, 60), 1000: (48, 48), 2500: (30, 30), 4916: (1, 1), 4918: (0, 1)}),
        (50, 8000, {0: (50, 51), 1: (49, 50), 1000: (43, 44), 4000: (25, 25), 7843: (0, 1)}),
    ],
)
def test_the_pseudo_label_timestep_follows_the_published_table(low, end_step, table):
    for step, values in table.items():
        assert tuple(dplg_timestep(step, r, r, end_step) for r in (low, low + 1)) == values
    first_zero = {5000: 4919, 8000: 7844}[end_step]
    assert dplg_timestep(first_zero, low + 1, low + 1, end_step) == 0
    steps = [dplg_timestep(step, low, low, end_step) for step in range(end_step + 100)]
    assert steps == sorted(steps, reverse=True)
    assert set(steps[end_step:]) == {0}


def test_the_start_of_the_pseudo_label_timestep_is_each_integer_of_its_range_and_no_other():
    generator = named_generator("dplg")
    assert {dplg_timestep(0, 60, 61, 5000, generator) for _ in range(100)} == {60, 61}
    assert {dplg_timestep(0, 3, 6, 5000, generator) for _ in range(200)} == {3, 4, 5, 6}
