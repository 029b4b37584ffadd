"""A step whose gradient was not finite runs again from its file alone, to the same numbers."""

import pytest
import torch
import yaml
from torch import nn

from lightning_modules.supervised import Supervised
from scripts.replay_step import main, replay
from tests.tiny_run import TinyNetwork, tiny_config, write_config
from train import main as train


class Unstable(TinyNetwork):
    """Divides by zero from its fourth training step on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.divide, self.dropout = Divide(), nn.Dropout(0.5)

    def forward(self, image):
        if self.training:
            self.steps += 1
        hidden = self.dropout(self.stem(image))
        return self.head(self.divide(hidden, self.steps >= 4))


class Divide(nn.Module):
    def forward(self, x, by_zero):
        return x / 0 if by_zero else x


@pytest.fixture(params=[1, 2])
def run(tmp_path, monkeypatch, capsys, request):
    monkeypatch.chdir(tmp_path)
    config = tiny_config()
    config["model"]["init_args"]["network"] = {"class_path": "tests.scripts.test_replay_step.Unstable"}
    # With two batches in a step the second of the second step is the first that goes wrong.
    config["trainer"] |= {"max_steps": 20, "val_check_interval": 20, "accumulate_grad_batches": request.param}
    config["finite"] = {"budget": 2}
    path = write_config(tmp_path / "unstable.yaml", config)
    with pytest.raises(SystemExit) as stop:
        train(["--config", str(path)])
    assert stop.value.code == 1
    assert "python -m scripts.replay_step runs/unstable/non_finite/rank-0.ckpt" in capsys.readouterr().err
    return tmp_path / "runs/unstable"


def test_the_first_module_and_the_samples_are_named(run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    main([str(run / "non_finite/rank-0.ckpt")])
    printed = capsys.readouterr().out
    assert "first module whose output is not finite: network.divide (Divide)" in printed
    assert "norm of the gradient: nan" in printed and "network.head.weight" in printed
    assert "samples: random-" in printed and "train/loss: nan" in printed
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_random_numbers_are_those_of_the_step(run, monkeypatch):
    file = run / "non_finite/rank-0.ckpt"
    masks = []
    forward = nn.Dropout.forward
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: masks.append(forward(self, x)) or masks[-1])
    assert replay(file)[0].names and replay(file)[0].names
    first, second = masks[: len(masks) // 2], masks[len(masks) // 2 :]
    assert len(masks) in (2, 4) and all(map(torch.equal, first, second))
    checkpoint = torch.load(file, weights_only=True)
    batches = len(checkpoint["replay"]["batches"])
    assert (checkpoint["global_step"], batches) in ((3, 1), (1, 2))


def test_another_process_s_part_is_replayed_on_the_state_of_the_first(run):
    file = run / "non_finite/rank-1.ckpt"
    step = torch.load(file.with_name("rank-0.ckpt"), weights_only=True)["replay"] | {"rank": 1}
    torch.save({"replay": step}, file)
    ranks = []
    forward = Divide.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Supervised, "on_train_start", lambda self: ranks.append(self.global_rank))
        watched, _ = replay(file)
    assert ranks == [1] and watched.names and Divide.forward is forward


def test_another_checkpoint_is_refused(run, capsys, tmp_path):
    config = yaml.safe_load((tmp_path / "unstable.yaml").read_text())
    config["trainer"]["max_steps"] = 2
    train(["--config", str(write_config(tmp_path / "short.yaml", config))])
    with pytest.raises(SystemExit):
        main([str(tmp_path / "runs/short/checkpoints/last.ckpt")])
    assert "is no step to replay" in capsys.readouterr().err
