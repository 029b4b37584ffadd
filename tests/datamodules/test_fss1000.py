"""FSS-1000 in its layout: ten images of each class, classes split by lists."""

import numpy as np
import pytest

from datamodules.fss1000 import FSS1000DataModule
from tests.fake_data import write_ids
from tests.fake_few_shot import write_fss1000

SMALL = {"size": 24, "episodes": None, "test_seeds": [1]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fss1000")
    write_fss1000(folder)
    return folder


def test_splits_have_classes_of_their_own_numbered_by_their_sorted_names(root):
    data = FSS1000DataModule(root)
    assert data.base_classes == {1: "ab wheel", 2: "zebra"}
    assert data.eval_classes("val") == {3: "egg", 4: "fox"} and data.novel_classes == {5: "cup", 6: "owl"}
    with pytest.raises(ValueError, match="no fold 1: found folds 0 to 0"):
        FSS1000DataModule(root, fold=1)


def test_grey_of_128_or_more_is_the_object_with_the_id_of_its_class(root):
    images = FSS1000DataModule(root).images("test")
    image, label = images.read(12)  # the third image of owl
    assert image.shape == (24, 24, 3) and label.shape == (24, 24)
    assert np.array_equal(np.unique(label), [0, 6]) and np.count_nonzero(label) == 8 * 11
    assert images.areas[12] == {6: 88} and images.name(12) == "owl/3"


def test_names_of_auxiliary_images_have_class_1_whatever_the_class(root):
    images = FSS1000DataModule(root).images("train")
    assert images.aux_key(2, 1) == ("ab_wheel/3", 1) and images.aux_key(19, 2) == ("zebra/10", 1)


def test_no_class_has_the_id_of_void_pixels(root, tmp_path):
    write_ids(tmp_path / "trn.txt", [f"c{n:03d}" for n in range(520)])
    for split in ("val", "test"):
        write_ids(tmp_path / f"{split}.txt", [f"{split}{n}" for n in range(240)])
    lists = FSS1000DataModule(tmp_path).class_lists()
    ids = [c for split in ("train", "val", "test") for c in lists[split]]
    assert len(set(ids)) == 1000 and ids == sorted(ids) and 255 not in ids and ids[0] == 1 and ids[-1] == 1001


def test_each_image_of_a_split_is_the_query_once(root):
    data = FSS1000DataModule(root, protocol="hsnet", **SMALL)
    (dataset,) = data.eval_datasets("test").values()
    assert [e.query for e in dataset.episodes] == list(range(20))
    (loader,) = data.val_dataloader()
    assert {int(batch["class_id"]) for batch in loader} == {3, 4}


def test_training_gives_batches_of_its_own_classes(root):
    data = FSS1000DataModule(root, batch_size=4, **SMALL)
    batch = next(iter(data.train_dataloader()))
    assert set(batch["class_id"].tolist()) <= {1, 2} and set(batch["label"].unique().tolist()) == {0, 1}


def test_other_lists_can_be_given_and_missing_ones_are_named(root, tmp_path):
    write_ids(tmp_path / "few.txt", ["owl"])
    data = FSS1000DataModule(root, train_list=tmp_path / "few.txt")
    assert data.base_classes == {1: "owl"}
    with pytest.raises(FileNotFoundError, match=r"There is no list .*val\.txt"):
        FSS1000DataModule(root, test_list=tmp_path / "few.txt").images("val")
