import pytest
import torch
from safetensors.torch import load_file, save_file

from models.support_filters import ClipScore, SegmenterAgreement
from tests.tiny_difffss import tiny_generator, write_tiny_clip, write_tiny_models


@pytest.fixture(scope="module")
def image():
    return torch.rand(3, 32, 64, generator=torch.Generator().manual_seed(0))


def test_agreement_is_the_iou_of_the_mask_with_the_segmenter_s(tmp_path, image, monkeypatch):
    write_tiny_models(tmp_path)
    score = SegmenterAgreement(tiny_generator(tmp_path).diffusion)
    found = torch.zeros(1, 32, 64)
    found[:, :16, :32] = 0.6
    found[:, 16:] = 0.5  # not above the level
    assert 0 <= score(image, found[0] > 0.55, "plane") <= 1
    calls = []
    monkeypatch.setattr(
        "models.support_filters.DiffSegmenter.score_maps", lambda self, *args: calls.append(args) or found
    )
    mask = torch.zeros(32, 64, dtype=torch.bool)
    assert score(image, mask, "plane") == 0
    mask[:16, 16:48] = True
    assert score(image, mask, "plane") == pytest.approx(1 / 3)
    assert calls[-1][2] == ["plane"] and torch.equal(calls[-1][0], image)


def test_a_clip_score_is_a_cosine_of_what_the_mask_leaves(tmp_path, image):
    score, mask = ClipScore(write_tiny_clip(tmp_path)), torch.zeros(32, 64, dtype=torch.bool)
    assert score(image, mask, "plane") == 0
    mask[4:20, 8:40] = True
    first = score(image, mask, "plane")
    assert -1 <= first <= 1
    assert first != score(image, mask, "dog") and first != score(1 - image, mask, "plane")
    assert first == score(torch.where(mask, image, 0.3), mask, "plane")


@pytest.mark.parametrize("fault", ["missing", "of another shape"])
def test_a_clip_whose_weights_do_not_fit_is_an_error_that_names_them(tmp_path, fault):
    path, name = write_tiny_clip(tmp_path), "visual_projection.weight"
    weights = load_file(tmp_path / "model.safetensors")
    if fault == "missing":
        del weights[name]
    else:
        weights[name] = torch.zeros(3, 3)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"does not hold the weights of CLIP .* are {name}"):
        ClipScore(path)
