"""MADM's runs: resumed ones, their checkpoints, evaluation, processes and panels."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback

from callbacks.checkpoints import Checkpoints
from callbacks.finite import Finite
from callbacks.panels import Panels
from lightning_modules.schedules import WarmupSteps
from tests.tiny_madm import FROZEN, SIZE, Pairs, first_batch, fit, spy
from tests.tiny_training import StopAt, assert_equal, tiny_trainer, training_state

RESUMED = {
    "published": {"teacher_dropout": True},
    "all random, all averaged": {"teacher_dropout": True, "fresh_noise": True, "ema_unet": True},
    "without LPLR": {"lplr": False},
}


@pytest.mark.parametrize(
    ("setting", "workers"),
    [
        ("published", 2),  # against a run without workers
        *(pytest.param(name, 0, marks=pytest.mark.slow) for name in RESUMED),
    ],
)
def test_four_steps_and_a_resume_equal_eight_steps_bit_for_bit(
    tmp_path, build, monkeypatch, setting, workers
):
    """F01."""
    schedule = WarmupSteps(0.3, boundaries=[0.7])
    make = partial(build, {"dropout": 0.5, **RESUMED[setting]}, dplg_end_step=6, schedule=schedule)
    whole = fit(make(), tmp_path / "whole", 8, [Checkpoints(4)])
    data = Pairs(num_workers=workers)
    fit(make(), tmp_path / "parts", 8, [StopAt(4), Checkpoints(4)], data)
    module = make()
    torch.manual_seed(5)  # another process starts with other generators
    updates = spy(module, monkeypatch, "update_teacher")
    last = tmp_path / "parts/checkpoints/last.ckpt"
    data = Pairs(num_workers=workers)
    resumed = fit(module, tmp_path / "parts", 8, [Checkpoints(4)], data, resume=last)
    assert [step for step, _ in updates] == [4, 5, 6, 7]
    assert resumed.logged == whole.logged[4:]
    assert_equal(training_state(tmp_path / "whole/checkpoints/last.ckpt"), training_state(last))


def test_a_checkpoint_holds_the_teacher_and_no_frozen_weight(tmp_path, build):
    module = build({"ema_unet": True})
    fit(module, tmp_path, 2, [Checkpoints()])
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    names = set(checkpoint["state_dict"])
    frozen = {name for name in module.state_dict() if name.startswith(tuple(f"network.{f}" for f in FROZEN))}
    assert frozen and names == set(module.state_dict()) - frozen
    assert [name for name in names if name.startswith("network.ema_unet.")]
    assert [name for name in names if name.startswith("network.ema_adapter.")]
    assert "palette" not in names


def test_evaluation_is_repeatable_uses_the_student_and_changes_nothing(tmp_path, build, monkeypatch):
    module = build({"dropout": 0.5, "teacher_dropout": True, "fresh_noise": True})
    fit(module, tmp_path, 2)
    monkeypatch.setattr(module.network, "teacher", None)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    scores = []
    for _ in range(2):
        trainer = tiny_trainer(tmp_path, 2, enable_checkpointing=False, limit_val_batches=1.0)
        scores += trainer.validate(module, Pairs(), verbose=False)
    assert scores[0] == pytest.approx(scores[1], rel=0, nan_ok=True)
    assert_equal(before, module.state_dict())
    image = torch.rand(1, 3, SIZE, SIZE)
    ids = module.eval().predict_step({"image": image}, 0)
    assert torch.equal(ids, module.network.student(image).logits.argmax(1))


def test_a_validation_within_training_does_not_change_the_course(tmp_path, build):
    ends = []
    for options in ({}, {"limit_val_batches": 1, "val_check_interval": 1}):
        module = build({"dropout": 0.5})
        fit(module, tmp_path, 2, **options)
        ends.append(module.state_dict())
    assert_equal(*ends)


class SameEverywhere(Callback):
    """Fails unless all processes have the same parameters."""

    def on_train_end(self, trainer, pl_module):
        for name, parameter in pl_module.network.named_parameters():
            first, *others = pl_module.all_gather(parameter.detach())
            assert all(torch.equal(first, other) for other in others), name


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"train_output_layers": True}])
def test_two_processes_of_one_pair_learn_what_two_micro_batches_do(tmp_path, build, options):
    moments = []
    for processes in (1, 2):
        module = build(options, micro_batches=3 - processes, mixed_regression=0.0)
        arguments = {"devices": 2, "strategy": "ddp_fork"} if processes == 2 else {}
        place, callbacks = tmp_path / str(processes), [Checkpoints(), SameEverywhere()]
        fit(module, place, 1, callbacks[:processes], Pairs(3 - processes), **arguments)
        checkpoint = torch.load(place / "checkpoints/last.ckpt", weights_only=True)
        moments.append(checkpoint["optimizer_states"][0]["state"])
    for number, state in moments[0].items():  # a tenth of the clipped gradient
        torch.testing.assert_close(moments[1][number]["exp_avg"], state["exp_avg"], rtol=1e-3, atol=1e-8)


class RunningStatistics(Callback):
    """Fails unless all processes score with the same running statistics, after training with their own."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            assert not self.same(pl_module)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        assert self.same(pl_module)

    def same(self, module):
        name = "head.fuse.1.running_mean"
        first, second = module.all_gather(module.network.adapter.get_buffer(name))
        return torch.equal(first, second)


@pytest.mark.slow
def test_all_processes_score_with_the_statistics_of_the_first(tmp_path, build):
    options = {"devices": 2, "strategy": "ddp_fork", "limit_val_batches": 1, "val_check_interval": 2}
    fit(build(), tmp_path, 2, [RunningStatistics(), Checkpoints()], **options)
    assert (tmp_path / "checkpoints/last.ckpt").is_file()


# --- pictures


@pytest.mark.parametrize("lplr", [True, False])
def test_panels_show_source_target_and_mixed_image(tmp_path, build, lplr):
    kept = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            kept.append(pl_module.pictures)

    module = build({"lplr": lplr})
    fit(module, tmp_path, 3, [Keep(), Panels(2)])
    assert [rows is not None for rows in kept] == [True, False, True]
    regression = ["regression"] if lplr else []
    learnt = ["image", "label", "prediction", *regression]
    titles = {"source": learnt, "mixed": learnt}
    titles["target"] = ["image", "pseudo label", "confidence", *regression]
    assert {row: [*pictures] for row, pictures in kept[0].items()} == titles
    batch, (source, target, mixed) = first_batch(), (kept[0][row] for row in ("source", "target", "mixed"))
    assert torch.equal(source["image"], batch["source"]["image"][0])
    assert torch.equal(source["label"], batch["source"]["label"][0])
    assert torch.equal(target["image"], batch["target"]["image"][0])
    pasted = mixed["label"] == source["label"]
    assert 0 < pasted.float().mean() < 1
    assert torch.equal(mixed["label"][~pasted], target["pseudo label"][~pasted])
    assert 1 / 11 <= target["confidence"].min() < target["confidence"].max() <= 1
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        "train-000001.png", "train-000003.png",
    ]  # fmt: skip


def test_after_a_step_without_a_finite_gradient_teacher_and_schedule_stand_still(
    tmp_path, build, monkeypatch
):
    class Poison(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 1:
                optimizer.param_groups[0]["params"][0].grad.fill_(float("nan"))

    module = build(schedule=WarmupSteps(0.3, boundaries=[0.7]))
    updates = spy(module, monkeypatch, "update_teacher")
    watch = fit(module, tmp_path, 4, [Poison(), Finite(), Checkpoints(100)])
    assert [step for step, _ in updates] == [0, 1, 3]
    assert watch.rates[2] == watch.rates[1] != watch.rates[3]
    assert all(p.isfinite().all() for p in module.parameters())
