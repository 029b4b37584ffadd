"""FMB's infrared images in their layout: grey images become three channels, nine classes."""

import numpy as np
import pytest
from PIL import Image

from datamodules.fmb import FMBDataModule
from tests.fake_data import write_fmb


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fmb")
    write_fmb(folder)
    return FMBDataModule(folder)


def test_a_grey_image_is_repeated_in_three_channels_and_training_has_no_labels(data):
    sample = data.train_dataset()[0]
    stored = np.asarray(Image.open(data.root / "train/Infrared/00001.png"))
    assert stored.ndim == 2 and np.array_equal(sample["image"], stored[..., None].repeat(3, -1))
    assert sample["name"] == "train/Infrared/00001" and "label" not in sample


def test_test_labels_are_mapped_to_nine_classes(data):
    dataset = data.eval_datasets("test")["fmb"]
    stored = np.asarray(Image.open(data.root / "test/Label/00004.png"))
    table = np.array([255, 4, 5, 1, 8, 8, 6, 0, 2, 7, 7, 7, 7, 7, 3], np.uint8)
    assert data.classes == "fmb9" and len(dataset) == 2
    assert np.array_equal(dataset[1]["label"], table[stored])


def test_the_published_numbers_of_images():
    assert FMBDataModule.layout.counts == {"train": {"Infrared": 1220}, "test": {"Infrared": 280}}
