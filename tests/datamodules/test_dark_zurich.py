"""Dark Zurich in its layout: for scoring alone."""

import numpy as np
import pytest
from PIL import Image

from datamodules.dark_zurich import DarkZurichDataModule
from tests.fake_data import write_dark_zurich


def test_images_and_labels_in_train_ids_are_paired(tmp_path):
    write_dark_zurich(tmp_path)
    data = DarkZurichDataModule(tmp_path)
    dataset = data.eval_datasets("val")["dark_zurich"]
    assert data.val_set_names == data.test_set_names == ["dark_zurich"] and len(dataset) == 2
    assert dataset[0]["name"] == "rgb_anon/val/night/GOPR0356/GOPR0356_frame_000321_rgb_anon"
    label = "gt/val/night/GOPR0356/GOPR0356_frame_000321_gt_labelTrainIds.png"
    assert dataset.label_names[0] == label
    assert np.array_equal(dataset[0]["label"], np.asarray(Image.open(tmp_path / label)))


def test_there_is_nothing_to_train_on(tmp_path):
    with pytest.raises(ValueError, match="Dark Zurich has no train images here"):
        DarkZurichDataModule(tmp_path).train_dataset()


def test_the_published_number_of_images():
    assert DarkZurichDataModule.layout.counts == {"val": {"val": 50}}
