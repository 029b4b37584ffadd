"""mIoU and FB-IoU of few-shot episodes: sums of pixels by class, by hand."""

import pytest
import torch

from lightning_modules.metrics import FewShotScores


def row(*values: int) -> torch.Tensor:
    return torch.tensor(values)[None, None]  # [1, 1, W]


def test_a_class_is_scored_by_the_sums_of_its_episodes_not_by_their_mean():
    scores = FewShotScores([3])
    # 10 of 20 pixels of the union, then 0 of 60
    prediction, label = torch.zeros(2, 1, 100).long(), torch.zeros(2, 1, 100).long()
    prediction[0, 0, :15], label[0, 0, 5:20] = 1, 1
    prediction[1, 0, :30], label[1, 0, 30:60] = 1, 1
    scores.update(prediction, label, torch.tensor([3, 3]), torch.tensor([0, 1]))
    assert scores.compute()["mIoU"] == pytest.approx(12.5)


def test_fb_iou_is_the_mean_of_object_and_background_over_all_episodes():
    scores = FewShotScores([1])
    scores.update(
        torch.tensor([[[1, 1], [0, 0]]]), torch.tensor([[[1, 0], [0, 0]]]), row(1)[0, 0], row(0)[0, 0]
    )
    found = scores.compute()
    assert found["FB-IoU"] == pytest.approx((100 / 2 + 200 / 3) / 2)
    assert found["matrix"].tolist() == [[2, 1], [0, 1]]


def test_ignored_pixels_do_not_count():
    scores = FewShotScores([1])
    scores.update(row(1, 1, 0), row(1, 255, 0), torch.tensor([1]), torch.tensor([0]))
    assert scores.compute()["mIoU"] == 100 and scores.compute()["FB-IoU"] == 100


def test_the_mean_is_over_classes_and_a_class_that_was_never_drawn_is_told_and_left_out():
    scores = FewShotScores([1, 2, 7])
    scores.update(row(1, 0), row(1, 0), torch.tensor([1]), torch.tensor([0]))
    scores.update(row(1, 1), row(1, 0), torch.tensor([2]), torch.tensor([1]))
    with pytest.warns(UserWarning, match=r"\[7\]"):
        found = scores.compute()
    assert found["mIoU"] == 75 and found["IoU"].isnan().tolist() == [False, False, True]


def test_a_class_that_was_drawn_and_has_no_pixel_counts_as_0():
    scores = FewShotScores([1, 2])
    scores.update(row(1, 0), row(1, 0), torch.tensor([1]), torch.tensor([0]))
    scores.update(row(0, 0), row(0, 255), torch.tensor([2]), torch.tensor([1]))
    assert scores.compute()["mIoU"] == 50


def test_episodes_come_in_the_order_of_their_numbers():
    scores = FewShotScores([4])
    scores.update(row(1, 0), row(1, 1), torch.tensor([4]), torch.tensor([5]))
    scores.update(row(0, 1), row(0, 0), torch.tensor([4]), torch.tensor([2]))
    assert scores.compute()["episodes"].tolist() == [[2, 4, 1, 1, 0, 0], [5, 4, 0, 0, 1, 1]]


def test_an_episode_of_a_class_that_is_not_scored_is_refused():
    with pytest.raises(ValueError, match=r"ids \[9\].*known are \[4\]"):
        FewShotScores([4]).update(row(0), row(0), torch.tensor([9]), torch.tensor([0]))
