"""What data sets of files share: published lists, 16-bit images, and errors that say what to do."""

import json

import numpy as np
import pytest
from PIL import Image

from datamodules.cityscapes import CityscapesDataModule
from datamodules.deliver import DeliverDataModule
from datamodules.fmb import FMBDataModule
from tests.fake_data import write_cityscapes, write_fmb, write_png

TRAIN = {
    "source_data": {
        "RGB": ["leftImg8bit/train/aachen/aachen_000002_000019_leftImg8bit.png"],
        "label": ["gtFine/train/aachen/aachen_000002_000019_gtFine_labelTrainIds.png"],
    },
    "target_data": {"second_modality": ["train/Infrared/00002.png"]},
}
TEST = {"target_data": {"second_modality": ["test/Infrared/00004.png"], "label": ["test/Label/00003.png"]}}


@pytest.fixture
def fmb(tmp_path):
    write_fmb(tmp_path / "fmb")
    return tmp_path / "fmb"


def write_list(folder, content, name="list.json"):
    (folder / name).write_text(json.dumps(content))
    return folder / name


def test_published_lists_replace_the_search_for_files(fmb, tmp_path):
    write_cityscapes(tmp_path / "cityscapes")
    train, test = write_list(tmp_path, TRAIN), write_list(tmp_path, TEST, "test.json")
    source = CityscapesDataModule(tmp_path / "cityscapes", train_list=train).train_dataset()
    assert source.label_names == TRAIN["source_data"]["label"] and len(source) == 1
    target = FMBDataModule(fmb, train_list=train, test_list=test)
    assert len(target.train_dataset()) == 1 and "label" not in target.train_dataset()[0]
    (sample,) = target.eval_datasets("test")["fmb"]
    assert sample["name"] == "test/Infrared/00004" and "label" in sample
    assert target.eval_datasets("test")["fmb"].label_names == ["test/Label/00003.png"]


@pytest.mark.parametrize("outside", ["../other/00001.png", "/data/00001.png", "train/../../00001.png"])
def test_a_list_that_leaves_the_root_is_refused_by_name(fmb, tmp_path, outside):
    path = write_list(tmp_path, {"target_data": {"second_modality": [outside]}})
    with pytest.raises(ValueError, match=rf"outside the data set: found '{outside}'"):
        FMBDataModule(fmb, train_list=path).train_dataset()


@pytest.mark.parametrize(
    "content", [{}, {"target_data": {}}, [], {"target_data": {"second_modality": ["a.png"]}}, "{",
                {"target_data": {"second_modality": ["a.png"], "label": []}}]
)  # fmt: skip
def test_a_list_without_the_expected_entries_is_refused(fmb, tmp_path, content):
    path = write_list(tmp_path, content)
    with pytest.raises(ValueError, match=r"no list of FMB's test files.*target_data\.label"):
        FMBDataModule(fmb, test_list=path).eval_datasets("test")


def test_a_missing_list_and_missing_files_of_a_list_are_named(fmb, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file list .*nowhere\.json.*train_list"):
        FMBDataModule(fmb, train_list=tmp_path / "nowhere.json").train_dataset()
    path = write_list(tmp_path, {"target_data": {"second_modality": ["train/Infrared/00009.png"]}})
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of 1 train files.*00009\.png"):
        FMBDataModule(fmb, train_list=path).train_dataset()


def test_sixteen_bit_images_are_refused_and_rescaled_when_asked(fmb):
    write_png(fmb / "train/Infrared/00001.png", np.full((32, 48), 25700, np.uint16))
    with pytest.raises(ValueError, match=r"00001\.png holds 16-bit.*rescale_16_bit"):
        FMBDataModule(fmb).train_dataset()[0]
    image = FMBDataModule(fmb, rescale_16_bit=True).train_dataset()[0]["image"]
    assert image.dtype == np.uint8 and (image == 100).all()


def test_a_label_of_another_size_than_its_image_is_an_error_with_both_sizes(fmb):
    write_png(fmb / "test/Label/00003.png", np.zeros((30, 48), np.uint8))
    with pytest.raises(ValueError, match=r"00003\.png does not fit .*found 48x32 and 48x30"):
        FMBDataModule(fmb).eval_datasets("test")["fmb"][0]


def test_an_image_and_a_label_of_different_sizes_are_scored_at_eval_size_each_resized_alone(fmb):
    image = np.arange(32 * 48, dtype=np.uint8).reshape(32, 48)
    label = np.repeat(np.arange(15, dtype=np.uint8), 2)[:, None].repeat(48, 1)
    write_png(fmb / "test/Infrared/00003.png", image)
    write_png(fmb / "test/Label/00003.png", label)
    data = FMBDataModule(fmb, eval_size=(15, 24))
    sample, classes = data.eval_datasets("test")["fmb"][0], data.find("test").label_map
    expected = Image.fromarray(image).resize((24, 15), Image.Resampling.BILINEAR)
    assert np.array_equal(sample["image"][..., 0], expected)
    assert np.array_equal(sample["label"], classes[label[::2, ::2]])


def test_training_labels_need_the_size_of_their_images_whatever_the_size_of_scoring(tmp_path):
    write_cityscapes(tmp_path)
    data = CityscapesDataModule(tmp_path, eval_size=(16, 24))
    write_png(tmp_path / data.train_dataset().label_names[0], np.zeros((30, 48), np.uint8))
    with pytest.raises(ValueError, match="found 48x32 and 48x30"):
        data.train_dataset()[0]


def test_an_unknown_id_is_an_error_and_not_a_class(fmb):
    write_png(fmb / "test/Label/00003.png", np.full((32, 48), 15, np.uint8))
    with pytest.raises(ValueError, match=r"00003\.png holds ids .*found \[15\]"):
        FMBDataModule(fmb).eval_datasets("test")["fmb"][0]


def test_colours_in_place_of_ids_are_an_error(fmb):
    write_png(fmb / "test/Label/00003.png", np.zeros((32, 48, 3), np.uint8))
    with pytest.raises(ValueError, match=r"00003\.png does not hold one class id .*mode RGB"):
        FMBDataModule(fmb).eval_datasets("test")["fmb"][0]


def test_a_wrong_root_is_an_error_at_once_and_an_empty_one_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"DELIVER has no folder .*nowhere.*docs/datasets\.md"):
        DeliverDataModule(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no train images: looked for .*depth/\*/train/\*/\*_depth"):
        DeliverDataModule(tmp_path).train_dataset()


def test_a_root_may_be_a_link(fmb, tmp_path):
    (tmp_path / "link").symlink_to(fmb)
    assert len(FMBDataModule(tmp_path / "link").train_dataset()) == 2


def test_training_on_a_target_alone_is_refused(fmb):
    with pytest.raises(ValueError, match=r"FMB has no training labels.*AdaptationDataModule"):
        FMBDataModule(fmb).train_dataloader()


def test_a_palette_label_gives_its_indices(fmb):
    indexed = Image.new("P", (48, 32), 14)
    indexed.putpalette([7, 8, 9] * 256)
    indexed.save(fmb / "test/Label/00003.png")
    assert (FMBDataModule(fmb).eval_datasets("test")["fmb"][0]["label"] == 3).all()


def test_a_box_to_fit_changes_images_for_scoring_alone(tmp_path):
    write_cityscapes(tmp_path)
    data = CityscapesDataModule(tmp_path, eval_fit=(16, 48))
    sample = data.eval_datasets("val")["cityscapes"][0]
    assert sample["image"].shape == (16, 24, 3) and sample["label"].shape == (32, 48)
    assert data.train_dataset()[0]["image"].shape == (32, 48, 3)


def test_of_a_box_to_fit_the_files_must_have_one_size(fmb):
    write_png(fmb / "test/Label/00003.png", np.zeros((30, 48), np.uint8))
    with pytest.raises(ValueError, match="found 48x32 and 48x30"):
        FMBDataModule(fmb, eval_fit=(16, 24)).eval_datasets("test")["fmb"][0]
