"""COCO-Object in both layouts: things are classes, all else is background."""

import numpy as np
import pytest
from PIL import Image

from datamodules.coco import COCO2014DataModule, COCODataModule
from functional.classes import class_table
from tests.fake_data import write_coco, write_coco_2014, write_ids, write_png

LABEL = "annotations/val2017/000000000139_labelTrainIds.png"
LABEL_2014 = "COCO2014/coco_seg_anno/000000000042.png"


@pytest.fixture
def root(tmp_path):
    write_coco(tmp_path)
    return tmp_path


def test_things_are_counted_from_one_and_stuff_and_unlabelled_pixels_are_background(root):
    stored = np.arange(32 * 48, dtype=np.uint8).reshape(32, 48) % 172
    stored[stored == 171] = 255
    write_png(root / LABEL, stored)
    dataset = COCODataModule(root).eval_datasets("val")["coco"]
    label = dataset[0]["label"]
    assert np.array_equal(label, np.where(stored < 80, stored + 1, 0))
    assert label[stored == 255].max() == 0 and label.max() == 80
    assert class_table("coco81").names[label[stored == 79][0]] == "toothbrush"


def test_all_images_of_a_split_are_paired_with_labels_in_train_ids(root):
    data = COCODataModule(root)
    dataset = data.eval_datasets("val")["coco"]
    assert data.classes == "coco81" and data.val_set_names == data.test_set_names == ["coco"]
    assert dataset.label_names[0] == LABEL and dataset[0]["name"] == "images/val2017/000000000139"
    names = [sample["name"] for sample in data.train_dataset()]
    assert names == ["images/train2017/000000000009", "images/train2017/000000000025"]


def test_images_keep_their_size(root):
    lying, upright = COCODataModule(root).val_dataloader()[0]
    assert lying["image"].shape == (1, 3, 32, 48) and upright["label"].shape == (1, 48, 32)


def test_a_list_of_ids_chooses_some_of_the_images(root):
    write_ids(root / "list.txt", ["000000000285"])
    (sample,) = COCODataModule(root, test_list=root / "list.txt").eval_datasets("val")["coco"]
    assert sample["name"] == "images/val2017/000000000285"


def test_published_ids_in_place_of_train_ids_are_an_error(root):
    write_png(root / LABEL, np.full((32, 48), 181, np.uint8))
    with pytest.raises(
        ValueError, match=r"_labelTrainIds\.png holds ids .*found \[181\], known are 0\.\.170"
    ):
        COCODataModule(root).eval_datasets("val")["coco"][0]


def test_labels_that_are_not_converted_are_named(root):
    (root / LABEL).unlink()
    with pytest.raises(FileNotFoundError, match=rf"COCO lacks 1 of 4 val files.*{LABEL}"):
        COCODataModule(root).eval_datasets("val")


def test_the_layout_of_2014_takes_the_listed_images_and_their_ids_as_they_are(tmp_path):
    write_coco_2014(tmp_path)
    data = COCO2014DataModule(tmp_path)
    dataset = data.eval_datasets("val")["coco_2014"]
    names = [f"COCO2014/images/val2014/COCO_val2014_0000000000{number}" for number in (42, 73)]
    assert data.classes == "coco81" and [sample["name"] for sample in dataset] == names
    stored = np.asarray(Image.open(tmp_path / LABEL_2014))
    assert dataset.label_names[0] == LABEL_2014 and np.array_equal(dataset[0]["label"], stored)
    write_ids(tmp_path / "other.txt", ["COCO_val2014_000000000074"])
    other = COCO2014DataModule(tmp_path, test_list=tmp_path / "other.txt").eval_datasets("val")["coco_2014"]
    assert [sample["name"][-2:] for sample in other] == ["74"]


def test_in_the_layout_of_2014_255_is_ignored_and_there_is_nothing_to_train_on(tmp_path):
    write_coco_2014(tmp_path)
    write_png(tmp_path / LABEL_2014, np.full((32, 48), 255, np.uint8))
    data = COCO2014DataModule(tmp_path)
    assert (data.eval_datasets("val")["coco_2014"][0]["label"] == 255).all()
    with pytest.raises(ValueError, match="COCO 2014 has no train images here"):
        data.train_dataset()


def test_without_the_list_of_five_thousand_nothing_is_scored(tmp_path):
    write_coco_2014(tmp_path)
    (tmp_path / "COCO2014/val_5k_id.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"COCO 2014 has no list of val .*val_5k_id\.txt.*test_list"):
        COCO2014DataModule(tmp_path).val_dataloader()


def test_the_published_numbers_of_images():
    assert COCODataModule.layout.counts == {"train": {"train2017": 118287}, "val": {"val2017": 5000}}
    assert COCO2014DataModule.layout.counts == {"val": {"images": 5000}}
