"""The papers' mIoU, by hand."""

import math

import pytest
import torch

from lightning_modules.metrics import ConfusionMatrix

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
