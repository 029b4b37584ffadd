"""DSEC's event images in their layout: which frames are used, and how many that makes."""

import numpy as np
import pytest
from PIL import Image

from datamodules.dsec import DSECDataModule
from tests.fake_data import write_dsec


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dsec")
    write_dsec(folder)
    return DSECDataModule(folder)


def test_training_takes_every_second_frame_without_label(data):
    dataset = data.train_dataset()
    names = [dataset[i]["name"] for i in range(len(dataset))]
    assert names == [f"69mask_train_edges/zurich_city_00_a/00000{frame}" for frame in (2, 4)]
    assert "label" not in dataset[0] and dataset[0]["image"].shape == (32, 48, 3)


def test_testing_takes_every_frame_with_its_label_as_it_is(data):
    dataset = data.eval_datasets("test")["dsec"]
    stored = np.asarray(Image.open(data.root / "test_semantic_labels/zurich_city_13_a/11classes/000001.png"))
    assert dataset.label_names == [
        f"test_semantic_labels/zurich_city_13_a/11classes/00000{frame}.png" for frame in (1, 2)
    ]
    assert np.array_equal(dataset[0]["label"], stored)


def test_folders_of_the_published_sequences_give_the_published_numbers_of_images(tmp_path):
    counts = DSECDataModule.layout.counts
    for sequence, count in counts["train"].items():
        folder = tmp_path / "69mask_train_edges" / sequence
        folder.mkdir(parents=True)
        for frame in range(2 * count + 2):  # from 0 to an odd one, of which 2, 4, .. count
            (folder / f"{frame:06d}.png").touch()
        (folder / "timestamps.png").touch()
    for sequence, count in counts["test"].items():
        for folder in (f"69mask_test_edges/{sequence}", f"test_semantic_labels/{sequence}/11classes"):
            (tmp_path / folder).mkdir(parents=True)
            for frame in range(1, count + 1):
                (tmp_path / folder / f"{frame:06d}.png").touch()
    data = DSECDataModule(tmp_path)
    assert list(counts["train"].values()) == [469, 340, 117, 350, 876, 761, 731, 393]
    assert len(data.train_dataset()) == 4037 and len(data.eval_datasets("test")["dsec"]) == 2806
