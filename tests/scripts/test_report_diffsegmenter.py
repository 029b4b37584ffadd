"""The table of DiffSegmenter: every row is scored by the same rule, kept, and not scored twice."""

import json

import pytest
import torch

from config_files import UsageError
from functional.classes import class_table
from scripts import report_diffsegmenter
from scripts.report_diffsegmenter import Chance, PositionPrior, main, markdown

FULL = "--config conf/mini/diffsegmenter_objects.yaml --data.eval_length 1"


class Scenes:
    """Two labels of 2x2: the class 1 is at the first pixel always, 2 at the second half of the time."""

    labels = (((1, 2), (0, 0)), ((1, 0), (0, 0)))

    def train_dataset(self):
        return self

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return {"label": self.read_label(i)}

    def read_label(self, i):
        return torch.tensor(self.labels[i]).numpy()


def test_the_position_prior_is_stretched_by_class_only_beside_a_background():
    image, words = torch.rand(3, 2, 2), ["one", "two"]
    with_background = class_table(words)
    maps = PositionPrior(Scenes(), with_background).score_maps(image, "", words)
    assert maps.tolist() == [[[1, 0], [0, 0]], [[0, 1], [0, 0]]]
    without = class_table("fmb9")
    maps = PositionPrior(Scenes(), without).score_maps(image, "", without.words[1:3])
    assert maps.tolist() == [[[1, 0], [0, 0]], [[0, 0.5], [0, 0]]]


def test_chance_depends_on_the_scene_and_the_seed_only():
    image, words = torch.rand(3, 4, 4), ["a", "b"]
    first, again, other, seed = (
        Chance(seed).score_maps(image, name, words) for seed, name in ((0, "x"), (0, "x"), (0, "y"), (1, "x"))
    )
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first, seed)
    assert first.shape == (2, 4, 4)


@pytest.fixture
def plan(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text(f"objects:\n  cross: {FULL} --model.network.self_power 0\n  full: {FULL}\n")
    return file


def test_rows_are_scored_once_by_candidates_and_drawn(plan, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(report_diffsegmenter.Path(__file__).parents[2])
    only = ["moon", "bell"]  # of the words asked for, so that a scene takes a second
    monkeypatch.setattr(
        report_diffsegmenter.AllCandidates,
        "__call__",
        lambda self, batch, table: [sorted(map(table.names.index, only))],
    )
    monkeypatch.setattr(
        report_diffsegmenter.LabelCandidates,
        "__call__",
        lambda self, batch, table: [[table.names.index("bell")]],
    )
    arguments = ["--plan", str(plan), "--seeds", "0", "--output", str(tmp_path / "out")]
    main(arguments)
    found = json.loads((tmp_path / "out/objects-full-0.json").read_text())
    assert set(found) == {"words", "labels", "all"} and found["labels"] != found["all"]
    assert 0 < found["labels"]["threshold"] < 1
    names = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()]
    assert [name for name in names if name.startswith("| ") and "%" not in name] == 2 * [
        "| chance",
        "| position prior",
        "| cross",
        "| full",
    ]
    assert (tmp_path / "out/objects.png").is_file()
    monkeypatch.setattr(report_diffsegmenter, "measure", None)  # nothing is measured again
    main(arguments)


def test_tables_are_apart_by_candidates():
    result = {
        kind: {"mIoU": {"objects": 10.0 + i, "mean": 10.0 + i}} for i, kind in enumerate(("labels", "all"))
    }
    text = markdown({"objects": {"full": {0: result}}})
    assert "### objects, candidates: labels (oracle)" in text and "| full | 1 | 11.0 | 11.0 |" in text


def test_results_of_other_options_are_not_mixed_in(plan, tmp_path, monkeypatch):
    monkeypatch.chdir(report_diffsegmenter.Path(__file__).parents[2])
    found = {"words": "--config other.yaml"}
    (tmp_path / "objects-chance-0.json").write_text(json.dumps(found))
    with pytest.raises(UsageError, match="made with other options"):
        main(["--plan", str(plan), "--seeds", "0", "--output", str(tmp_path)])
