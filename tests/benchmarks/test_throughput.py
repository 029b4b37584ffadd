import json

import pytest
import torch

from benchmarks.throughput import BareLoop, Interleave, main, measure_attention
from lightning_modules.schedules import WarmupPoly
from tests.tiny_model import write_tiny_model
from tests.tiny_run import tiny_config, write_config
from tests.tiny_training import TinyDataModule, tiny_module, tiny_trainer


def weights(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def module(seed: int = 0, **arguments):
    """Without dropout, so that two loops that take turns draw no random numbers from each other."""
    built = tiny_module(seed, **arguments)
    built.network.dropout.p = 0.0
    return built


@pytest.mark.parametrize("schedule", [None, WarmupPoly(warmup_steps=2)])
def test_the_bare_loop_takes_the_same_steps_as_the_trainer(tmp_path, schedule):
    ours, plain = module(schedule=schedule), module(schedule=schedule)
    before = weights(plain)
    timing = Interleave(BareLoop(plain, TinyDataModule(), max_steps=3), pairs=2)
    tiny_trainer(tmp_path, 3, [timing]).fit(ours, datamodule=TinyDataModule())
    assert not torch.equal(weights(plain), before)
    torch.testing.assert_close(weights(plain), weights(ours))


def test_each_step_after_the_first_is_timed_in_both_loops(tmp_path):
    timing = Interleave(BareLoop(module(), TinyDataModule(), max_steps=4), pairs=3)
    tiny_trainer(tmp_path, 4, [timing]).fit(module(), datamodule=TinyDataModule())
    assert len(timing.ours) == len(timing.plain) == len(timing.waits) == 3
    assert all(0 < wait < step for wait, step in zip(timing.waits, timing.ours, strict=True))
    assert min(timing.plain) > 0


def test_the_command_measures_as_many_pairs_of_a_config_as_it_is_told(tmp_path, monkeypatch):
    totals = []

    class Recorded(Interleave):
        def on_train_end(self, trainer, pl_module):
            totals.append(len(self.ours))
            super().on_train_end(trainer, pl_module)

    monkeypatch.setattr("benchmarks.throughput.Interleave", Recorded)
    experiment = tiny_config()
    experiment["model"]["init_args"]["classes"] = "deliver11"
    experiment["data"] = {"class_path": "tests.tiny_training.TinyDataModule"}
    config = write_config(tmp_path / "tiny.yaml", experiment)
    output = tmp_path / "new" / "result.json"
    main(["--config", str(config), "--pairs", "4", "--warmup", "1", "--output", str(output)])
    result = json.loads(output.read_text())
    low, high = result["loop"]["ours_over_bare_quartiles"]
    assert result["config"] == str(config) and result["loop"]["pairs"] == 4 and totals == [5]
    assert low <= result["loop"]["ours_over_bare"] <= high and 0 < result["loop"]["data_wait_share"] < 1


def test_too_few_pairs_for_quartiles_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--pairs", "1"])
    assert "at least 2 pairs" in capsys.readouterr().err


@pytest.mark.cuda
def test_both_attention_back_ends_are_timed_on_the_device(tmp_path):
    pytest.importorskip("xformers")
    seconds = measure_attention(str(write_tiny_model(tmp_path)), repeats=3)
    assert set(seconds) == {"sdpa", "xformers"} and min(seconds.values()) > 0
