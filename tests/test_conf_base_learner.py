"""The two parts in which mini-20i's backbones and base learners are made, one step each."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from cli import load_model, resolve
from scripts.export_weights import main as export
from train import main as train

MINI = Path(__file__).parent.parent / "conf/mini"


def test_the_backbone_sees_no_novel_category_and_stays_frozen_when_the_head_does():
    first, second = (resolve([MINI / f"base_learner{part}.yaml"]) for part in ("", "_head"))
    assert first["data"]["init_args"]["with_novel"] is False
    assert second["data"]["init_args"]["with_novel"] is True
    assert second["model"]["init_args"]["network"]["init_args"]["frozen_backbone"] is True


def test_the_second_part_starts_from_the_first_and_changes_no_tensor_of_the_backbone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # below which the second part looks for the first
    small = "--data.size 64 --data.train_length 4 --data.eval_length 1 --data.batch_size 2 --data.fold 2"
    short = f"{small} --trainer.max_steps 1 --wandb.mode disabled".split()
    train(["--config", str(MINI / "base_learner.yaml"), "--output", "one", *short])
    export(["one", "work/base2.safetensors"])
    train(["--config", str(MINI / "base_learner_head.yaml"), "--output", "two", *short])
    export(["two", "whole.safetensors"])
    before, after = load_file("work/base2.safetensors"), load_file("whole.safetensors")
    assert before.keys() == after.keys()
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"ppm", "cls"}
    saved = torch.load("two/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert not any(k.endswith("conv1.weight") for k in saved)  # frozen weights are not saved twice
    assert load_model(Path("two"), "last")[0].network.frozen_backbone
