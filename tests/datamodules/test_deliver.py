"""DELIVER's depth images in their layout: five weathers, ids in the first channel of colour files."""

import numpy as np
import pytest
from PIL import Image

from datamodules.deliver import DeliverDataModule
from tests.datamodules.test_label_maps import DELIVER_FROM_1
from tests.fake_data import write_deliver


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deliver")
    write_deliver(folder)
    return DeliverDataModule(folder)


def test_training_images_have_no_label_and_validation_images_are_not_used(data):
    samples = list(map(data.train_dataset().__getitem__, range(2)))
    assert [set(sample) for sample in samples] == [{"image", "name"}] * 2
    assert samples[0]["name"] == "depth/cloud/train/MAP_1_point1/000050_depth_front"
    assert len(data.train_dataset()) == len(data.eval_datasets("val")["deliver"]) == 2


def test_test_images_have_labels_from_the_first_channel(data):
    dataset = data.eval_datasets("test")["deliver"]
    stored = np.asarray(Image.open(data.root / "semantic/sun/test/MAP_7_point91/000050_semantic_front.png"))
    table = np.full(256, 255, np.uint8)
    table[1:26] = DELIVER_FROM_1
    assert dataset.label_names[1] == "semantic/sun/test/MAP_7_point91/000050_semantic_front.png"
    assert {0, 1, 3, 4, 13, 22, 255} & set(np.unique(stored[..., 0])) and stored.shape[2] == 4
    assert np.array_equal(dataset[1]["label"], table[stored[..., 0]])


def test_of_four_channels_the_first_three_are_kept(data):
    stored = np.asarray(Image.open(data.root / "depth/cloud/train/MAP_1_point1/000050_depth_front.png"))
    assert stored.shape[2] == 4 and np.array_equal(data.train_dataset()[0]["image"], stored[..., :3])


def test_images_and_labels_are_scored_at_the_given_size(data):
    dataset = DeliverDataModule(data.root, eval_size=(16, 20)).eval_datasets("test")["deliver"]
    native, sample = data.eval_datasets("test")["deliver"][0], dataset[0]
    as_pillow = Image.fromarray(native["image"]).resize((20, 16), Image.Resampling.BILINEAR)
    assert np.array_equal(sample["image"], np.asarray(as_pillow))
    assert sample["label"].shape == (16, 20) and set(np.unique(sample["label"])) <= {*range(11), 255}
    assert DeliverDataModule(data.root, eval_size=(16, 20)).train_dataset()[0]["image"].shape == (32, 48, 3)


def test_the_published_numbers_of_images():
    counts = DeliverDataModule.layout.counts
    assert counts["train"] == {"cloud": 794, "fog": 795, "night": 797, "rain": 799, "sun": 798}
    assert list(counts["test"].values()) == [379, 379, 379, 380, 380]
    assert sum(counts["train"].values()) == 3983 and sum(counts["test"].values()) == 1897


def test_only_the_eleven_classes_fit(data):
    with pytest.raises(ValueError, match=r"DELIVER has no labels for the class table 'fmb9'.*deliver11"):
        DeliverDataModule(data.root, classes="fmb9")
