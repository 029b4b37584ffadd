"""One source to learn from, several targets to be scored on."""

from itertools import islice

import pytest
import torch

from cli import build
from datamodules.generalization import GeneralizationDataModule
from datamodules.mini_world.datamodule import MiniStreetDataModule
from datamodules.rare_classes import RareClassSamples
from tests.label_files import LENGTH, RARE, Source, forget_labels
from tests.tiny_training import TinyDataModule, TinyDataset


class Other(TinyDataModule):
    def __init__(self, *names: str):
        super().__init__()
        self.names = names

    def eval_datasets(self, split):
        return {name: TinyDataset(2, 50 + i) for i, name in enumerate(self.names)}


def generalization(*targets, **options) -> GeneralizationDataModule:
    return GeneralizationDataModule(Source(), list(targets or [Other("city")]), **options)


def test_training_batches_are_the_sources_and_go_on_where_they_were():
    data = generalization(batch_size=2)
    batches = list(islice(data.train_dataloader(), 3 * LENGTH // 2))
    names = [name for batch in batches for name in batch["name"]]
    assert all(name.startswith("source") for name in names)
    assert sorted(names[:LENGTH]) == sorted(f"source-{i}" for i in range(LENGTH))
    data.batches_drawn = 4
    again = next(iter(data.train_dataloader()))
    assert again["name"] == batches[4]["name"] and torch.equal(again["image"], batches[4]["image"])


def test_rare_classes_are_drawn_if_asked_for():
    assert isinstance(generalization(rare_class_sampling=RARE).training_samples(), RareClassSamples)
    assert not isinstance(generalization().training_samples(), RareClassSamples)


def test_each_targets_sets_are_scored_under_their_names_in_order():
    data = generalization(Other("city", "rain"), Other("night"))
    assert data.val_set_names == data.test_set_names == ["city", "rain", "night"]
    assert [len(loader.dataset) for loader in data.test_dataloader()] == [2, 2, 2]


def test_the_seed_changes_what_is_drawn():
    first = [
        next(iter(generalization(seed=seed, batch_size=4).train_dataloader()))["name"] for seed in (0, 1)
    ]
    assert first[0] != first[1]


def test_one_name_for_two_sets_is_an_error():
    with pytest.raises(ValueError, match="found city twice"):
        generalization(Other("city"), Other("city")).eval_datasets("val")


def test_other_class_tables_and_no_target_are_errors():
    other = Other("city")
    other.classes = "fmb9"
    with pytest.raises(ValueError, match="'deliver11', 'fmb9'"):
        generalization(other)
    with pytest.raises(ValueError, match="found 0"):
        GeneralizationDataModule(Source(), [])


def test_a_source_without_labels_is_an_error(monkeypatch):
    forget_labels(monkeypatch, type(Source().train_dataset()))
    with pytest.raises(ValueError, match="needs labels"):
        generalization().train_dataloader()


def test_game_to_real_needs_plain_config_values_only():
    street = "datamodules.mini_world.datamodule.MiniStreetDataModule"
    source = {"train_style": "game", "train_conditions": ["day"], "train_length": 3, "size": 64}
    target = {"eval_style": "real", "eval_length": 1, "size": 64}
    options = {
        "source": {"class_path": street, "init_args": source},
        "targets": [{"class_path": street, "init_args": target}],
    }
    path = "datamodules.generalization.GeneralizationDataModule"
    _, data = build({"data": {"class_path": path, "init_args": options}})
    assert isinstance(data.source, MiniStreetDataModule)
    assert data.test_set_names == ["day", "night", "fog", "rain", "snow"]
    assert data.train_dataset()[0]["label"].shape == (64, 64)
