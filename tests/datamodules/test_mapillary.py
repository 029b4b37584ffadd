"""Mapillary Vistas in its layout: for scoring alone, images of many sizes."""

import cv2
import numpy as np
import pytest
from PIL import Image

from datamodules.mapillary import MapillaryDataModule
from tests.fake_data import write_mapillary


@pytest.fixture
def root(tmp_path):
    write_mapillary(tmp_path)
    return tmp_path


def test_images_and_labels_in_train_ids_are_paired(root):
    dataset = MapillaryDataModule(root).eval_datasets("val")["mapillary"]
    label = "validation/labels/_1Gn_xkw7sa_i9GU4mkxxQ_labelTrainIds.png"
    assert len(dataset) == 2 and dataset.label_names[0] == label
    assert dataset[0]["name"] == "validation/images/_1Gn_xkw7sa_i9GU4mkxxQ"
    assert np.array_equal(dataset[0]["label"], np.asarray(Image.open(root / label)))


def test_images_are_fitted_into_a_box_and_labels_keep_their_size(root):
    data = MapillaryDataModule(root, eval_fit=(12, 24))
    lying, upright = (batch for batch in data.val_dataloader()[0])
    native = MapillaryDataModule(root).eval_datasets("val")["mapillary"]
    assert lying["image"].shape == (1, 3, 12, 18) and lying["label"].shape == (1, 32, 48)
    assert upright["image"].shape == (1, 3, 18, 12) and upright["label"].shape == (1, 48, 32)
    expected = cv2.resize(native[0]["image"], (18, 12), interpolation=cv2.INTER_LINEAR)
    assert np.array_equal(data.eval_datasets("val")["mapillary"][0]["image"], expected)


def test_one_way_of_resizing_is_enough(root):
    with pytest.raises(
        ValueError, match=r"Mapillary can be scored at one size: .*\[16, 24\] and.*\[12, 24\]"
    ):
        MapillaryDataModule(root, eval_size=(16, 24), eval_fit=(12, 24))


def test_there_is_nothing_to_train_on(root):
    with pytest.raises(ValueError, match=r"Mapillary has no train images here: found those of val alone"):
        MapillaryDataModule(root).train_dataset()


def test_the_published_number_of_images():
    assert MapillaryDataModule.layout.counts == {"val": {"images": 2000}}
