"""Training on labels."""

import torch

from lightning_modules.supervised import SourceOnly
from tests.tiny_training import TinyDataModule, TinyNetwork, tiny_module, tiny_trainer


def test_training_changes_exactly_what_is_trainable_and_learns(tmp_path):
    module = tiny_module(lr=3e-2)
    module.network.dropout.p = 0.0
    before = {name: weight.clone() for name, weight in module.network.named_parameters()}
    data = TinyDataModule(length=2)
    data.transform = None
    trainer = tiny_trainer(tmp_path, 60, enable_checkpointing=False)
    trainer.fit(module, data)
    changed = {n for n, weight in module.network.named_parameters() if not torch.equal(weight, before[n])}
    assert changed == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert trainer.callback_metrics["train/loss"] < 2.3  # chance is log(11) = 2.398
    assert trainer.callback_metrics["train/pixel_accuracy"] > 100 / 11


def test_the_source_of_a_joined_batch_is_learnt_from():
    module, baseline = tiny_module(), SourceOnly(TinyNetwork(), classes="deliver11")
    baseline.network.load_state_dict(module.network.state_dict())
    for rule in (module, baseline):
        rule.network.dropout.p = 0.0
        rule.log = lambda *args, **kwargs: None
    batch = {"image": torch.rand(1, 3, 16, 16), "label": torch.zeros(1, 16, 16, dtype=torch.long)}
    joined = {"source": batch, "target": {"image": torch.rand(1, 3, 16, 16)}}
    torch.testing.assert_close(baseline.training_step(joined, 0), module.training_step(batch, 0))
