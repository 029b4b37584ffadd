"""The papers' mIoU, by hand."""

import math

import pytest
import torch

from lightning_modules.metrics import SWEEP, ConfusionMatrix, ThresholdSweep, matrix_scores

LABEL = torch.tensor([0, 0, 1, 1, 255, 255, 0, 1])
PREDICTION = torch.tensor([0, 2, 1, 0, 3, 2, 0, 1])


def scores(*pairs, num_classes=4):
    matrix = ConfusionMatrix(num_classes)
    for prediction, label in pairs:
        matrix.update(prediction, label)
    return matrix.compute()


def test_a_class_predicted_but_never_true_counts_zero_and_one_seen_only_on_ignored_pixels_is_left_out():
    found = scores((PREDICTION, LABEL))
    assert found["IoU"][:3].tolist() == pytest.approx([50, 200 / 3, 0])
    assert math.isnan(found["IoU"][3])
    assert found["mIoU"].item() == pytest.approx(38.8889, abs=1e-4)
    assert found["aAcc"].item() == pytest.approx(400 / 6)
    assert found["mAcc"].item() == pytest.approx(200 / 3)  # class 2 is never true and has no accuracy


def test_the_frequency_weighted_iou_counts_each_class_by_its_share_of_the_true_pixels():
    found = scores((torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 0, 0, 1, 255])))
    assert found["IoU"][:2].tolist() == pytest.approx([200 / 3, 50]) and found["IoU"][2].isnan()
    assert found["fwIoU"].item() == pytest.approx((3 * 200 / 3 + 50) / 4)


def test_the_score_is_of_the_whole_set_however_it_is_split():
    whole = scores((PREDICTION, LABEL))
    parts = scores((PREDICTION[:3], LABEL[:3]), (PREDICTION[3:], LABEL[3:]))
    torch.testing.assert_close(whole["IoU"], parts["IoU"], equal_nan=True)

    # Two processes: their matrices are added.
    matrices = [ConfusionMatrix(4), ConfusionMatrix(4)]
    matrices[0].update(PREDICTION[:3], LABEL[:3])
    matrices[1].update(PREDICTION[3:], LABEL[3:])
    matrices[0].matrix += matrices[1].matrix
    assert matrices[0].compute()["mIoU"] == whole["mIoU"]


def test_rows_are_true_classes_and_columns_predicted_ones():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([[2, 2]]), torch.tensor([[0, 2]]))
    assert matrix.matrix.tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 1]] and matrix.matrix.dtype == torch.int64


def test_a_label_outside_the_table_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"found ids \[0, 4\] with 4 classes"):
        scores((torch.tensor([0, 1]), torch.tensor([0, 4])))


def test_a_prediction_outside_the_table_is_an_error_and_not_another_class():
    with pytest.raises(ValueError, match=r"A prediction .* found ids \[0, 5\] with 4 classes"):
        scores((torch.tensor([0, 5]), torch.tensor([0, 0])))


def test_a_set_without_valid_pixels_has_no_score():
    found = scores((PREDICTION, torch.full_like(LABEL, 255)))
    assert math.isnan(found["mIoU"]) and math.isnan(found["fwIoU"])


def test_a_class_absent_from_truth_and_prediction_is_skipped_or_counts_zero():
    for num_classes, absent, mean in ((3, "skip", 50), (3, "zero", 50), (4, "skip", 50), (4, "zero", 37.5)):
        matrix = ConfusionMatrix(num_classes, absent)
        matrix.update(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 255]))
        found = matrix.compute()
        assert found["mIoU"].item() == pytest.approx(mean)
        assert found["IoU"][:3].tolist() == pytest.approx([100, 50, 0])
        if num_classes == 4:
            assert found["IoU"][3].item() == pytest.approx(0 if absent == "zero" else math.nan, nan_ok=True)


def test_wrong_and_missed_pixels_are_shares_of_the_union_and_means_over_classes():
    found = scores((torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 255])), num_classes=3)
    assert found["FP"].item() == pytest.approx(100 * (0 + 1 / 2 + 0) / 3)
    assert found["FN"].item() == pytest.approx(100 * (0 + 0 + 1) / 3)


def pixels(count, num_classes=4, seed=0):
    """Scores of which many equal a threshold or are 0 or 1, their classes 1.. and labels with 255."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(0, 201, (count,), generator=generator)
    score = torch.tensor([step / 200 for step in range(201)])[steps]  # 0.300, 0.305, 0.310 ...
    prediction = torch.randint(1, num_classes, (count,), generator=generator)
    label = torch.randint(0, num_classes, (count,), generator=generator)
    label[torch.rand(count, generator=generator) < 0.2] = 255
    return score, prediction, label


def brute_force(score, prediction, label, threshold, num_classes=4):
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for value, winner, true in zip(score, prediction.tolist(), label.tolist(), strict=True):
        if true != 255:
            matrix[true, winner if value > threshold else 0] += 1
    return matrix


def test_the_sweep_has_the_matrix_of_each_threshold_by_brute_force():
    score, prediction, label = pixels(300)
    sweep = ThresholdSweep(4, 0.5)
    sweep.update(score, prediction, label)
    matrices = sweep.matrices()
    assert sweep.thresholds == [step / 100 for step in range(30, 75)] and len(SWEEP) == len(matrices) == 45
    for threshold, matrix in zip(SWEEP, matrices, strict=True):
        assert torch.equal(matrix, brute_force(score, prediction, label, threshold))
    foreground = matrices[:, :, 1:].sum((1, 2))
    assert (foreground.diff() <= 0).all() and foreground[0] > foreground[-1]


@pytest.mark.parametrize("threshold", SWEEP)
def test_a_score_equal_to_a_threshold_is_background(threshold):
    sweep = ThresholdSweep(2, threshold)
    score = torch.tensor([threshold, threshold, threshold + 1e-6])
    sweep.update(score, torch.ones(3, dtype=torch.int64), torch.tensor([0, 1, 1]))
    matrix = sweep.matrices()[sweep.thresholds.index(threshold)]
    assert matrix.tolist() == [[1, 0], [1, 1]]
    assert (score > threshold).tolist() == [False, False, True]  # the rule of label_map


@pytest.mark.parametrize("absent", ["skip", "zero"])
def test_the_sweep_reports_its_own_threshold_and_the_best_one(absent):
    score, prediction, label = pixels(200)
    label[20:] = torch.where(score > 0.52, prediction, 0)[20:]
    sweep = ThresholdSweep(6, 0.6, absent=absent)  # two classes are nowhere
    sweep.update(score, prediction, label)
    found = sweep.compute()
    by_hand = [matrix_scores(brute_force(score, prediction, label, t, 6), absent) for t in SWEEP]
    means = [scores["mIoU"].item() for scores in by_hand]
    own = by_hand[SWEEP.index(0.6)]
    for key in ("mIoU", "aAcc", "FP", "FN", "IoU", "matrix"):
        torch.testing.assert_close(found[key], own[key], equal_nan=True)
    assert found["mIoU_oracle"].item() == pytest.approx(max(means))
    assert found["threshold_oracle"].item() == pytest.approx(0.52) == SWEEP[means.index(max(means))]
    other = {"skip": "zero", "zero": "skip"}[absent]
    assert matrix_scores(own["matrix"], other)["mIoU"].item() != pytest.approx(found["mIoU"].item())


def test_thresholds_are_an_option_and_the_best_is_one_of_them_even_if_the_reported_one_is_better():
    score, prediction = torch.tensor([0.2, 0.5, 0.95, 0.95]), torch.tensor([1, 1, 1, 2])
    label = torch.tensor([0, 1, 1, 2])
    sweep = ThresholdSweep(3, 0.25, thresholds=(0.9, 0.1))
    sweep.update(score, prediction, label)
    found = sweep.compute()
    assert len(sweep.matrices()) == 3 and found["mIoU"].item() == 100
    assert torch.equal(found["matrix"], brute_force(score, prediction, label, 0.25, 3))
    assert found["threshold_oracle"].item() == pytest.approx(0.9)
    assert found["mIoU_oracle"].item() == pytest.approx((50 + 50 + 100) / 3)


def test_the_sweep_of_a_whole_set_is_the_sum_of_its_parts():
    score, prediction, label = pixels(300)
    whole, parts = ThresholdSweep(4, 0.5), [ThresholdSweep(4, 0.5), ThresholdSweep(4, 0.5)]
    whole.update(score.view(3, 100), prediction.view(3, 100), label.view(3, 100))
    for part in (slice(0, 70), slice(70, 120)):  # two batches of one process
        parts[0].update(score[part], prediction[part], label[part])
    parts[1].update(score[120:], prediction[120:], label[120:])
    parts[0].counts += parts[1].counts  # what two processes do
    assert torch.equal(parts[0].matrices(), whole.matrices()) and whole.counts.dtype == torch.int64
    assert parts[0].compute()["mIoU_oracle"] == whole.compute()["mIoU_oracle"]
    whole.reset()
    assert whole.counts.sum() == 0


def test_the_sweep_refuses_ids_outside_the_table():
    sweep, score = ThresholdSweep(3, 0.5), torch.rand(2)
    with pytest.raises(ValueError, match=r"A label .* found ids \[0, 3\] with 3 classes"):
        sweep.update(score, torch.tensor([1, 2]), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"A prediction .* found ids \[1, 3\] with 3 classes"):
        sweep.update(score, torch.tensor([1, 3]), torch.tensor([0, 0]))
