import pytest
import torch

from functional.pseudo_labels import label_quality, pseudo_labels


def test_the_threshold_is_part_of_what_is_trusted():
    confidence = torch.tensor([0.968, 0.9679, 0.99, 0.5]).view(1, 2, 2)
    assert label_quality(confidence, 0.968).tolist() == [0.5]
    assert label_quality(confidence, 0.5).tolist() == [1.0]


def test_each_image_has_its_own_quality_and_every_pixel_an_id():
    probabilities = torch.tensor([[0.98, 0.02], [0.4, 0.6]])  # of two pixels of one image
    logits = torch.stack([probabilities.log().T, probabilities.flip(0, 1).log().T]).unsqueeze(2)
    logits[1] *= 10  # makes the second image sure of both
    ids, quality = pseudo_labels(logits, 0.968)
    assert ids.tolist() == [[[0, 1]], [[0, 1]]]
    assert quality.tolist() == pytest.approx([0.5, 1.0])


def test_half_precision_logits_are_compared_in_float32():
    probability = torch.tensor([0.9685, 0.0315])  # bfloat16 knows 0.96875 and 0.96484
    logits = probability.log().view(1, 2, 1, 1)
    assert pseudo_labels(logits, 0.968)[1] == 1 and pseudo_labels(logits, 0.9686)[1] == 0
    rounded = torch.tensor([3.40625, 0.0], dtype=torch.bfloat16).view(1, 2, 1, 1)  # 0.96790
    assert pseudo_labels(rounded, 0.968)[1] == 0
