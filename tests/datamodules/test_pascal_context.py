"""PASCAL Context in its layout: background is a class, and only listed images count."""

import numpy as np
import pytest
from PIL import Image

from datamodules.pascal_context import PascalContextDataModule
from tests.fake_data import write_ids, write_pascal_context, write_png

FOLDER = "VOCdevkit/VOC2010"


@pytest.fixture
def root(tmp_path):
    write_pascal_context(tmp_path)
    return tmp_path


def test_listed_images_are_paired_with_their_labels(root):
    data = PascalContextDataModule(root)
    dataset = data.eval_datasets("val")["pascal_context"]
    label = f"{FOLDER}/SegmentationClassContext/2008_000009.png"
    assert data.classes == "context60" and data.val_set_names == data.test_set_names == ["pascal_context"]
    assert len(dataset) == len(data.train_dataset()) == 2 and dataset.label_names[0] == label
    assert dataset[0]["name"] == f"{FOLDER}/JPEGImages/2008_000009"
    assert data.train_dataset()[0]["name"] == f"{FOLDER}/JPEGImages/2008_000002"
    assert np.array_equal(dataset[0]["label"], np.asarray(Image.open(root / label)))


def test_background_is_a_class_and_the_last_id_is_wood(root):
    write_png(root / f"{FOLDER}/SegmentationClassContext/2008_000009.png", np.zeros((32, 48), np.uint8))
    write_png(root / f"{FOLDER}/SegmentationClassContext/2008_000016.png", np.full((48, 32), 59, np.uint8))
    first, second = PascalContextDataModule(root).eval_datasets("val")["pascal_context"]
    assert (first["label"] == 0).all() and (second["label"] == 59).all()


def test_the_original_ids_of_the_annotations_are_an_error(root):
    write_png(root / f"{FOLDER}/SegmentationClassContext/2008_000009.png", np.full((32, 48), 60, np.uint8))
    with pytest.raises(ValueError, match=r"2008_000009\.png holds ids .*found \[60\], known are 0\.\.59"):
        PascalContextDataModule(root).eval_datasets("val")["pascal_context"][0]


def test_another_list_chooses_other_images(root):
    write_ids(root / "list.txt", ["2008_000003"])
    dataset = PascalContextDataModule(root, test_list=root / "list.txt").eval_datasets("val")[
        "pascal_context"
    ]
    assert [sample["name"] for sample in dataset] == [f"{FOLDER}/JPEGImages/2008_000003"]


def test_an_empty_folder_names_the_list_that_is_missing(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no list of val .*ImageSets/SegmentationContext/val\.txt"):
        PascalContextDataModule(tmp_path / "empty").val_dataloader()


def test_the_published_numbers_of_images():
    assert PascalContextDataModule.layout.counts == {"train": {"VOC2010": 4996}, "val": {"VOC2010": 5104}}
