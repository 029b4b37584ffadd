"""Cityscapes in its layout: labels in 11 or 9 classes, image and label paired, RCS's view of them."""

import numpy as np
import pytest
from PIL import Image

from datamodules.cityscapes import CityscapesDataModule
from datamodules.transforms import ResizeCropFlip
from tests.datamodules.test_label_maps import TO_9, TO_11
from tests.fake_data import write_cityscapes

LABEL = "gtFine/train/aachen/aachen_000002_000019_gtFine_labelTrainIds.png"
IMAGE = "leftImg8bit/train/aachen/aachen_000002_000019_leftImg8bit"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cityscapes")
    write_cityscapes(folder)
    return folder


@pytest.mark.parametrize(
    "classes, mapped", [("deliver11", TO_11), ("fmb9", TO_9), ("cityscapes19", list(range(19)))]
)
def test_labels_are_mapped_to_the_class_table(root, classes, mapped):
    dataset = CityscapesDataModule(root, classes=classes).train_dataset()
    sample = dataset[1]
    stored, table = np.asarray(Image.open(root / LABEL)), np.array([*mapped, *[255] * 237], np.uint8)
    assert len(dataset) == 2 and sample["name"] == IMAGE and 255 in stored
    assert np.array_equal(sample["label"], table[stored])
    assert np.array_equal(sample["image"], np.asarray(Image.open(root / f"{IMAGE}.png")))


def test_rare_class_sampling_sees_the_labels_before_the_map(root):
    dataset = CityscapesDataModule(root).train_dataset()
    assert dataset.label_names[1] == LABEL
    stored = dataset.read_label(1)
    assert np.array_equal(stored, np.asarray(Image.open(root / LABEL)))
    assert np.array_equal(dataset.label_map[stored], dataset[1]["label"])


def test_the_eleven_classes_are_the_default(root):
    assert CityscapesDataModule(root).classes == "deliver11"


def test_validation_and_test_are_the_validation_images(root):
    data = CityscapesDataModule(root)
    assert data.val_set_names == data.test_set_names == ["cityscapes"]
    names = [batch["name"][0] for batch in data.val_dataloader()[0]]
    assert names == [f"leftImg8bit/val/lindau/lindau_00000{i}_000019_leftImg8bit" for i in (1, 2)]


def test_training_batches_are_resized_and_cropped_by_the_transform(root):
    transform = ResizeCropFlip((8, 12), resize=(16, 24))
    batch = next(iter(CityscapesDataModule(root, batch_size=2, transform=transform).train_dataloader()))
    assert batch["image"].shape == (2, 3, 8, 12) and batch["label"].shape == (2, 8, 12)


def test_the_published_numbers_of_images():
    counts = CityscapesDataModule.layout.counts
    assert (counts["train"], counts["val"]) == ({"train": 2975}, {"val": 500})


def test_without_train_id_labels_the_error_names_the_first_that_is_missing(root, tmp_path):
    write_cityscapes(tmp_path)
    (tmp_path / LABEL).unlink()
    with pytest.raises(FileNotFoundError, match=f"Cityscapes lacks 1 of 4 train files.*{LABEL}"):
        CityscapesDataModule(tmp_path).train_dataset()
