import pytest
import torch

from functional.losses import latent_regression, pixel_cross_entropy, regression_mask, weighted_cross_entropy


def test_ignored_pixels_neither_count_nor_dilute():
    logits = torch.randn(1, 3, 2, 2)
    label = torch.tensor([[[0, 255], [2, 255]]])
    log = logits.log_softmax(1)
    expected = -(log[0, 0, 0, 0] + log[0, 2, 1, 0]) / 2
    torch.testing.assert_close(pixel_cross_entropy(logits, label), expected)


def test_a_label_without_a_valid_pixel_gives_zero_loss_and_zero_gradients():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = pixel_cross_entropy(logits, torch.full((1, 2, 2), 255))
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def test_logits_of_half_precision_are_added_up_in_float32():
    logits, label = torch.randn(1, 3, 64, 64).bfloat16(), torch.randint(3, (1, 64, 64))
    loss = pixel_cross_entropy(logits, label)
    torch.testing.assert_close(loss, pixel_cross_entropy(logits.float(), label))


def test_the_cross_entropy_is_divided_by_all_pixels_ignored_ones_included():
    one = float(torch.tensor(torch.e - 1).log())  # logits (0, log(e - 1)) cost 1 for class 0
    logits = torch.tensor([0.0, one]).view(1, 2, 1, 1).expand(1, 2, 4, 4).clone().requires_grad_(True)
    label = torch.zeros(1, 4, 4, dtype=torch.long)
    assert weighted_cross_entropy(logits, label).item() == pytest.approx(1)
    label[:, 2:] = 255
    loss = weighted_cross_entropy(logits, label)
    assert loss.item() == pytest.approx(0.5)
    loss.backward()
    assert logits.grad[:, :, 2:].abs().max() == 0 and logits.grad[:, :, :2].abs().min() > 0
    weight = torch.full((1, 4, 4), 0.25)
    weight[:, 0] = 1
    assert weighted_cross_entropy(logits, label, weight).item() == pytest.approx((4 + 4 * 0.25) / 16)


def test_a_label_without_valid_pixels_costs_nothing():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = weighted_cross_entropy(logits, torch.full((1, 2, 2), 255))
    loss.backward()
    assert loss == 0 and logits.grad.abs().max() == 0


def test_the_regression_is_divided_by_all_elements_of_the_latent():
    mask = torch.zeros(1, 512, 512)
    mask[:, :256, :256] = 1
    latent = torch.full((1, 4, 64, 64), 3.0)
    assert latent_regression(latent, torch.ones_like(latent), mask, factor=8).item() == 0.5
    assert latent_regression(-latent, -torch.ones_like(latent), mask, factor=8).item() == 0.5


@pytest.mark.parametrize(("shift", "expected"), [(0, 1.0), (1, 0.0)])
def test_a_cell_takes_the_mask_of_its_first_pixel(shift, expected):
    mask = torch.zeros(1, 512, 512)
    mask[:, shift::8, shift::8] = 1
    latent = torch.ones(1, 4, 64, 64)
    assert latent_regression(latent, torch.zeros_like(latent), mask, factor=8).item() == expected


def test_cells_beyond_the_image_cost_nothing():
    latent = torch.ones(1, 4, 8, 8, requires_grad=True)
    loss = latent_regression(latent, torch.zeros_like(latent), torch.ones(1, 17, 32), factor=4)
    assert loss.item() == pytest.approx(5 / 8)
    loss.backward()
    assert (latent.grad[:, :, :5] > 0).all() and (latent.grad[:, :, 5:] == 0).all()


def test_the_mask_of_the_regression_has_the_quality_everywhere_but_on_ignored_pixels():
    label = torch.tensor([[[0, 3], [255, 7]], [[1, 1], [1, 255]]])
    assert regression_mask(label).tolist() == [[[1, 1], [0, 1]], [[1, 1], [1, 0]]]
    weights = regression_mask(label, torch.tensor([0.25, 0.5]))
    assert weights.tolist() == [[[0.25, 0.25], [0, 0.25]], [[0.5, 0.5], [0.5, 0]]]


def test_half_precision_latents_are_compared_in_float32():
    latent, target = torch.full((1, 4, 2, 2), 100.0, dtype=torch.bfloat16), torch.full((1, 4, 2, 2), 100.25)
    assert latent_regression(latent, target, torch.ones(1, 8, 8), factor=4).item() == 0.25
