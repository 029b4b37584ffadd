"""SYNTHIA in its layout: for training alone."""

import numpy as np
import pytest
from PIL import Image

from datamodules.synthia import SYNTHIADataModule
from tests.fake_data import write_png, write_synthia


@pytest.fixture
def data(tmp_path):
    write_synthia(tmp_path)
    return SYNTHIADataModule(tmp_path)


def test_images_and_labels_in_train_ids_are_paired(data):
    dataset = data.train_dataset()
    assert [dataset[i]["name"] for i in range(2)] == ["RGB/0000000", "RGB/0000001"]
    for sample, label in zip(map(dataset.__getitem__, range(2)), dataset.label_names, strict=True):
        assert np.array_equal(sample["label"], np.asarray(Image.open(data.root / label)))
    assert dataset.label_names[1] == "GT/LABELS/0000001_labelTrainIds.png" and data.classes == "cityscapes19"


def test_published_ids_in_place_of_train_ids_are_an_error(data):
    write_png(data.root / "GT/LABELS/0000000_labelTrainIds.png", np.full((32, 48), 22, np.uint8))
    with pytest.raises(ValueError, match=r"0000000_labelTrainIds\.png holds ids .*found \[22\]"):
        data.train_dataset()[0]


def test_a_label_of_another_size_than_its_image_is_an_error(data):
    write_png(data.root / "GT/LABELS/0000000_labelTrainIds.png", np.zeros((30, 48), np.uint8))
    with pytest.raises(ValueError, match="found 48x32 and 48x30"):
        data.train_dataset()[0]


def test_there_is_nothing_to_score(data):
    with pytest.raises(ValueError, match=r"SYNTHIA has no val images here: found those of train alone"):
        data.val_dataloader()


def test_the_published_number_of_images():
    assert SYNTHIADataModule.layout.counts == {"train": {"RGB": 9400}}
