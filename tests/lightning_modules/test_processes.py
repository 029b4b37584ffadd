"""Several processes work as one: the same gradients as one process with their whole batch, the same scores.

A gradient is the mean of those of the processes' losses. It is that of one process with all their samples
where the losses are means over equally many valid pixels, batch norm is synchronised, and what is random
belongs to an image. Dropout, DIFF's noise and MADM's timestep and mixing are drawn by process (in MADM by
micro-batch), so these tests take dropout away, let all timesteps be one, and draw the rest by image. They
compute in float64, because at the corner of a ReLU a rounding error is not small in the gradient.

That two processes score sets of uneven lengths as one does is in test_base.py too; that they resume bit for
bit is in tests/callbacks/test_checkpoints.py.
"""

import os
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from callbacks.checkpoints import Checkpoints
from callbacks.finite import Finite
from callbacks.predictions import Predictions
from cli import build as build_from_config
from cli import resolve
from functional.class_mix import jitter_and_blur, mix_mask
from functional.noise import named_generator
from lightning_modules.batch_norm import SyncBatchNorm
from lightning_modules.diff import DIFFTraining
from lightning_modules.difffss import DifFSS
from lightning_modules.schedules import WarmupSteps
from lightning_modules.supervised import Supervised
from models.diff import latent_shape
from models.diffusion.stable_diffusion import StableDiffusion
from tests.fake_few_shot import fake_few_shot
from tests.lightning_modules.test_difffss import host
from tests.processes import exit_codes, in_processes
from tests.tiny_diff import tiny_diff
from tests.tiny_madm import Blocks, Pairs, spy
from tests.tiny_run import tiny_config, write_config
from tests.tiny_training import TinyDataModule, TinyDataset, tiny_module, tiny_trainer
from train import main

TWO = {"devices": 2, "strategy": "ddp"}
SYNCHRONISED = {**TWO, "sync_batchnorm": True, "plugins": [SyncBatchNorm()]}


def of_image(image, title=""):
    """The generator of an image, by its content."""
    return named_generator(f"{title}{float(image.double().sum())}")


def by_image(function):
    """Let each image of a batch draw from its own generator."""
    return lambda batch, generator: torch.cat([function(one[None], of_image(one)) for one in batch])


def without_dropout(network):
    for part in network.modules():
        if isinstance(part, nn.Dropout | nn.Dropout2d):
            part.p = 0.0
    return network


@contextmanager
def floats_are_doubles():
    """Inside the block what a method turns into float32 becomes float64."""
    before, torch.Tensor.float = torch.Tensor.float, torch.Tensor.double
    try:
        yield
    finally:
        torch.Tensor.float = before


def double(module):
    """Let the diffusion model of a method take float64."""
    for part in module.modules():
        if isinstance(part, StableDiffusion):
            part.dtype = part.vae_dtype = torch.float64
    return module


class FirstGradient(Callback):
    """Writes the first process's gradient of the first step, before it is clipped."""

    def __init__(self, path):
        self.path = path

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.is_global_zero and not self.path.exists():
            named = pl_module.named_parameters()
            torch.save({name: p.grad.clone() for name, p in named if p.grad is not None}, self.path)


def first_gradient(folder, processes, make, data):
    """Gradient of a step of four samples, shared among the processes; in a process of their own."""

    def run():
        path, options = folder / f"{processes}.pt", SYNCHRONISED if processes == 2 else {}
        options = {"enable_checkpointing": False, "precision": "64-true", **options}
        trainer = tiny_trainer(folder, 1, [FirstGradient(path)], **options)
        with floats_are_doubles():
            trainer.fit(double(make()), data(4 // processes))

    in_processes(run, processes)
    return torch.load(folder / f"{processes}.pt")


def assert_one_step_is_the_same(folder, make, data):
    one, two = (first_gradient(folder, processes, make, data) for processes in (1, 2))
    assert one and one.keys() == two.keys()
    size = max(gradient.abs().max() for gradient in one.values())
    worst = max((one[name] - two[name]).abs().max() for name in one)
    assert worst < 1e-9, f"{worst} of {size}"
    return size


class Plain(TinyDataModule):
    """Samples as they are, each with equally many valid pixels."""

    def __init__(self, batch_size):
        super().__init__(batch_size=batch_size)
        self.transform = None


class PlainBlocks(Plain):
    def train_dataset(self):
        return Blocks(6, 0)


def supervised():
    module = tiny_module()
    without_dropout(module.network).features.requires_grad_(True)
    return module


def test_two_processes_of_the_supervised_baseline_step_as_one_with_the_whole_batch(tmp_path):
    assert assert_one_step_is_the_same(tmp_path, supervised, Plain) > 0.01


def test_without_synchronised_batch_norm_they_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.SYNCHRONISED", TWO)
    with pytest.raises(AssertionError, match=r" of 0\.0"):
        assert_one_step_is_the_same(tmp_path, supervised, Plain)


def test_synchronised_batch_norm_keeps_the_running_statistics_of_all_and_leaves_with_the_run(tmp_path):
    kept = []
    for processes, options in ((1, {}), (2, SYNCHRONISED)):
        folder = tmp_path / str(processes)

        def run(folder=folder, processes=processes, options=options):
            module = supervised()
            module.network.features.requires_grad_(False)  # a bias before a batch norm learns rounding errors
            tiny_trainer(folder, 3, [Checkpoints()], **options).fit(module, Plain(4 // processes))
            assert type(module.network.norm) is nn.BatchNorm2d

        in_processes(run, processes)
        weights = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        kept.append({name: value for name, value in weights.items() if name.startswith("network.norm.")})
    torch.testing.assert_close(*kept, rtol=1e-3, atol=1e-4)
    assert kept[0]["network.norm.num_batches_tracked"] == 3


def test_the_command_synchronises_batch_norm_on_a_cpu(tmp_path):
    config = tiny_config()
    network = {"class_path": "tests.tiny_training.TinyNetwork"}
    config["model"]["init_args"]["network"] = network
    path = write_config(tmp_path / "run.yaml", config)
    words = ["--config", str(path), "--output", str(tmp_path / "run"), *COMMAND]
    in_processes(lambda: main([*words, "--trainer.sync_batchnorm", "true"]))
    weights = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert weights["network.norm.num_batches_tracked"] == 2


def test_two_processes_of_diff_step_as_one_with_the_whole_batch(tmp_path, model_folder, monkeypatch):
    def draw(backbone, image):
        shape = latent_shape(backbone.diffusion, image)
        drawn = torch.stack([torch.randn(shape, generator=of_image(one)) for one in image])
        return lambda step, count: drawn

    monkeypatch.setattr("models.diff.DIFFBackbone.draw_freely", draw)

    def make():
        return DIFFTraining(tiny_diff(model_folder, eta=0.0, share_noise=True), "deliver11")

    assert assert_one_step_is_the_same(tmp_path, make, PlainBlocks) > 1e-3


class Episodes(DifFSS):
    """Counts pixels without a label as background, so that all images count alike."""

    def training_step(self, batch, batch_idx):
        return super().training_step({**batch, "label": batch["label"] % 255}, batch_idx)


@pytest.mark.parametrize("kind", ["hsnet", "pfenet", "bam"])
def test_two_processes_of_a_few_shot_network_step_as_one_with_the_whole_batch(tmp_path, kind):
    def make():
        return Episodes(without_dropout(host(kind)), optimizer="adam", lr=1e-3, weight_decay=0.0)

    def data(batch_size):
        return fake_few_shot(size=32, batch_size=batch_size)

    assert assert_one_step_is_the_same(tmp_path, make, data) > 1e-3


@pytest.fixture
def drawn_by_image(monkeypatch):
    """MADM's mixing and augmentation belong to an image, whichever process or part it is in."""
    monkeypatch.setattr("lightning_modules.madm.mix_mask", by_image(mix_mask))
    monkeypatch.setattr("lightning_modules.madm.jitter_and_blur", by_image(jitter_and_blur))


def test_two_processes_of_madm_step_as_one_with_the_whole_batch(tmp_path, build, drawn_by_image):
    def make():
        return build(dplg_start=(60, 60))

    assert assert_one_step_is_the_same(tmp_path, make, Pairs) > 0.1


# --- MADM's mini experiment: first gradient, 50 steps, scores


def mini_madm(folder, processes, steps, callbacks=(), weights=None, **options):
    """Train the mini experiment on batches of four pairs, or score weights; return the mean IoU by set."""
    config = resolve([Path("conf/mini/madm_rgb2depth.yaml")])
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    model["network"]["init_args"] |= {"dropout": 0.0, "teacher_dropout": False}
    model |= {"dplg_start": [60, 60], "dplg_end_step": 25}
    data |= {"batch_size": 4 // processes, "num_workers": 0, "eval_batch_size": 3}
    data["target"]["init_args"]["eval_length"] = 25  # the last batches are uneven
    place = folder / str(processes)

    def run():
        torch.manual_seed(0)
        module, datamodule = build_from_config(config)
        arguments = {"limit_val_batches": 1.0 if steps != 1 else 0, "val_check_interval": max(steps, 1)}
        arguments |= options | (SYNCHRONISED if processes == 2 else {})
        trainer = tiny_trainer(place, steps, [Checkpoints(), *callbacks], **arguments)
        if weights is None:
            trainer.fit(double(module) if "precision" in options else module, datamodule)
        else:
            module.load_state_dict(weights, strict=False)
            trainer.validate(module, datamodule, verbose=False)
        if trainer.is_global_zero:
            torch.save(
                {k: float(v) for k, v in trainer.callback_metrics.items() if "IoU" in k}, place / "scores"
            )

    in_processes(run, processes, seconds=1800)
    return torch.load(place / "scores")


@pytest.mark.slow
def test_two_processes_of_the_mini_madm_have_the_first_gradient_of_one_with_the_whole_batch(
    tmp_path, drawn_by_image
):
    with floats_are_doubles():
        for processes in (1, 2):
            seen = FirstGradient(tmp_path / f"{processes}.pt")
            mini_madm(tmp_path, processes, 1, [seen], precision="64-true")
    one, two = (torch.load(tmp_path / f"{processes}.pt") for processes in (1, 2))
    assert one.keys() == two.keys() and max(gradient.abs().max() for gradient in one.values()) > 0.1
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-9


@pytest.mark.slow
def test_two_processes_train_the_mini_madm_as_well_as_one_and_score_the_same(tmp_path, drawn_by_image):
    scores = [mini_madm(tmp_path, processes, 50)["val/mIoU"] for processes in (1, 2)]
    assert abs(scores[0] - scores[1]) < 1, scores
    weights = torch.load(tmp_path / "1/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    same = [mini_madm(tmp_path, processes, 0, weights=weights) for processes in (1, 2)]
    assert same[0] == pytest.approx(same[1], nan_ok=True)
    assert same[0]["val/mIoU"] == pytest.approx(scores[0])


# --- scores, pictures, and another number of processes


class Uneven(TinyDataModule):
    """Sets of two and of five images: an image for each process; three and two in batches of two."""

    def eval_datasets(self, split):
        return {"two": TinyDataset(2, 1), "five": TinyDataset(5, 2)}


class Scores(Callback):
    def __init__(self, path):
        self.path = path

    def on_validation_end(self, trainer, pl_module):
        found = {k: v.item() for k, v in trainer.callback_metrics.items()}
        pixels = {name: int(m.matrix.sum()) for name, m in pl_module.matrices.items()}
        if trainer.is_global_zero:
            torch.save((found, pixels), self.path)


def validated(folder, processes):
    def run():
        options = {"enable_checkpointing": False, "limit_val_batches": 1.0, **(TWO if processes == 2 else {})}
        callbacks = [Scores(folder / f"{processes}.pt"), Predictions(3)]
        trainer = tiny_trainer(folder / str(processes), 1, callbacks, **options)
        trainer.validate(tiny_module(), Uneven(), verbose=False)

    in_processes(run, processes)
    pictures = sorted(path.name for path in (folder / f"{processes}/pictures").iterdir())
    return *torch.load(folder / f"{processes}.pt"), pictures


def test_each_image_of_uneven_sets_is_counted_once_and_drawn_once(tmp_path):
    """F26: different lengths by process, an uneven last batch."""
    (one, pixels, drawn), (two, _, drawn_by_two) = (validated(tmp_path, processes) for processes in (1, 2))
    assert two == pytest.approx(one, nan_ok=True)
    assert pixels == {"two": 2 * 14 * 16, "five": 5 * 14 * 16}
    images = [f"val-five-tiny-2-{i}.png" for i in range(5)] + [f"val-two-tiny-1-{i}.png" for i in range(2)]
    assert drawn == images[:3] + images[5:]
    assert set(drawn_by_two) < set(images) and len(drawn_by_two) == 4  # those that the first process predicts


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes_and_says_what_that_means(tmp_path, before, after):
    """F26: another number of processes."""

    def fit(processes, steps, resume=None):
        options = TWO if processes == 2 else {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = tiny_trainer(tmp_path, steps, [Checkpoints()], **options)
            trainer.fit(tiny_module(), TinyDataModule(), ckpt_path=resume, weights_only=True)
        if trainer.is_global_zero:
            (tmp_path / "warnings").write_text("\n".join(str(warning.message) for warning in caught))

    last = tmp_path / "checkpoints/last.ckpt"
    in_processes(lambda: fit(before, 2), before)
    assert "unbroken" not in (tmp_path / "warnings").read_text()
    in_processes(lambda: fit(after, 4, last), after)
    told = (tmp_path / "warnings").read_text()
    assert f"with {after} processes instead of {before}" in told and "unbroken" in told
    assert torch.load(last, weights_only=True)["global_step"] == 4


def test_all_processes_agree_on_the_best_also_by_a_score_of_each_process_alone(tmp_path):
    def run():
        checkpoints = Checkpoints(monitor="train/loss", mode="min")
        options = {"limit_val_batches": 1.0, "val_check_interval": 1, **TWO}
        trainer = tiny_trainer(tmp_path, 6, [checkpoints], **options)
        trainer.fit(tiny_module(), TinyDataModule())
        (tmp_path / str(trainer.global_rank)).write_text(str(checkpoints.best_score))

    in_processes(run)
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()


# --- failures


class FailsInOneProcess(Supervised):
    """Raises in the second step of the process whose rank is in the environment."""

    def training_step(self, batch, batch_idx):
        if self.global_step == 1:
            place = Path(os.environ["PLACE"])
            (place / f"process-{self.global_rank}").write_text(str(os.getpid()))
            if str(self.global_rank) == os.environ["FAILS"]:
                (place / "failed").write_text(str(time.time()))
                raise RuntimeError("this process fails")
        return super().training_step(batch, batch_idx)


def failing(tmp_path, monkeypatch, rank):
    """Words of a command whose process `rank` fails."""
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.setenv("FAILS", str(rank))
    config = tiny_config()
    config["trainer"]["max_steps"] = 5
    config["model"]["class_path"] = f"tests.lightning_modules.test_processes.{FailsInOneProcess.__name__}"
    path = write_config(tmp_path / "run.yaml", config)
    return ["--config", str(path), "--output", str(tmp_path / "run"), *COMMAND]


COMMAND = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_fails_ends_those_that_srun_or_torchrun_started(tmp_path, monkeypatch, rank):
    """F27: both end by themselves and with an error."""
    words = failing(tmp_path, monkeypatch, rank)
    codes, _ = exit_codes(lambda: main(words), seconds=60)
    assert None not in codes and 0 not in codes, codes
    assert time.time() - float((tmp_path / "failed").read_text()) < 30


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_fails_ends_the_command_and_leaves_no_process(tmp_path, monkeypatch, rank):
    """F27: through the command."""
    words = failing(tmp_path, monkeypatch, rank)
    found = subprocess.run([sys.executable, "train.py", *words], timeout=240, capture_output=True, text=True)
    assert time.time() - float((tmp_path / "failed").read_text()) < 30
    assert found.returncode != 0
    assert "this process fails" in found.stderr
    for process in range(2):
        pid = int((tmp_path / f"process-{process}").read_text())
        stat = Path(f"/proc/{pid}/stat")
        assert not stat.exists() or stat.read_text().split(") ")[1][0] == "Z"


class Overflow(Callback):
    """Makes the gradient of the second step infinite, and notes the scale and what a step must not touch."""

    def __init__(self):
        self.scales, self.rates, self.weights = [], [], []

    def on_after_backward(self, trainer, pl_module):
        if trainer.fit_loop.epoch_loop.batch_idx == 1:
            next(p for p in pl_module.parameters() if p.grad is not None).grad[0] = torch.inf

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.scales.append(trainer.precision_plugin.scaler.get_scale())
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        trained = [p for p in pl_module.network.parameters() if p.requires_grad]
        self.weights.append(torch.cat([p.detach().flatten() for p in trained]).clone())


@pytest.mark.parametrize("method", ["supervised", pytest.param("madm", marks=pytest.mark.slow)])
def test_an_overflow_of_float16_halves_the_scale_and_leaves_the_step_out(
    tmp_path, build, monkeypatch, method
):
    """F16: weights, schedule and teacher stay as they were."""
    options, updates = {"schedule": WarmupSteps(1.0)}, []
    module = build(**options) if method == "madm" else tiny_module(**options)
    if method == "madm":
        updates = spy(module, monkeypatch, "update_teacher")
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    found = Overflow()
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    trainer = tiny_trainer(tmp_path, 4, [found, Finite()], plugins=plugins, enable_checkpointing=True)
    trainer.fit(module, Pairs() if method == "madm" else TinyDataModule())
    assert found.scales == [16, 8, 8, 8]
    assert found.rates[0] == found.rates[1] < found.rates[2]
    same = [torch.equal(a, b) for a, b in pairwise(found.weights)]
    assert same == [True, False, False]
    assert [call[0] for call in updates] == ([0, 1, 3] if method == "madm" else [])
