"""DIFF's losses, what it trains, and that a run which was stopped goes on as if it had not been."""

import math

import pytest
import torch
from lightning.pytorch import Callback

from benchmarks.plain_diff import plain_branches
from callbacks.checkpoints import Checkpoints
from functional.losses import weighted_cross_entropy
from lightning_modules.base import parameter_groups
from lightning_modules.diff import DIFFTraining
from lightning_modules.schedules import WarmupPoly
from tests.tiny_diff import images, labels, noise_of, tiny_diff
from tests.tiny_madm import Blocks
from tests.tiny_training import StopAt, TinyDataModule, assert_equal, tiny_trainer, training_state


class BlocksData(TinyDataModule):
    """Images of coloured blocks, 32x32, without augmentation."""

    def __init__(self, num_workers=0):
        super().__init__(batch_size=2, num_workers=num_workers)
        self.transform = None

    def train_dataset(self):
        return Blocks(6, 0)

    def eval_datasets(self, split):
        return {"day": Blocks(3, 1), "night": Blocks(2, 2)}


def build(folder, network=None, **arguments):
    return DIFFTraining(tiny_diff(folder, **(network or {})), "deliver11", **{"lr": 1e-3, **arguments})


def batch(*classes):
    names = [f"image-{i}" for i in range(len(classes))]
    return {"image": images(len(classes)), "label": labels(*classes), "name": names}


class Losses(Callback):
    def __init__(self):
        self.logged = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.logged.append({key: value.item() for key, value in trainer.callback_metrics.items()})


def fit(module, folder, steps, resume=None, callbacks=(), workers=0, **options):
    losses = Losses()
    options = {"enable_checkpointing": bool(callbacks), **options}
    trainer = tiny_trainer(folder, steps, [losses, *callbacks], **options)
    trainer.fit(module, BlocksData(workers), ckpt_path=resume, weights_only=True if resume else None)
    return losses.logged


def step(module, data, monkeypatch):
    """The loss of a step on a batch with noise that is fixed, and what it logs."""
    logged, network = {}, module.network
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: value.item()}))
    free = network.branches
    monkeypatch.setattr(network, "branches", lambda image, label: free(image, label, noise_of(0, (16, 16))))
    loss = module.training_step(data, 0)
    monkeypatch.setattr(network, "branches", free)
    return loss, logged


def test_half_the_pixels_ignored_halve_the_cross_entropy_of_zero_logits():
    label = torch.zeros(1, 8, 8, dtype=torch.long)
    label[:, :4] = 255
    assert weighted_cross_entropy(torch.zeros(1, 19, 8, 8), label).item() == pytest.approx(0.5 * math.log(19))


def test_the_loss_and_its_gradients_are_those_of_the_plain_order(model_folder, monkeypatch):
    module, data = build(model_folder, consistency=3.0), batch(8, 8)
    loss, logged = step(module, data, monkeypatch)
    loss.backward()
    found = [p.grad.clone() for p in module.parameters() if p.requires_grad]
    module = build(model_folder)
    conditional, unconditional = plain_branches(
        module.network, data["image"], data["label"], noise_of(0, (16, 16))
    )
    terms = []
    for logits in (conditional, unconditional):
        large = torch.nn.functional.interpolate(logits, size=(32, 32), mode="bilinear")
        valid = data["label"] != 255
        log_p = large.log_softmax(1).gather(1, data["label"].where(valid, 0)[:, None])[:, 0]
        terms.append(-(log_p * valid).sum() / data["label"].numel())
    terms.append((conditional - unconditional).square().mean())
    expected = terms[0] + terms[1] + 3.0 * terms[2]
    expected.backward()
    torch.testing.assert_close(loss, expected)
    names = ("train/loss_conditional", "train/loss_unconditional", "train/consistency")
    assert [logged[name] for name in names] == pytest.approx([term.item() for term in terms], rel=1e-4)
    for a, p in zip(found, [p for p in module.parameters() if p.requires_grad], strict=True):
        torch.testing.assert_close(a, p.grad, atol=1e-5, rtol=1e-3)


def test_the_consistency_loss_reaches_both_branches(model_folder, monkeypatch):
    module, kept = build(model_folder), []

    def branches(image, label):
        kept.extend(torch.randn(2, 2, 11, 16, 16).requires_grad_().unbind())
        for logits in kept:
            logits.retain_grad()
        return tuple(kept)

    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    monkeypatch.setattr(module.network, "branches", branches)
    data = batch(8, 8)
    data["label"][:] = 255  # no cross entropy
    module.training_step(data, 0).backward()
    difference = 2 * (kept[0] - kept[1]) / kept[0].numel()
    torch.testing.assert_close(kept[0].grad, difference.detach())
    torch.testing.assert_close(kept[1].grad, -difference.detach())


def test_without_the_conditional_branch_one_cross_entropy_is_left(model_folder, monkeypatch):
    module = build(model_folder, conditional=False)
    monkeypatch.setattr(module.network, "branches", None)
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    torch.manual_seed(0)
    loss = module.training_step(batch(8), 0)
    torch.manual_seed(0)
    torch.testing.assert_close(loss, weighted_cross_entropy(module.network(images(1)), labels(8)))


def test_another_number_of_classes_and_another_table_are_errors(model_folder, monkeypatch):
    monkeypatch.setattr(DIFFTraining, "log", lambda *_, **__: None)
    module = DIFFTraining(tiny_diff(model_folder, num_classes=15), "deliver11")
    with pytest.raises(ValueError, match="found logits of 15 classes"):
        module.training_step(batch(8), 0)
    with pytest.raises(ValueError, match="found 'deliver11', the model's is 'fmb9'"):
        DIFFTraining(tiny_diff(model_folder, num_classes=9), "fmb9")


def test_the_head_learns_ten_times_as_fast_and_everything_decays(model_folder):
    groups = parameter_groups(build(model_folder), 6e-5, 0.01, {"head": 10}, decay_norm_and_bias=True)
    rates = {round(group["lr"], 9): group for group in groups}
    assert sorted(rates) == [6e-5, 6e-4] and all(group["weight_decay"] == 0.01 for group in groups)
    head = sum(p.numel() for p in build(model_folder).network.head.parameters())
    assert sum(p.numel() for p in rates[6e-4]["params"]) == head


def test_the_schedule_is_the_one_that_the_logs_print():
    schedule = WarmupPoly()
    wanted = {0: 6e-11, 49: 1.957657e-6, 99: 3.950255e-6, 1499: 5.7713e-5, 1500: 5.775e-5, 1549: 5.76765e-5}
    for k, rate in (wanted | {39999: 1.5e-9}).items():
        assert 6e-5 * schedule(k, 40000) == pytest.approx(rate, rel=1e-5)


@pytest.mark.parametrize("workers", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_bit_for_bit_from_a_checkpoint_without_the_diffusion_model(
    model_folder, tmp_path, workers
):
    """F01: against an unbroken run without workers."""

    def make():
        return build(model_folder, {"dropout": 0.1}, schedule=WarmupPoly(warmup_steps=3))

    logged = fit(make(), tmp_path / "whole", 4, callbacks=[Checkpoints(2)])
    fit(make(), tmp_path / "parts", 4, callbacks=[StopAt(2), Checkpoints(2)], workers=workers)
    path = tmp_path / "parts/checkpoints/last.ckpt"
    stored = torch.load(path, weights_only=True)["state_dict"]
    assert stored and not any("diffusion" in name for name in stored)
    resumed = make()
    torch.manual_seed(5)  # another process starts with other generators
    later = fit(resumed, tmp_path / "parts", 4, resume=path, callbacks=[Checkpoints(2)], workers=workers)
    assert later == logged[2:]
    assert_equal(training_state(tmp_path / "whole/checkpoints/last.ckpt"), training_state(path))


def test_validation_is_seeded_and_leaves_the_training_as_it_was(model_folder, tmp_path):
    often = fit(build(model_folder), tmp_path / "often", 3, val_check_interval=1)
    once = fit(build(model_folder), tmp_path / "once", 3, val_check_interval=3)
    keys = [key for key in once[0] if key.startswith("train/")]
    assert [[row[key] for key in keys] for row in often] == [[row[key] for key in keys] for row in once]


def test_an_image_is_scored_alike_in_any_batch(model_folder):
    module = build(model_folder).eval()
    data = batch(8, 3)
    with torch.no_grad():
        both = module.logits(data)
        alone = module.logits({"image": data["image"][1:], "name": data["name"][1:]})
    torch.testing.assert_close(alone, both[1:], atol=1e-5, rtol=1e-4)
