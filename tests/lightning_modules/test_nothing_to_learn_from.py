"""Batches that say nothing: every loss stays finite, and what is not known gives no gradient (F15)."""

import pytest
import torch
from lightning.pytorch import Callback

from lightning_modules.diff import DIFFTraining
from lightning_modules.difffss import DifFSS
from tests.lightning_modules.test_difffss import data, host
from tests.tiny_diff import images, labels, tiny_diff
from tests.tiny_madm import fit
from tests.tiny_training import tiny_module


def largest(gradients):
    """The largest absolute value among gradients, which must all be finite."""
    found = list(gradients)
    assert found and all(torch.isfinite(gradient).all() for gradient in found)
    return max(float(gradient.abs().max()) for gradient in found)


def gradients(module, loss):
    """The largest gradient of a finite loss."""
    assert torch.isfinite(loss)
    loss.backward()
    found = largest(p.grad for p in module.parameters() if p.grad is not None)
    module.zero_grad()
    return found


def quiet(module, monkeypatch):
    for name in ("log", "log_dict"):
        monkeypatch.setattr(module, name, lambda *_, **__: None)
    return module


@pytest.mark.parametrize("image", ["random", "black"])
def test_the_supervised_baseline_learns_nothing_from_ignored_pixels(monkeypatch, image):
    module = quiet(tiny_module(), monkeypatch)
    pixels = torch.rand(2, 3, 16, 16) if image == "random" else torch.zeros(2, 3, 16, 16)
    label = torch.full((2, 16, 16), 255)
    assert gradients(module, module.training_step({"image": pixels, "label": label}, 0)) == 0
    label[:, :8] = 3
    assert gradients(module, module.training_step({"image": pixels, "label": label}, 0)) > 0


@pytest.mark.parametrize("black", [False, True])
def test_diff_learns_nothing_from_ignored_pixels_beside_consistency(model_folder, monkeypatch, black):
    network = tiny_diff(model_folder, channels=(64, 64, 64, 32))
    module = quiet(DIFFTraining(network, "deliver11", consistency=0.0), monkeypatch)
    pixels = torch.zeros(1, 3, 32, 32) if black else images(1)
    batch = {"image": pixels, "label": torch.full((1, 32, 32), 255), "name": ["a"]}
    assert gradients(module, module.training_step(batch, 0)) == 0
    if black:
        assert gradients(module, module.training_step(batch | {"label": labels(8)}, 0)) > 0


class Empty(Callback):
    """Takes the content out of the source of a batch, and out of the target too where images are black."""

    def __init__(self, black: bool, ignored: bool):
        self.black, self.ignored = black, ignored

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.ignored:
            batch["source"]["label"].fill_(255)
        if self.black:
            for part in batch.values():
                part["image"].zero_()


def test_madm_learns_from_black_images(tmp_path, build):
    watch = fit(build(), tmp_path, 1, [Empty(black=True, ignored=False)])
    assert all(torch.isfinite(torch.tensor(value)) for value in watch.logged[0].values())
    assert largest(watch.gradients[0].values()) > 0


def test_madm_learns_nothing_from_ignored_pixels_and_a_target_of_which_none_is_sure(
    tmp_path, build, monkeypatch
):
    nothing_pasted = lambda label, generator: torch.zeros_like(label, dtype=torch.bool)  # noqa: E731
    monkeypatch.setattr("lightning_modules.madm.mix_mask", nothing_pasted)
    for threshold, learns in ((1.0, False), (0.01, True)):
        watch = fit(build(threshold=threshold), tmp_path, 1, [Empty(black=False, ignored=True)])
        assert watch.logged[0]["train/quality"] == learns
        assert (largest(watch.gradients[0].values()) > 0) == learns


@pytest.mark.parametrize("kind", ["hsnet", "bam", "pfenet"])
@pytest.mark.parametrize("black", [False, True])
def test_a_few_shot_host_learns_nothing_from_a_query_of_void(monkeypatch, kind, black):
    module = quiet(DifFSS(host(kind)).train(), monkeypatch)
    batch = next(iter(data().train_dataloader()))
    if black:
        batch["image"].zero_()
        batch["support_image"].zero_()
    batch["label"].fill_(255)
    if "base_label" in batch:
        batch["base_label"].fill_(255)
    largest = gradients(module, module.training_step(batch, 0))
    # To HSNet void is background, as its protocol has it.
    assert (largest > 0) == (kind == "hsnet")
