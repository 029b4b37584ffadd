"""COCO-20i in its layout, and the part of it that is MiniCOCO-20i."""

import numpy as np
import pytest

from datamodules.coco20i import COCO20iDataModule, MiniCOCO20iDataModule
from tests.fake_data import write_ids
from tests.fake_few_shot import write_coco20i

SMALL = {"min_pixels": 10, "size": 32, "episodes": 8, "test_seeds": [1]}


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """The fake files are two or three of each class."""
    monkeypatch.setattr("datamodules.few_shot.STORED_SUPPORTS", 1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco20i")
    write_coco20i(folder)
    return folder


def test_every_fourth_class_is_novel(root):
    folds = [COCO20iDataModule(root, fold=fold) for fold in range(4)]
    assert list(folds[0].novel_classes) == list(range(1, 78, 4))
    assert list(folds[3].novel_classes) == list(range(4, 81, 4))
    assert sorted(c for data in folds for c in data.novel_classes) == list(range(1, 81))
    assert len(folds[0].base_classes) == 60


def test_prompts_tell_a_computer_mouse_from_an_animal(root):
    names = COCO20iDataModule(root).images("train").class_names
    assert names[65] == "computer mouse" and names[66] == "remote controller" and names[1] == "person"


def test_names_of_auxiliary_images_hold_the_folder(root):
    data = COCO20iDataModule(root)
    assert data.images("train").aux_key(3, 4) == ("train2014/COCO_train2014_000000000003", 4)
    assert data.images("test").name(0) == "val2014/COCO_val2014_000000000000"
    assert data.images("test") is data.images("val") and data.images("val").dataset == "coco"
    assert set(np.unique(data.images("val").read(5)[1])) == {0, 6, 255}


def test_hsnets_protocol_draws_classes_first(root):
    assert COCO20iDataModule(root, protocol="hsnet", **SMALL).pool("val").by_class
    assert not COCO20iDataModule(root, **SMALL).pool("val").by_class


def test_training_and_evaluation_give_batches(root):
    data = COCO20iDataModule(root, fold=1, batch_size=2, **SMALL)
    assert next(iter(data.train_dataloader()))["support_image"].shape == (2, 1, 3, 32, 32)
    (loader,) = data.val_dataloader()
    assert all(int(batch["class_id"]) % 4 == 2 for batch in loader) and len(loader) == 8


def test_mini_coco_is_a_tenth_of_training_and_the_images_of_2017_for_evaluation(root):
    data = MiniCOCO20iDataModule(root)
    names = [data.images("train").name(i) for i in range(len(data.images("train")))]
    assert (
        len(names) == 16
        and names == sorted(set(names))
        and len(COCO20iDataModule(root).images("train")) == 160
    )
    assert [int(name[-12:]) for name in names] == sorted(
        np.random.default_rng(0).permutation(160)[:16].tolist()
    )
    numbers = [int(data.images("val").name(i)[-12:]) for i in range(len(data.images("val")))]
    assert numbers == list(range(150, 160))


def test_lists_name_the_images_in_any_of_the_published_ways(root, tmp_path):
    stem = "COCO_train2014_000000000007"
    write_ids(tmp_path / "train.txt", [f"../data/MSCOCO2014/train2014/{stem}.jpg ../data/x/{stem}.png"])
    write_ids(tmp_path / "test.txt", ["000000000009", "COCO_val2014_000000000002"])
    for kind in (COCO20iDataModule, MiniCOCO20iDataModule):
        data = kind(root, train_list=tmp_path / "train.txt", test_list=tmp_path / "test.txt")
        assert data.images("train").stems == ["train2014/COCO_train2014_000000000007"]
        assert [stem[-1] for stem in data.images("test").stems] == ["9", "2"]


def test_missing_images_are_named_with_the_option_that_lists_them(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"COCO-20i has no val images: .*val2017/\*\.jpg.*test_list"):
        MiniCOCO20iDataModule(tmp_path).images("val")
    with pytest.raises(
        FileNotFoundError, match=r"COCO-20i has no train images: .*train2014/\*\.jpg.*train_list"
    ):
        COCO20iDataModule(tmp_path).images("train")
