"""PASCAL VOC in its layout: lists of ids choose the images, labels come from one of two folders."""

import numpy as np
import pytest
from PIL import Image

from datamodules.pascal_voc import PascalVOCDataModule
from datamodules.transforms import ResizeCropFlip
from tests.fake_data import write_ids, write_pascal_voc, write_png

FOLDER = "VOCdevkit/VOC2012"
LISTS = f"{FOLDER}/ImageSets/Segmentation"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voc")
    write_pascal_voc(folder)
    return folder


def stems(dataset) -> list[str]:
    return [sample["name"].split("/")[-1] for sample in dataset]


def test_the_lists_choose_the_images_of_a_split(root):
    data = PascalVOCDataModule(root)
    assert data.classes == "voc21" and data.val_set_names == data.test_set_names == ["pascal_voc"]
    assert stems(data.train_dataset()) == ["2007_000032", "2007_000039"]
    assert stems(data.eval_datasets("val")["pascal_voc"]) == ["2007_000033", "2007_000042"]


def test_images_and_labels_are_scored_at_their_own_size(root):
    lying, upright = PascalVOCDataModule(root).val_dataloader()[0]
    assert lying["name"] == [f"{FOLDER}/JPEGImages/2007_000033"]
    assert lying["image"].shape == (1, 3, 32, 48) and lying["label"].shape == (1, 32, 48)
    assert upright["image"].shape == (1, 3, 48, 32) and upright["label"].shape == (1, 48, 32)


@pytest.mark.parametrize("labels", ["SegmentationClassAug", "SegmentationClass"])
def test_labels_are_the_ids_of_the_chosen_folder(root, labels):
    sample = PascalVOCDataModule(root, labels=labels).eval_datasets("val")["pascal_voc"][0]
    stored = np.asarray(Image.open(root / f"{FOLDER}/{labels}/2007_000033.png"))
    assert np.array_equal(sample["label"], stored) and {0, 20, 255} <= set(np.unique(stored))


def test_labels_with_the_contours_of_sbd_are_the_default(root):
    paths = PascalVOCDataModule(root).train_dataset().label_names
    assert paths[0] == f"{FOLDER}/SegmentationClassAug/2007_000032.png"


def test_a_list_of_ids_extends_the_training_images_and_another_chooses_what_is_scored(root):
    lists = {"train_list": root / LISTS / "train_aug.txt", "test_list": root / LISTS / "train.txt"}
    data = PascalVOCDataModule(root, **lists)
    assert stems(data.train_dataset()) == ["2007_000032", "2007_000039", "2008_000002"]
    assert stems(data.eval_datasets("test")["pascal_voc"]) == ["2007_000032", "2007_000039"]
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of 6 train files.*SegmentationClass/2008_000002"):
        PascalVOCDataModule(root, labels="SegmentationClass", **lists).train_dataset()


def test_the_options_of_every_data_set_of_files_are_taken(root):
    transform = ResizeCropFlip((8, 12), resize=(16, 24))
    options = {"batch_size": 2, "eval_batch_size": 3, "num_workers": 4, "seed": 5, "rescale_16_bit": True}
    data = PascalVOCDataModule(root, classes="voc21", eval_size=(16, 24), transform=transform, **options)
    assert {name: getattr(data, name) for name in options} == options
    data.num_workers = 0
    assert next(iter(data.train_dataloader()))["image"].shape == (2, 3, 8, 12)
    (batch,) = data.val_dataloader()[0]
    assert batch["image"].shape == (2, 3, 16, 24) and batch["label"].shape == (2, 16, 24)
    fitted = PascalVOCDataModule(root, eval_fit=(16, 24)).eval_datasets("val")["pascal_voc"][1]
    assert fitted["image"].shape == (24, 16, 3) and fitted["label"].shape == (48, 32)


def test_a_missing_list_is_named_with_the_option_that_gives_another(root, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"PASCAL VOC has no list of train.*Segmentation/train\.txt.*train_list"
    ):
        PascalVOCDataModule(tmp_path).train_dataset()
    with pytest.raises(FileNotFoundError, match=r"no list of val images: .*nowhere\.txt.*test_list"):
        PascalVOCDataModule(root, test_list=tmp_path / "nowhere.txt").eval_datasets("val")


@pytest.mark.parametrize(
    "lines, found",
    [
        ([], "none"),
        (["2007_000032", "2007_000039 15"], "'2007_000039 15', 1 times"),
        (["2007_000032", "2007_000032"], "'2007_000032', 2 times"),
        (["../2007_000032"], "'../2007_000032', 1 times"),
        (["2007_000032.jpg"], "'2007_000032.jpg', 1 times"),
    ],
)
def test_a_file_that_is_no_list_of_ids_is_refused(root, tmp_path, lines, found):
    write_ids(tmp_path / "list.txt", lines)
    with pytest.raises(ValueError, match="is no list of PASCAL VOC's val images: found") as error:
        PascalVOCDataModule(root, test_list=tmp_path / "list.txt").eval_datasets("val")
    assert f"found {found}." in str(error.value) and "correct test_list" in str(error.value)


def test_a_listed_image_that_is_missing_is_named(root, tmp_path):
    write_ids(tmp_path / "list.txt", ["2007_000033", "2099_000001"])
    with pytest.raises(FileNotFoundError, match=r"lacks 2 of 4 val files.*JPEGImages/2099_000001\.jpg"):
        PascalVOCDataModule(root, test_list=tmp_path / "list.txt").eval_datasets("val")


def test_an_id_beyond_the_twenty_classes_and_a_damaged_label_are_errors(tmp_path):
    write_pascal_voc(tmp_path)
    files = [
        tmp_path / f"{FOLDER}/SegmentationClassAug/{stem}.png" for stem in ("2007_000033", "2007_000042")
    ]
    write_png(files[0], np.full((32, 48), 21, np.uint8))
    files[1].write_bytes(files[1].read_bytes()[:60])
    dataset = PascalVOCDataModule(tmp_path).eval_datasets("val")["pascal_voc"]
    with pytest.raises(ValueError, match=r"2007_000033\.png holds ids .*found \[21\], known are 0\.\.20"):
        dataset[0]
    with pytest.raises(ValueError, match=r"2007_000042\.png cannot be read"):
        dataset[1]


def test_the_published_numbers_of_images():
    assert PascalVOCDataModule.layout.counts == {"train": {"VOC2012": 1464}, "val": {"VOC2012": 1449}}
