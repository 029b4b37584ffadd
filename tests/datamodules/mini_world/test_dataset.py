import re

import numpy as np
import pytest
import torch

from datamodules.mini_world.datamodule import MiniObjectsDataModule, MiniStreetDataModule
from datamodules.mini_world.dataset import MiniObjectsDataset, MiniStreetDataset
from datamodules.mini_world.objects import CATEGORIES, FOLDS
from datamodules.mini_world.street import CONDITIONS, MODALITIES, render_street
from datamodules.workers import WorkerLoader
from functional.classes import class_table


def street(**options):
    return MiniStreetDataset(**{"split": "val", "length": 5, "size": 64} | options)


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_street_sample_of_each_sensor_is_a_three_channel_image_with_label_name_and_caption(modality):
    sample = street(modality=modality)[3]
    assert sample["image"].shape == (64, 64, 3) and sample["image"].dtype == np.uint8
    assert sample["label"].shape == (64, 64) and sample["label"].dtype == np.uint8
    assert sample["name"].startswith("street-val-000003-") and sample["name"].split("-")[-1] in CONDITIONS
    assert sample["caption"].startswith("a photo of ")
    assert np.array_equal(sample["label"], street()[3]["label"])
    assert modality == "rgb" or not np.array_equal(sample["image"], street()[3]["image"])


def test_depth_is_shown_on_a_log_scale_from_one_to_a_hundred_metres():
    metres = render_street("val", 0, size=64, sensors=("depth",))["depth"]
    grey = street(modality="depth")[0]["image"][..., 1]
    assert np.abs(grey - np.clip(127.5 * np.log10(metres), 0, 255)).max() <= 0.51
    assert (grey[metres == 200] == 255).all()


def test_conditions_are_taken_in_turn_and_by_default_are_each_scenes_own():
    names = [street(conditions=["fog", "night"])[i]["name"] for i in range(4)]
    assert [name.split("-")[-1] for name in names] == ["fog", "night", "fog", "night"]
    own = [street()[i]["name"].split("-")[-1] for i in range(5)]
    assert own == [render_street("val", i, size=64)["condition"] for i in range(5)]


def test_style_changes_the_colours_but_not_the_label():
    game, real = street(style="game")[0], street(style="real")[0]
    assert np.array_equal(game["label"], real["label"]) and not np.array_equal(game["image"], real["image"])


def test_offset_moves_the_first_scene():
    moved, plain = street(offset=2)[0], street()[2]
    assert moved["name"] == plain["name"] and np.array_equal(moved["image"], plain["image"])
    objects = MiniObjectsDataset("val", 1, offset=4)[0]
    assert np.array_equal(objects["image"], MiniObjectsDataset("val", 5)[4]["image"])


def test_a_label_can_be_had_alone_and_has_a_name_of_its_own():
    for dataset in (street(offset=2, modality="event"), MiniObjectsDataset("val", 5, offset=2)):
        assert np.array_equal(dataset.read_label(1), dataset[1]["label"])
        assert dataset.label_names[1] == "val-000003-64px" and len(set(dataset.label_names)) == 5


def test_a_scene_is_drawn_once(monkeypatch):
    dataset, drawn = street(), []
    original = dataset.render
    monkeypatch.setattr(dataset, "render", lambda index: drawn.append(index) or original(index))
    first, second = dataset[1], dataset[1]
    assert drawn == [1] and first["image"] is second["image"] and first is not second


def test_object_samples_hold_only_the_asked_categories_under_their_ids_of_the_whole_table():
    dataset = MiniObjectsDataset("train", 12, size=64, categories=FOLDS[1])
    ids = set(np.unique([dataset[i]["label"] for i in range(12)])) - {0}
    assert ids <= {1 + CATEGORIES.index(name) for name in FOLDS[1]} and len(ids) > 2
    assert dataset[7]["name"] == "objects-train-000007"
    assert any(name in dataset[7]["caption"] for name in FOLDS[1])


@pytest.mark.parametrize(
    "options", [{"split": "tests"}, {"length": 0}, {"size": 32}, {"style": "film"}, {"modality": "radar"},
                {"conditions": ["dusk"]}, {"conditions": []}, {"conditions": "night"}, {"offset": -1}]
)  # fmt: skip
def test_wrong_options_are_errors_when_the_dataset_is_made(options):
    with pytest.raises(ValueError, match=re.escape(str(next(iter(options.values()))))):
        street(**options)


def test_a_dataset_ends_after_its_length():
    assert len(list(street())) == 5
    with pytest.raises(IndexError):
        street()[5]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_do_not_change_the_batches(workers):
    loader = WorkerLoader(MiniObjectsDataset("val", 6), batch_size=3, num_workers=workers)
    images = torch.cat([batch["image"] for batch in loader])
    expected = np.stack([MiniObjectsDataset("val", 6)[i]["image"] for i in range(6)])
    assert np.array_equal(images.numpy(), expected)


def test_the_street_datamodule_gives_batches_and_one_set_per_condition():
    data = MiniStreetDataModule(size=64, train_length=4, eval_length=3, batch_size=2, eval_batch_size=3)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 64, 64) and batch["label"].dtype == torch.int64
    assert len(batch["caption"]) == len(batch["name"]) == 2 and batch["name"][0].startswith("street-train")
    assert data.val_set_names == list(CONDITIONS) == data.test_set_names
    for condition, loader in zip(CONDITIONS, data.val_dataloader(), strict=True):
        names = next(iter(loader))["name"]
        assert names == [f"street-val-00000{i}-{condition}" for i in range(3)]


def test_training_and_evaluation_can_differ_in_style_and_sensor():
    options = {"size": 64, "train_length": 1, "eval_length": 1}
    plain = MiniStreetDataModule(**options)
    gap = MiniStreetDataModule(
        **options, train_style="game", eval_modality="depth", train_conditions=["snow"]
    )
    assert gap.train_dataset()[0]["name"].endswith("snow")
    assert not np.array_equal(gap.train_dataset()[0]["image"], plain.train_dataset()[0]["image"])
    depth, rgb = gap.eval_datasets("test")["day"][0]["image"], plain.eval_datasets("test")["day"][0]["image"]
    assert (depth[..., 0] == depth[..., 2]).all() and not np.array_equal(depth, rgb)
    same = MiniStreetDataModule(**options, modality="depth")
    assert np.array_equal(same.eval_datasets("test")["day"][0]["image"], depth)
    game = MiniStreetDataModule(**options, eval_style="game").eval_datasets("test")["day"][0]["image"]
    assert not np.array_equal(game, rgb)


def test_evaluation_scenes_can_have_a_size_of_their_own():
    data = MiniStreetDataModule(size=80, eval_size=64, train_length=1, eval_length=1, eval_conditions=["day"])
    assert data.train_dataset()[0]["image"].shape == (80, 80, 3)
    assert data.eval_datasets("val")["day"][0]["image"].shape == (64, 64, 3)


def test_evaluation_can_be_restricted_to_some_conditions():
    data = MiniStreetDataModule(size=64, train_length=1, eval_length=1, eval_conditions=["snow", "day"])
    assert data.test_set_names == ["snow", "day"]
    assert data.eval_datasets("test")["snow"][0]["name"].endswith("snow")


def test_the_object_datamodule_restricts_categories():
    data = MiniObjectsDataModule(
        categories=["mug", "key"], size=80, train_length=3, eval_length=2, batch_size=3
    )
    batch = next(iter(data.train_dataloader()))
    allowed = {0, 1 + CATEGORIES.index("mug"), 1 + CATEGORIES.index("key")}
    assert batch["image"].shape == (3, 3, 80, 80) and set(batch["label"].unique().tolist()) <= allowed
    assert data.val_set_names == ["objects"] and len(data.eval_datasets("test")["objects"]) == 2
    everything = MiniObjectsDataModule(train_length=20).train_dataset()
    assert set(np.unique([everything[i]["label"] for i in range(20)])) - allowed


@pytest.mark.parametrize(
    "module, table", [(MiniStreetDataModule, "deliver11"), (MiniObjectsDataModule, "mini_objects")]
)
def test_a_datamodule_names_its_class_table_and_refuses_another(module, table):
    assert class_table(module().classes).name == table
    with pytest.raises(ValueError, match="cityscapes19"):
        module(classes="cityscapes19")
