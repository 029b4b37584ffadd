"""Steps with guards and steps without take turns in one training, and only the guards differ."""

import json

from benchmarks import guards
from benchmarks.guards import GUARDS, TakeTurns, main
from tests.tiny_run import tiny_config, write_config


def test_every_second_step_goes_without_guards(tmp_path, monkeypatch):
    seen = []
    note = TakeTurns.on_train_batch_end

    def watch(self, trainer, pl_module, *arguments):
        found = sum(isinstance(callback, GUARDS) for callback in trainer.callbacks)
        seen.append((found, "on_before_optimizer_step" in vars(pl_module)))
        note(self, trainer, pl_module, *arguments)

    monkeypatch.setattr(TakeTurns, "on_train_batch_end", watch)
    monkeypatch.setattr(guards, "CONFIGS", ())
    config, output = write_config(tmp_path / "tiny.yaml", tiny_config()), tmp_path / "guards.json"
    main(["--config", str(config), "--pairs", "3", "--warmup", "1", "--output", str(output)])
    assert seen[:8] == [(3, False), (0, True)] * 4
    found = json.loads(output.read_text())
    assert found["steps"][str(config)]["pairs"] == 3 and found["commit"]
