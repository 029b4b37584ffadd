"""MADM's step against the plain one of benchmarks/, its clock, its optimiser, its switches."""

import re

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision

from benchmarks.plain_madm import plain_backward
from functional.noise import named_generator
from lightning_modules.base import NORMALISATIONS
from lightning_modules.madm import MADMTraining
from lightning_modules.schedules import WarmupSteps
from tests.tiny_madm import FROZEN, SIZE, Pairs, first_batch, fit, spy
from tests.tiny_training import tiny_trainer

SETTINGS = {
    "depth": ({}, {}),
    "event": ({}, {"source_regression": 20.0, "mixed_regression": 0.0}),
    "other lambda": ({}, {"source_regression": 10.0, "mixed_regression": 0.0}),
    "two micro-batches": ({}, {"micro_batches": 2}),
    "checkpointing": ({"gradient_checkpointing": True}, {}),
    "output layers": ({"train_output_layers": True}, {"mixed_regression": 0.0}),
    "without LPLR": ({"lplr": False}, {}),
    "without LPLR and DPLG": ({"lplr": False}, {"dplg": False}),
    "not square": ({}, {}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_gradients_of_the_split_step_are_those_of_one_backward_of_the_sum(tmp_path, build, setting):
    options, arguments = SETTINGS[setting]
    module, width = build(options, **arguments), SIZE // 2 if setting == "not square" else SIZE
    watch = fit(module, tmp_path, data=Pairs(2, width))
    other, batch = build(options, **arguments), first_batch(2, width)
    other._trainer = None
    assert 0 < watch.logged[0]["train/quality"] < 1
    # Encoded together, as in the step: other bits of a latent are other signs in the gradient of an L1 norm.
    plain_backward(other, batch, other.encode)
    expected = {n: p.grad for n, p in other.network.named_parameters() if p.grad is not None}
    assert (
        watch.gradients[0].keys()
        == expected.keys()
        == {n for n, p in other.network.named_parameters() if p.requires_grad}
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(watch.gradients[0][name], gradient, rtol=1e-4, atol=1e-7, msg=name)
    assert watch.steps == [0] and module.trainer.global_step == 1
    for name, buffer in other.network.named_buffers():  # running statistics moved once an image, not twice
        torch.testing.assert_close(dict(module.network.named_buffers())[name], buffer)


def test_the_regressions_weights_are_those_given_and_nothing_without_lplr(build):
    assert build(source_regression=20.0, mixed_regression=0.5).regression == {"source": 20.0, "mixed": 0.5}
    assert set(build({"lplr": False}).regression.values()) == {0.0}


def test_images_that_the_models_stride_does_not_divide_are_learnt_from(tmp_path, build):
    found = fit(build(), tmp_path, 2, data=Pairs(width=SIZE - 5))
    assert all(0 < logged["train/regression_mixed"] < 10 for logged in found.logged)
    assert all(gradient.isfinite().all() for gradient in found.gradients[1].values())


def test_the_graph_of_the_source_is_freed_before_the_mixed_one_is_built(tmp_path, build):
    module, nodes, found = build(), [], []

    def freed(node):
        try:
            return node._saved_result is None
        except RuntimeError:
            return True

    def remember(layer, inputs, output):
        if output.requires_grad:
            found.append([freed(node) for node in nodes])
            nodes.append(output.grad_fn)
            assert not freed(output.grad_fn)

    module.network.adapter.head.fuse.register_forward_hook(remember)
    fit(module, tmp_path)
    assert found == [[], [True]]


@pytest.mark.parametrize(("mixed_regression", "sizes"), [(1.0, [6, 4]), (0.0, [6, 2])])
def test_the_autoencoder_encodes_in_two_calls(tmp_path, build, monkeypatch, mixed_regression, sizes):
    module, seen = build(mixed_regression=mixed_regression), []
    encode = module.network.diffusion.encode
    monkeypatch.setattr(
        module.network.diffusion, "encode", lambda image: seen.append(len(image)) or encode(image)
    )
    fit(module, tmp_path, data=Pairs(2))
    assert seen == sizes
    images = torch.rand(2, 1, 3, SIZE, SIZE)
    for together, image in zip(module.encode(*images), images, strict=True):
        torch.testing.assert_close(together, module.network.encode(image), rtol=1e-4, atol=1e-5)


def test_only_what_is_to_be_trained_changes(tmp_path, build):
    module = build()
    before = {name: value.clone() for name, value in module.network.named_parameters()}
    fit(module, tmp_path, 1)
    after = dict(module.network.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name, value in after.items() if value.requires_grad}
    assert not [name for name in changed if name.startswith((*FROZEN, "ema_"))]
    fit(module, tmp_path, 2)
    assert not torch.equal(before["ema_adapter.head.fuse.0.weight"], after["ema_adapter.head.fuse.0.weight"])


def test_images_that_cannot_be_mixed_are_an_error(tmp_path, build):
    with pytest.raises(ValueError, match=r"and \[1, 3, 32, 32\] with 2\. Set the crop"):
        fit(build(micro_batches=2), tmp_path)
    batch = first_batch()
    batch["target"]["image"] = torch.rand(1, 3, 32, 64)
    with pytest.raises(ValueError, match=r"need one shape.*\[1, 3, 32, 64\]"):
        build().parts(batch)


def test_a_network_of_other_classes_is_refused_before_its_logits_meet_labels(tmp_path, build):
    with pytest.raises(ValueError, match=r"12 classes, the table has 11"):
        fit(build(num_classes=12), tmp_path)


OUT_OF_RANGE = {
    "max_gradient_norm": (0.0, -1.0, float("nan")),
    "max_alpha": (-0.1, 1.1),
    "threshold": (0.0, 1.1),
    "dplg_start": ((61, 60), (-1, 5), (60, 1000), (60,), (0.5, 1.5)),
    "dplg_end_step": (0,),
    "micro_batches": (0,),
    "source_regression": (-1.0,),
    "mixed_regression": (-1.0,),
}


def test_a_number_out_of_its_range_is_refused_by_name(build):
    network = build().network
    for option, values in OUT_OF_RANGE.items():
        for value in values:
            found = re.escape(str(value))
            with pytest.raises(ValueError, match=f"^{option} must be .*: found {found}. Set model"):
                MADMTraining(network, "deliver11", **{option: value})
    bounds = {"max_alpha": 1.0, "threshold": 1.0, "dplg_start": (0, 999), "mixed_regression": 0.0}
    MADMTraining(network, "deliver11", **bounds)


class NoSync(Callback):
    """From the second step on, an operation that makes the host wait for the device is an error."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("error" if batch_idx else "default")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_a_step_does_not_wait_for_the_device(tmp_path, build):
    try:
        trainer = tiny_trainer(tmp_path, 3, [NoSync()], accelerator="gpu", enable_checkpointing=False)
        trainer.fit(build(), Pairs())
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- the clock: timestep, moving average, learning rate, clipping


def test_the_teacher_sees_a_timestep_that_decays_to_zero(tmp_path, build, monkeypatch):
    module = build(dplg_start=(60, 61), dplg_end_step=2)
    calls = spy(module, monkeypatch, "teacher")
    watch = fit(module, tmp_path, 4)
    assert [call[1] for call in calls[1:]] == [30, 0, 0]
    assert calls[0][1] in (60, 61)
    assert [logged["train/timestep"] for logged in watch.logged] == [call[1] for call in calls]


def test_both_ends_of_the_start_are_drawn_and_nothing_else(tmp_path, build):
    module = build(dplg_start=[50, 51])
    module._trainer = tiny_trainer(tmp_path, 1, enable_checkpointing=False)
    drawn = {module.timestep(named_generator(str(i))) for i in range(40)}
    assert drawn == {50, 51}


def test_without_dplg_the_teacher_stays_at_zero_and_all_else_is_drawn_alike(tmp_path, build, monkeypatch):
    seen = []
    for dplg in (False, True):
        module = build(dplg=dplg)
        teacher, student = (spy(module, monkeypatch, name) for name in ("teacher", "student"))
        fit(module, tmp_path, 2)
        seen.append((teacher, student))
    assert [call[1] for call in seen[0][0]] == [0, 0]
    assert min(call[1] for call in seen[1][0]) > 50
    assert torch.equal(seen[0][1][1][0], seen[1][1][1][0])  # the mixed image of the first step


def test_without_lplr_nothing_is_coloured(tmp_path, build, monkeypatch):
    module = build({"lplr": False})
    monkeypatch.setattr(module, "palette", None)
    logged = fit(module, tmp_path, 2).logged
    assert [name for name in logged[-1] if "regression" in name] == []
    assert {"train/loss_source", "train/loss_mixed", "train/quality", "train/timestep"} <= logged[-1].keys()


def test_event_has_no_regression_on_the_target(tmp_path, build):
    logged = fit(build(source_regression=20.0, mixed_regression=0.0), tmp_path).logged
    assert [name for name in logged[0] if "regression" in name] == ["train/regression_source"]


def test_the_schedule_and_k_follow_optimiser_steps(tmp_path, build, monkeypatch):
    schedule = WarmupSteps(warmup_fraction=0.5)
    module = build(schedule=schedule, micro_batches=2)
    updates = spy(module, monkeypatch, "update_teacher")
    watch = fit(module, tmp_path, 3, data=Pairs(2))
    assert [[*rates] for rates in watch.rates] == [[1e-3 * schedule(k, 3)] for k in range(3)]
    assert updates == [(k, 0.999) for k in range(3)]


def test_the_teacher_follows_before_a_step_and_each_part_of_a_step_draws_anew(tmp_path, build, monkeypatch):
    students, names = [], []

    class Students(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            students.append(pl_module.network.adapter.head.fuse[0].weight.clone())

    def draw(name, seed):
        names.append(name)
        return named_generator(name, seed)

    monkeypatch.setattr("lightning_modules.madm.named_generator", draw)
    module = build(micro_batches=2)
    fit(module, tmp_path, 2, [Students()], Pairs(2))
    teacher = module.network.ema_adapter.head.fuse[0].weight
    torch.testing.assert_close(teacher, (students[0] + students[1]) / 2)
    assert not torch.equal(*students) and len(set(names)) == 4


def test_the_bound_of_the_moving_average_is_an_option(tmp_path, build):
    module = build(max_alpha=0.0)
    fit(module, tmp_path, 1)
    student = module.network.adapter.head.fuse[0].weight.clone()
    module.network.update_teacher(1, module.max_alpha)
    assert torch.equal(module.network.ema_adapter.head.fuse[0].weight, student)


def test_the_optimiser_has_two_groups_and_spares_norms_and_biases(tmp_path, build):
    module = build()
    fit(module, tmp_path)
    groups = {group["weight_decay"]: group["params"] for group in module.trainer.optimizers[0].param_groups}
    assert groups.keys() == {0.0, 0.05} and len(module.trainer.optimizers[0].param_groups) == 2
    spared = {id(parameter) for parameter in groups[0.0]}
    for owner in module.modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad:
                assert (id(parameter) in spared) == (leaf == "bias" or isinstance(owner, NORMALISATIONS))
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert sum(p.numel() for group in groups.values() for p in group) == trained


class Norm(Callback):
    """The gradient norm that the optimiser uses."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.used = torch.nn.utils.get_total_norm(gradients).item()


class Float32Scaled(MixedPrecision):
    """The GradScaler of 16-mixed in float32, so that its gradients can be compared."""

    def __init__(self):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=65536))

    def autocast_context_manager(self):
        return torch.autocast("cpu", enabled=False)


@pytest.mark.parametrize("bound", [0.01, 1e9])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_norm_is_clipped_after_the_scale_is_taken_off(tmp_path, build, scaled, bound):
    norm = Norm()
    plugins = {"plugins": [Float32Scaled()]} if scaled else {}
    watch = fit(build(max_gradient_norm=bound), tmp_path, callbacks=[norm], **plugins)
    total = torch.nn.utils.get_total_norm(list(watch.gradients[0].values())).item()
    assert total > 0.1
    assert watch.logged[0]["train/gradient_norm"] == pytest.approx(total, rel=1e-4)
    assert norm.used == pytest.approx(min(total, bound), rel=1e-4)
