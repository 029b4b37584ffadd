"""BDD100K in the layouts of both releases: for scoring alone."""

import numpy as np
import pytest
from PIL import Image

from datamodules.bdd100k import BDD100KDataModule
from tests.fake_data import write_bdd100k


@pytest.mark.parametrize(
    "older, first",
    [
        (False, ("images/10k/val/7d06fefd-f7be05a6", "labels/sem_seg/masks/val/7d06fefd-f7be05a6.png")),
        (True, ("seg/images/val/7d06fefd-f7be05a6", "seg/labels/val/7d06fefd-f7be05a6_train_id.png")),
    ],
)
def test_both_releases_are_read(tmp_path, older, first):
    write_bdd100k(tmp_path, older=older)
    data = BDD100KDataModule(tmp_path)
    dataset = data.eval_datasets("val")["bdd100k"]
    assert data.val_set_names == data.test_set_names == ["bdd100k"] and len(dataset) == 2
    assert (dataset[0]["name"], dataset.label_names[0]) == first
    assert np.array_equal(dataset[0]["label"], np.asarray(Image.open(tmp_path / first[1])))


def test_of_both_releases_in_one_folder_todays_is_read(tmp_path):
    write_bdd100k(tmp_path)
    write_bdd100k(tmp_path, older=True)
    dataset = BDD100KDataModule(tmp_path).eval_datasets("val")["bdd100k"]
    assert [name.split("/")[0] for name in dataset.label_names] == ["labels", "labels"]


def test_an_empty_folder_names_the_layout_of_today(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"BDD100K has no val images: looked for .*images/10k/val"):
        BDD100KDataModule(tmp_path).val_dataloader()


def test_there_is_nothing_to_train_on(tmp_path):
    with pytest.raises(ValueError, match=r"BDD100K has no train images here.*as one of its targets"):
        BDD100KDataModule(tmp_path).train_dataloader()


def test_the_published_number_of_images():
    assert BDD100KDataModule.layout.counts == {"val": {"10k": 1000}}
