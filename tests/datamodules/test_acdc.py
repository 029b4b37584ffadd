"""ACDC in both layouts: four conditions scored each on its own, or all in one set."""

import numpy as np
import pytest
from PIL import Image

from datamodules.acdc import ACDCDataModule
from tests.fake_data import write_acdc

CONDITIONS = ("fog", "night", "rain", "snow")
STEM = "night/val/GOPR0475/GOPR0475_night_frame_000041"


def test_each_condition_is_an_evaluation_set(tmp_path):
    write_acdc(tmp_path)
    data = ACDCDataModule(tmp_path)
    assert data.val_set_names == data.test_set_names == [f"acdc-{condition}" for condition in CONDITIONS]
    sets = data.eval_datasets("val")
    assert [len(dataset) for dataset in sets.values()] == [2, 2, 2, 2]
    sample = sets["acdc-night"][0]
    assert sample["name"] == f"rgb_anon/{STEM}_rgb_anon"
    label = np.asarray(Image.open(tmp_path / f"gt/{STEM}_gt_labelTrainIds.png"))
    assert np.array_equal(sample["label"], label)


def test_all_conditions_can_be_trained_on_without_the_images_for_reference(tmp_path):
    write_acdc(tmp_path)
    names = [sample["name"] for sample in ACDCDataModule(tmp_path).train_dataset()]
    assert len(names) == 8 and all("/train/" in name for name in names)


def test_the_layout_without_conditions_is_one_set(tmp_path):
    write_acdc(tmp_path, flat=True)
    data = ACDCDataModule(tmp_path)
    assert data.val_set_names == ["acdc"] and len(data.train_dataset()) == 8
    sample = data.eval_datasets("val")["acdc"][0]
    assert sample["name"] == "rgb_anon/val/GOPR0475_fog_frame_000041_rgb_anon"
    label = np.asarray(Image.open(tmp_path / "gt/val/GOPR0475_fog_frame_000041_gt_labelTrainIds.png"))
    assert np.array_equal(sample["label"], label)


def test_where_both_layouts_are_the_conditions_are_kept_and_no_image_comes_twice(tmp_path):
    write_acdc(tmp_path)
    write_acdc(tmp_path, flat=True)
    data = ACDCDataModule(tmp_path)
    assert data.val_set_names == [f"acdc-{condition}" for condition in CONDITIONS]
    assert len(data.train_dataset()) == 8


def test_an_empty_folder_names_the_original_layout(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ACDC has no val images: looked for .*rgb_anon/\*/val/\*/"):
        ACDCDataModule(tmp_path).val_dataloader()


def test_the_published_numbers_of_images():
    assert ACDCDataModule.layout.counts["val"] == {"fog": 100, "night": 106, "rain": 100, "snow": 100}
