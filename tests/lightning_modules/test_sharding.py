"""FSDP in two processes learns what DDP does; its checkpoints are those of any run; who cannot is refused."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from callbacks.checkpoints import Checkpoints
from callbacks.finite import Finite
from cli import load_model
from lightning_modules.diff import DIFFTraining
from lightning_modules.difffss import DifFSS
from lightning_modules.sharding import FSDP
from lightning_modules.supervised import Supervised
from models.diffusion.stable_diffusion import StableDiffusion
from models.segmenter import DiffusionSegmenter
from tests.processes import in_processes, smooth
from tests.tiny_diff import tiny_diff
from tests.tiny_madm import Pairs
from tests.tiny_run import tiny_config, write_config
from tests.tiny_training import TinyDataModule, TinyDataset, assert_equal, tiny_module, tiny_trainer
from train import main


def shards(parameters):
    """Share of the parameters' numbers that lies in this process."""
    parameters = list(parameters)
    local = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in parameters)
    return local / sum(p.numel() for p in parameters)


class Half(Callback):
    """Fails unless about half of what is trained, of its gradients and of the moments is in this process."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        trained = [p for p in pl_module.parameters() if p.requires_grad]
        assert 0.35 < shards(trained) < 0.65
        assert 0.35 < shards(p.grad for p in trained if p.grad is not None) < 0.65
        assert shards(p for p in pl_module.parameters() if not p.requires_grad) > 0.99 or self.teacher(
            pl_module
        )

    def on_train_end(self, trainer, pl_module):
        moments = [s["exp_avg"] for s in trainer.optimizers[0].state.values() if "exp_avg" in s]
        assert not moments or 0.35 < shards(moments) < 0.65

    def teacher(self, pl_module):
        return hasattr(pl_module.network, "ema_adapter")


def train(
    folder, make, strategy, steps=4, data=TinyDataModule, resume=None, processes=2, callbacks=(), **options
):
    """Train in processes of their own and return the last checkpoint."""

    def run():
        trainer = tiny_trainer(
            folder,
            steps,
            [Checkpoints(2, keep_last=2), Finite(), *callbacks],
            devices=processes,
            strategy=strategy,
            **options,
        )
        trainer.fit(make(), data(), ckpt_path=resume, weights_only=True)

    in_processes(run, processes)
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


def assert_close(sharded, other, **tolerance):
    """Both checkpoints hold the same tensors, and the same state of the optimiser."""
    a, b = sharded["state_dict"], other["state_dict"]
    assert list(a) == list(b)
    torch.testing.assert_close(a, b, **tolerance)
    (a,), (b,) = sharded["optimizer_states"], other["optimizer_states"]
    assert a["param_groups"] == b["param_groups"]
    torch.testing.assert_close(a["state"], b["state"], **tolerance)


CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def tiny():
    """The tiny segmenter without dropout."""
    module = tiny_module()
    module.network.dropout = nn.Identity()
    return module


def test_two_sharded_processes_learn_what_two_of_ddp_do_and_go_on_from_each_others_checkpoint(tmp_path):
    clipped = {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}
    ends = {
        name: train(tmp_path / name, tiny, strategy, callbacks=callbacks, **clipped)
        for name, strategy, callbacks in (("ddp", "ddp", []), ("fsdp", FSDP(), [Half()]))
    }
    assert_close(ends["fsdp"], ends["ddp"], **CLOSE)
    for before, strategy in (("fsdp", FSDP()), ("fsdp", "ddp"), ("ddp", FSDP())):
        stopped = tmp_path / before / "checkpoints/step-2.ckpt"
        resumed = train(tmp_path / "resumed", tiny, strategy, resume=stopped, **clipped)
        assert_close(resumed, ends["ddp"], **CLOSE)
        if before == "fsdp" and strategy != "ddp":
            assert_equal(resumed["state_dict"], ends["fsdp"]["state_dict"])


def test_all_processes_validate_on_the_running_statistics_of_the_first(tmp_path):
    scores = []

    class Same(Callback):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            mean = pl_module.network.norm.running_mean
            first, second = pl_module.all_gather(mean)
            assert torch.equal(first, second) and mean.abs().max() > 0

    options = {"limit_val_batches": 1.0, "val_check_interval": 2, "callbacks": [Same()]}
    for name, strategy in (("ddp", "ddp"), ("fsdp", FSDP())):
        found = train(tmp_path / name, tiny, strategy, 2, **options)
        scores.append(found["callbacks"]["Checkpoints"]["best_score"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-3) and scores[0] > 0


class Uneven(TinyDataModule):
    """A set of three images in batches of one: the processes have different numbers of batches."""

    def __init__(self):
        super().__init__()
        self.eval_batch_size = 1

    def eval_datasets(self, split):
        return {"three": TinyDataset(3, 1)}


def test_processes_with_different_numbers_of_batches_validate_and_train_on(tmp_path):
    class Whole(Callback):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            assert shards(pl_module.parameters()) == 1

    found, options = [], {"limit_val_batches": 1.0, "val_check_interval": 2, "data": Uneven}
    for name, strategy, callbacks in (("ddp", "ddp", []), ("fsdp", FSDP(), [Half(), Whole()])):
        found.append(train(tmp_path / name, tiny, strategy, callbacks=callbacks, **options))
    assert_close(found[1], found[0], **CLOSE)
    scores = [end["callbacks"]["Checkpoints"]["best_score"] for end in found]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3) and scores[0] > 0


def segmenter(folder, checkpointing):
    torch.manual_seed(0)
    diffusion = StableDiffusion(str(folder))
    options = {"embed_channels": 8, "channels": 8, "dropout": 0.0, "train_unet": True}
    network = DiffusionSegmenter(
        diffusion, 11, layers=(5, 8), gradient_checkpointing=checkpointing, **options
    )
    module = Supervised(network, "deliver11", lr=0.02)
    module.optimizer_name = "sgd"  # adaptive steps would be as large for gradients that are rounding errors
    return module


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_sharded_u_net_that_stops_at_its_last_tap_learns_what_ddp_does(
    tmp_path, model_folder, checkpointing
):
    make, found = partial(segmenter, model_folder, checkpointing), []
    with smooth():
        for strategy, callbacks in (("ddp", []), (FSDP(), [Half()])):
            found.append(train(tmp_path / str(len(found)), make, strategy, 3, callbacks=callbacks))
    assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
    moved = [
        k for k, v in make().state_dict().items() if k in found[0]["state_dict"] and v.is_floating_point()
    ]
    assert moved


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"train_output_layers": True, "gradient_checkpointing": True}])
def test_sharded_madm_learns_what_ddp_does_its_teacher_included(tmp_path, build, options):
    def make():
        module = build(options, lr=0.02, max_gradient_norm=1.0, micro_batches=2)
        module.optimizer_name = "sgd"
        return module

    found, pairs = [], partial(Pairs, 2)
    with smooth():
        for strategy, callbacks in (("ddp", []), (FSDP(), [Half()])):
            found.append(train(tmp_path / str(len(found)), make, strategy, 3, pairs, callbacks=callbacks))
    assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
    weights = found[1]["state_dict"]
    assert any(name.startswith("network.ema_adapter.") for name in weights)
    torch.manual_seed(1)
    module = make()
    module.load_state_dict(weights, strict=False)
    assert all(
        torch.equal(weights[name], value) for name, value in module.state_dict().items() if name in weights
    )


# --- who cannot, and the command


def test_methods_that_cannot_be_sharded_are_refused_before_anything_is_set_up(build, model_folder):
    modules = [
        build({"ema_unet": True}),
        DIFFTraining(tiny_diff(model_folder), "deliver11"),
        DifFSS(nn.Conv2d(3, 2, 1)),
    ]
    for module in modules:
        name = type(module).__name__
        with pytest.raises(ValueError, match=rf"cannot train {name}.*found trainer.*Set trainer.strategy to"):
            FSDP().connect(module)
    FSDP().connect(build())


OVERLAY = "conf/fsdp.yaml"


class Unsharded(Supervised):
    """Stands for a method that FSDP does not know."""

    sharded_calls = None


def test_the_command_refuses_with_a_short_message(tmp_path, capsys):
    config = tiny_config()
    config["model"]["class_path"] = "tests.lightning_modules.test_sharding.Unsharded"
    path = write_config(tmp_path / "run.yaml", config)
    with pytest.raises(SystemExit) as leaving:
        main(["--config", str(path), "--config", OVERLAY, "--output", str(tmp_path / "run")])
    assert leaving.value.code == 2
    assert "FSDP cannot train Unsharded" in capsys.readouterr().err
    assert not (tmp_path / "run/checkpoints").exists()


def test_lightnings_own_fsdp_is_refused_and_the_overlay_named(tmp_path, capsys):
    path = write_config(tmp_path / "run.yaml", tiny_config())
    with pytest.raises(SystemExit) as leaving:
        main(["--config", str(path), "--output", str(tmp_path / "run"), "--trainer.strategy", "fsdp"])
    assert leaving.value.code == 2 and OVERLAY in capsys.readouterr().err


def test_the_overlay_trains_by_the_command_and_the_checkpoint_loads_without_fsdp(tmp_path):
    path, folder = write_config(tmp_path / "run.yaml", tiny_config()), tmp_path / "run"
    words = ["--config", str(path), "--output", str(folder), "--trainer.devices", "2"]
    in_processes(lambda: main([*words, "--config", OVERLAY]))
    model, config, step, _ = load_model(folder, "last")
    assert step == 2 and config["trainer"]["strategy"]["class_path"] == "lightning_modules.sharding.FSDP"
    plain = tmp_path / "plain"
    words[words.index(str(folder))] = str(plain)
    in_processes(lambda: main([*words, "--trainer.strategy", "ddp"]))
    expected, *_ = load_model(plain, "last")
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), **CLOSE)
