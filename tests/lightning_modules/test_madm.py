"""MADM's step against the plain one of benchmarks/, its clock, its checkpoints, its switches."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import Dataset, default_collate

from benchmarks.plain_madm import plain_backward
from callbacks.checkpoints import Checkpoints
from callbacks.panels import Panels
from functional.noise import named_generator
from lightning_modules.base import NORMALISATIONS
from lightning_modules.madm import MADMTraining
from lightning_modules.schedules import WarmupSteps
from models.diffusion.stable_diffusion import StableDiffusion
from models.madm import MADM
from tests.tiny_model import write_tiny_model
from tests.tiny_training import TinyDataModule, assert_equal, tiny_trainer

SIZE = 32
FROZEN = ("diffusion.vae.", "diffusion.unet.conv_norm_out.", "diffusion.unet.conv_out.")


class Blocks(Dataset):
    """Images of coloured blocks whose colour tells the class, 32x32."""

    def __init__(self, length, offset):
        self.length, self.offset = length, offset

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng = np.random.default_rng([self.offset, index])
        label = rng.integers(0, 11, (4, 4), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        noise = rng.integers(0, 30, (SIZE, SIZE, 3))
        image = (label[..., None] * [20, 9, 15] + noise).astype(np.uint8)
        label[:3] = 255
        return {"image": image, "label": label, "name": f"blocks-{self.offset}-{index}"}


def pair(samples):
    """Every other sample as source, the rest as target, without their labels."""
    target = default_collate(samples[1::2])
    return {"source": default_collate(samples[::2]), "target": {k: target[k] for k in ("image", "name")}}


class Pairs(TinyDataModule):
    """Stands for AdaptationDataModule: `pairs` source and target images of random blocks a batch."""

    def __init__(self, pairs=1):
        super().__init__(batch_size=2 * pairs)
        self.transform = None

    def train_dataset(self):
        return Blocks(14, 0)

    def eval_datasets(self, split):
        return {"day": Blocks(3, 1), "night": Blocks(2, 2)}

    def train_dataloader(self):
        loader = super().train_dataloader()
        loader.collate_fn = pair
        return loader


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    return write_tiny_model(place, widths=(8, 16, 16, 16), vae_widths=(8, 8), heads=1)


@pytest.fixture
def build(folder):
    """Build the same training module at each call; options of the network as a dict."""

    def build(network=None, num_classes=11, **arguments):
        torch.manual_seed(0)
        options = {"dropout": 0.0, **(network or {})}
        parts = ("unet", "vae_encoder", "vae_decoder", "text_encoder")
        widths = {"projection_channels": 32, "bottleneck_channels": 32, "embed_channels": 8, "channels": 8}
        model = MADM(
            StableDiffusion(str(folder), parts), num_classes, noise_size=(16, 16), **widths, **options
        )
        return MADMTraining(model, "deliver11", **{"lr": 1e-3, "threshold": 0.16, **arguments})

    return build


class Watch(Callback):
    """Records at each step k, the gradients before clipping, learning rates, and what was logged."""

    def __init__(self):
        self.steps, self.gradients, self.rates, self.logged = [], [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append(trainer.global_step)
        self.rates.append({group["lr"] for group in optimizer.param_groups})
        named = pl_module.network.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.logged.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def fit(module, tmp_path, steps=1, callbacks=(), data=None, resume=None, **options):
    watch = Watch()
    trainer = tiny_trainer(
        tmp_path, steps, [watch, *callbacks], enable_checkpointing=bool(callbacks), **options
    )
    trainer.fit(module, data or Pairs(), ckpt_path=resume, weights_only=True if resume else None)
    return watch


def first_batch(pairs=1):
    return next(iter(Pairs(pairs).train_dataloader()))


# --- the step


SETTINGS = {
    "depth": ({}, {}),
    "event": ({}, {"source_regression": 20.0, "mixed_regression": 0.0}),
    "other lambda": ({}, {"source_regression": 10.0, "mixed_regression": 0.0}),
    "two micro-batches": ({}, {"micro_batches": 2}),
    "checkpointing": ({"gradient_checkpointing": True}, {}),
    "output layers": ({"train_output_layers": True}, {"mixed_regression": 0.0}),
    "without LPLR": ({"lplr": False}, {}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_gradients_of_the_split_step_are_those_of_one_backward_of_the_sum(tmp_path, build, setting):
    options, arguments = SETTINGS[setting]
    module = build(options, **arguments)
    watch = fit(module, tmp_path, data=Pairs(2))
    other, batch = build(options, **arguments), first_batch(2)
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


def spy(module, monkeypatch, name):
    calls, original = [], getattr(module.network, name)

    def call(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(module.network, name, call)
    return calls


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


# --- checkpoints and evaluation


def everything(path):
    checkpoint = torch.load(path, weights_only=True)
    return {key: checkpoint[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "Pairs")}


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step == self.step


RESUMED = {
    "published": {"teacher_dropout": True},
    "all random, all averaged": {"teacher_dropout": True, "fresh_noise": True, "ema_unet": True},
    "without LPLR": {"lplr": False},
}


@pytest.mark.parametrize(
    "setting", [pytest.param(name, marks=[pytest.mark.slow] if i else []) for i, name in enumerate(RESUMED)]
)
def test_four_steps_and_a_resume_equal_eight_steps_bit_for_bit(tmp_path, build, monkeypatch, setting):
    schedule = WarmupSteps(0.3, boundaries=[0.7])
    make = partial(build, {"dropout": 0.5, **RESUMED[setting]}, dplg_end_step=6, schedule=schedule)
    whole = fit(make(), tmp_path / "whole", 8, [Checkpoints(4)])
    fit(make(), tmp_path / "parts", 8, [StopAt(4), Checkpoints(4)])
    module = make()
    torch.manual_seed(5)  # another process starts with other generators
    updates = spy(module, monkeypatch, "update_teacher")
    last = tmp_path / "parts/checkpoints/last.ckpt"
    resumed = fit(module, tmp_path / "parts", 8, [Checkpoints(4)], resume=last)
    assert [step for step, _ in updates] == [4, 5, 6, 7]
    assert resumed.logged == whole.logged[4:]
    assert_equal(everything(tmp_path / "whole/checkpoints/last.ckpt"), everything(last))


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
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        "train-000000.png", "train-000002.png",
    ]  # fmt: skip
