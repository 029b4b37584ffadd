import colorsys

import numpy as np
import pytest
import torch

from functional.class_mix import (
    augment,
    blend,
    blur_kernel,
    gaussian_blur,
    jitter_and_blur,
    mix_mask,
    mixed_weights,
    paste,
    shift_hue,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def stripes(*values):
    return torch.tensor(values).repeat_interleave(3).expand(1, 4, -1)


@pytest.mark.parametrize(
    ("values", "chosen"), [((0, 1, 2, 255), 2), ((0, 1, 4, 7, 255), 3), ((3, 8), 1), ((6,), 1), ((255,), 1)]
)
def test_half_of_the_values_are_pasted_rounded_up_with_ignored_pixels_as_one_of_them(values, chosen):
    label, seen = stripes(*values), set()
    for seed in range(60):
        mask = mix_mask(label, generator(seed))
        pasted = {value for value in values if mask[label == value].all()}
        assert mask.dtype == torch.bool and len(pasted) == chosen
        assert not any(mask[label == value].any() for value in values if value not in pasted)
        seen |= pasted
    assert seen == set(values)


def test_each_choice_is_as_likely_as_any_other():
    label, draws = stripes(0, 1, 2, 255).expand(2000, -1, -1), generator()
    pasted = mix_mask(label, draws)[:, 0, ::3]
    assert pasted.float().mean(0).tolist() == pytest.approx([0.5] * 4, abs=0.05)
    pairs, counts = pasted.int().unique(dim=0, return_counts=True)
    assert len(pairs) == 6 and counts.min() > 250


def test_each_image_draws_from_its_own_classes():
    label = torch.cat([stripes(0, 1), stripes(2, 2)])
    both = mix_mask(label, generator())
    assert both[0].float().mean() == 0.5 and both[1].all()
    assert torch.equal(mix_mask(label[:1], generator()), both[:1])
    draws = generator()
    masks = [mix_mask(stripes(*range(8)), draws) for _ in range(2)]
    assert not torch.equal(*masks)


def test_pasting_takes_image_label_and_weight_from_the_source_where_the_mask_is_set():
    source, pseudo = stripes(0, 1, 2, 255), torch.full((1, 4, 12), 7)
    mask = mix_mask(source, generator())
    label = paste(mask, source, pseudo)
    assert torch.equal(label[mask], source[mask]) and (label[~mask] == 7).all()
    images = torch.rand(2, 1, 3, 4, 12, generator=generator())
    mixed = paste(mask, *images)
    for channel in range(3):
        assert torch.equal(mixed[:, channel][mask], images[0][:, channel][mask])
        assert torch.equal(mixed[:, channel][~mask], images[1][:, channel][~mask])
    weight = mixed_weights(mask, torch.tensor([0.25]))
    assert (weight[mask] == 1).all() and (weight[~mask] == 0.25).all()
    two = mixed_weights(torch.zeros(2, 1, 1, dtype=torch.bool), torch.tensor([0.25, 0.5]))
    assert two.flatten().tolist() == [0.25, 0.5]


def test_brightness_contrast_and_saturation_move_away_from_black_mean_grey_and_grey():
    image = torch.tensor([[[0.2, 0.4]], [[0.6, 0.4]], [[0.5, 0.4]]])
    grey = 0.2989 * 0.2 + 0.587 * 0.6 + 0.114 * 0.5
    mean = (grey + 0.9999 * 0.4) / 2
    torch.testing.assert_close(blend(image, 0, 1.2), 1.2 * image)
    torch.testing.assert_close(blend(image, 1, 0.8), 0.8 * image + 0.2 * mean)
    saturated = blend(image, 2, 1.2)
    torch.testing.assert_close(saturated[:, 0, 0], 1.2 * image[:, 0, 0] - 0.2 * grey)
    torch.testing.assert_close(saturated[:, 0, 1], image[:, 0, 1], atol=1e-4, rtol=0)
    assert blend(torch.ones(3, 1, 1), 0, 1.2).max() == 1


@pytest.mark.parametrize("turn", [-0.2, 0.0, 0.07, 0.2])
def test_the_hue_turns_as_in_hsv(turn):
    image = torch.rand(3, 4, 5, generator=generator())
    image[:, 0] = torch.tensor(
        [[0.3, 0.3, 0.7, 0.1, 1.0], [0.3, 0.7, 0.7, 0.1, 0.0], [0.3, 0.7, 0.3, 0.9, 0.0]]
    )
    expected = torch.empty_like(image)
    for row in range(4):
        for column in range(5):
            hue, saturation, value = colorsys.rgb_to_hsv(*image[:, row, column].tolist())
            rgb = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
            expected[:, row, column] = torch.tensor(rgb)
    torch.testing.assert_close(shift_hue(image, turn), expected, atol=1e-5, rtol=0)


def test_the_kernel_has_the_published_size_along_each_axis():
    assert [blur_kernel(size) for size in (256, 512, 640, 768)] == [25, 51, 63, 77]
    assert all(blur_kernel(size) % 2 == 1 and blur_kernel(size) // 2 < size for size in range(1, 200))


def test_the_blur_is_a_gaussian_with_reflected_borders():
    image = torch.rand(3, 40, 64, generator=generator())
    expected = image.double().numpy()
    for axis, radius in ((1, 1), (2, 3)):  # kernels of 3 and 7
        weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / 0.9) ** 2)
        width = [(0, 0), (0, 0), (0, 0)]
        width[axis] = (radius, radius)
        padded = np.pad(expected, width, mode="reflect")
        expected = np.apply_along_axis(np.convolve, axis, padded, weights / weights.sum(), mode="valid")
    torch.testing.assert_close(gaussian_blur(image, 0.9), torch.from_numpy(expected).float())


def test_augmentation_is_drawn_for_each_image_and_keeps_the_range():
    images = torch.rand(64, 3, 40, 48, generator=generator()).round(decimals=1)
    augmented = jitter_and_blur(images, generator(1))
    assert augmented.shape == images.shape and augmented.min() >= 0 and augmented.max() <= 1
    assert torch.equal(jitter_and_blur(images, generator(1)), augmented)
    draws = generator(1)
    assert torch.equal(torch.stack([augment(image, draws) for image in images]), augmented)
    changed = (augmented - images).abs().flatten(1).amax(1) > 0
    assert changed.float().mean().item() == pytest.approx(1 - 0.2 * 0.5, abs=0.1)


def test_jitter_has_probability_0_8_and_blur_0_5(monkeypatch):
    counts = {"blend": 0, "shift_hue": 0, "gaussian_blur": 0}
    sigmas, factors, orders = [], [], []

    def count(name, values):
        def counted(image, *arguments):
            counts[name] += 1
            values.append(arguments[-1])
            orders.append(arguments[0] if name == "blend" else name)
            return image

        return counted

    turns = []
    for name, values in (("blend", factors), ("shift_hue", turns), ("gaussian_blur", sigmas)):
        monkeypatch.setattr(f"functional.class_mix.{name}", count(name, values))
    jitter_and_blur(torch.zeros(2000, 3, 1, 1), generator())
    assert counts["blend"] == 3 * counts["shift_hue"]
    assert counts["shift_hue"] / 2000 == pytest.approx(0.8, abs=0.03)
    assert counts["gaussian_blur"] / 2000 == pytest.approx(0.5, abs=0.03)
    for values, low, high in ((factors, 0.8, 1.2), (turns, -0.2, 0.2), (sigmas, 0.15, 1.15)):
        assert min(values) == pytest.approx(low, abs=0.01) and max(values) == pytest.approx(high, abs=0.01)
    steps = [step for step in orders if step != "gaussian_blur"]
    assert len({tuple(steps[i : i + 4]) for i in range(0, len(steps), 4)}) == 24


def test_mixed_precision_does_not_round_the_image():
    image = torch.rand(8, 3, 40, 40, generator=generator())
    expected = jitter_and_blur(image, generator(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(jitter_and_blur(image, generator(1)), expected)


@pytest.mark.cuda
def test_mixing_does_not_wait_for_the_device_and_draws_the_same_there():
    label, image = stripes(0, 1, 2, 255), torch.rand(1, 3, 4, 12, generator=generator())
    on_device = label.cuda(), image.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask = mix_mask(on_device[0], generator())
        augmented = jitter_and_blur(on_device[1], generator(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(mask.cpu(), mix_mask(label, generator()))
    # cuDNN's convolutions may use TF32, with 10 bits of mantissa.
    torch.testing.assert_close(augmented.cpu(), jitter_and_blur(image, generator(1)), atol=1e-3, rtol=0)
