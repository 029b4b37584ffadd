"""A gradient that is not finite changes nothing; what led to it is kept; too many in a row end the run."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision

from callbacks.checkpoints import Checkpoints
from callbacks.finite import Finite, NotFiniteError
from lightning_modules.schedules import WarmupPoly
from tests.tiny_training import StopAt, TinyDataModule, assert_equal, tiny_module, tiny_trainer


class Poison(Callback):
    """Makes the images of some batches not finite, and notes weights, rates and logs after each step."""

    def __init__(self, *batches):
        self.batches, self.weights, self.rates, self.logged = batches, [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx in self.batches:
            batch["image"][0, 0, 0, 0] = float("nan")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append({name: p.clone() for name, p in pl_module.named_parameters()})
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.logged.append(dict(trainer.callback_metrics))


def fit(folder, poison=(), budget=10, resume=None, stop=None, **options):
    watch, finite = Poison(*poison), Finite(budget)
    trainer = tiny_trainer(folder, 6, [watch, StopAt(stop), finite, Checkpoints(4)], **options)
    module = tiny_module(schedule=WarmupPoly(warmup_steps=3))
    trainer.fit(module, datamodule=TinyDataModule(), ckpt_path=resume, weights_only=True)
    return watch, trainer


def test_a_step_without_a_finite_gradient_changes_nothing_and_the_next_one_goes_on(tmp_path):
    watch, trainer = fit(tmp_path, poison=[2])
    assert_equal(watch.weights[1], watch.weights[2])
    assert not torch.equal(watch.weights[2]["network.head.weight"], watch.weights[3]["network.head.weight"])
    assert all(p.isfinite().all() for p in watch.weights[-1].values())
    assert [float(logs["train/skipped_steps"]) for logs in watch.logged] == [0, 0, 1, 1, 1, 1]
    assert watch.logged[2]["train/gradient_norm"].isnan() and watch.logged[3]["train/gradient_norm"] > 0
    # The schedule counts the steps that were taken, the optimiser too; the clock goes on.
    clean, _ = fit(tmp_path / "clean")
    assert watch.rates == [*clean.rates[:2], clean.rates[1], *clean.rates[2:5]]
    assert trainer.global_step == 6
    assert {int(state["step"]) for state in trainer.optimizers[0].state.values()} == {5}


def test_without_poison_training_is_as_without_the_guard(tmp_path):
    guarded, _ = fit(tmp_path / "guarded", gradient_clip_val=0.1)
    watch = Poison()
    trainer = tiny_trainer(tmp_path / "bare", 6, [watch, Checkpoints(100)], gradient_clip_val=0.1)
    trainer.fit(tiny_module(schedule=WarmupPoly(warmup_steps=3)), datamodule=TinyDataModule())
    assert_equal(guarded.weights[-1], watch.weights[-1])
    assert torch.equal(guarded.logged[-1]["train/gradient_norm"], watch.logged[-1]["train/gradient_norm"])
    unclipped, _ = fit(tmp_path / "unclipped")
    assert not torch.equal(
        unclipped.weights[-1]["network.head.weight"], watch.weights[-1]["network.head.weight"]
    )


@pytest.mark.parametrize("budget", [0, 2])
def test_more_steps_in_a_row_than_the_budget_end_the_run(tmp_path, budget):
    with pytest.raises(
        NotFiniteError, match=f"in {budget + 1} steps in a row.*\\n.*replay_step .*rank-0.ckpt"
    ):
        fit(tmp_path, poison=range(1, 100), budget=budget)


def test_steps_in_a_row_are_counted_anew_after_a_good_one(tmp_path):
    watch, _ = fit(tmp_path, poison=[1, 2, 4, 5], budget=2)
    assert float(watch.logged[-1]["train/skipped_steps"]) == 4


def test_a_negative_budget_is_refused():
    with pytest.raises(ValueError, match="found -1"):
        Finite(-1)


def test_what_was_counted_survives_a_resume(tmp_path):
    fit(tmp_path, poison=[3], stop=4)
    watch, _ = fit(tmp_path, resume=tmp_path / "checkpoints/last.ckpt")
    assert float(watch.logged[0]["train/skipped_steps"]) == 1
    whole, _ = fit(tmp_path / "whole", poison=[3])
    assert_equal(watch.weights[-1], whole.weights[-1])


def test_a_gradient_scaler_finds_its_scale_without_using_up_the_budget(tmp_path):
    class Overflow(Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step in (1, 2):
                pl_module.network.head.weight.grad[0] = float("inf")

    watch, finite = Poison(), Finite(budget=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    trainer = tiny_trainer(tmp_path, 5, [Overflow(), watch, finite, Checkpoints(100)], plugins=[precision])
    trainer.fit(tiny_module(schedule=WarmupPoly(warmup_steps=3)), datamodule=TinyDataModule())
    assert scaler.get_scale() == 16 and finite.skipped == 2 and finite.in_a_row == 0
    assert_equal(watch.weights[0], watch.weights[2])
    assert watch.rates[0] == watch.rates[2] < watch.rates[3]
    assert not (tmp_path / "non_finite").exists()
