"""The README's Python runs as it stands."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def test_the_ten_lines_that_give_diffs_pyramid_to_another_head_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "DIFFBackbone" in block]
    assert len([line for line in block.splitlines() if line]) <= 10
    names: dict = {}
    exec(block, names)
    shapes = [tuple(level.shape) for level in names["levels"]]
    assert shapes == [(1, 32, 64, 64), (1, 64, 32, 32), (1, 128, 16, 16), (1, 256, 8, 8)]
    assert names["logits"].shape == (1, 11, 128, 128) and torch.isfinite(names["logits"]).all()
