"""GTA5 in its layout: for training alone, labels that need not have the size of their image."""

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.generalization import GeneralizationDataModule
from datamodules.gta5 import GTA5DataModule
from datamodules.mapillary import MapillaryDataModule
from datamodules.rare_classes import RareClassSampling
from datamodules.transforms import FitCropFlipDistort
from tests.fake_data import write_gta5, write_mapillary


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gta5")
    write_gta5(folder)
    return folder


def test_labels_are_read_in_train_ids(root):
    data = GTA5DataModule(root)
    dataset = data.train_dataset()
    label = root / "labels/00001_labelTrainIds.png"
    assert data.classes == "cityscapes19" and len(dataset) == 2
    assert dataset[0]["name"] == "images/00001" and dataset.label_names[0] == "labels/00001_labelTrainIds.png"
    assert np.array_equal(dataset[0]["label"], np.asarray(Image.open(label)))
    assert np.array_equal(dataset[0]["image"], np.asarray(Image.open(root / "images/00001.png")))


def test_a_label_of_another_size_than_its_image_is_fitted_alone_and_gives_crops(root):
    sample = GTA5DataModule(root).train_dataset()[1]
    assert sample["image"].shape[:2] == (32, 48) and sample["label"].shape == (34, 48)
    transform = FitCropFlipDistort((16, 16), fit=(24, 36))
    data = GTA5DataModule(root, batch_size=2, transform=transform)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 16, 16) and batch["label"].shape == (2, 16, 16)


def test_it_is_a_source_of_rare_classes_for_targets_of_the_same_table(root, tmp_path):
    write_mapillary(tmp_path)
    source = GTA5DataModule(root, transform=FitCropFlipDistort((16, 16)))
    options = RareClassSampling(min_pixels=0, min_crop_pixels=0, temperature=1.0)
    data = GeneralizationDataModule(source, [MapillaryDataModule(tmp_path)], options)
    samples = data.training_samples()
    assert data.classes == "cityscapes19" and samples.classes == list(range(19))
    seen = torch.cat([samples[0, draw]["label"].unique() for draw in range(8)])
    assert set(seen.tolist()) <= {*range(19), 255} and data.val_set_names == ["mapillary"]


def test_there_is_nothing_to_score(root):
    for asked in ("val_set_names", "test_set_names"):
        with pytest.raises(ValueError, match=r"GTA5 has no val images here.*with this as its source"):
            getattr(GTA5DataModule(root), asked)


def test_labels_that_are_not_converted_are_named(root, tmp_path):
    write_gta5(tmp_path)
    (tmp_path / "labels/00002_labelTrainIds.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"GTA5 lacks 1 of 4 train files.*00002_labelTrainIds\.png"):
        GTA5DataModule(tmp_path).train_dataset()


def test_the_published_number_of_images():
    assert GTA5DataModule.layout.counts == {"train": {"images": 24966}}
