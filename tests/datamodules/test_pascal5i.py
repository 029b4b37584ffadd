"""PASCAL-5i in its layout: lists, folds, areas counted once."""

from pathlib import Path

import numpy as np
import pytest

from datamodules.auxiliary import Supports
from datamodules.few_shot_transforms import ScaleRotateBlurFlipCrop
from datamodules.pascal5i import NAMES, Pascal5iDataModule
from functional.classes import VOC21
from tests.fake_data import write_ids, write_png
from tests.fake_few_shot import write_pascal5i

SMALL = {"min_pixels": 10, "size": 32, "episodes": 8, "test_seeds": [1]}


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """The fake files are two or three of each class."""
    monkeypatch.setattr("datamodules.few_shot.STORED_SUPPORTS", 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pascal5i")
    write_pascal5i(folder)
    return folder


@pytest.fixture
def root(tmp_path):
    write_pascal5i(tmp_path, "VOC2012")
    return tmp_path


def test_a_fold_holds_five_classes_out_and_each_class_is_novel_once(files):
    novel = [list(Pascal5iDataModule(files, fold=fold).novel_classes.values()) for fold in range(4)]
    assert [name for names in novel for name in names] == list(NAMES)
    data = Pascal5iDataModule(files, fold=3)
    assert list(data.novel_classes) == [16, 17, 18, 19, 20] and len(data.base_classes) == 15


def test_prompts_have_their_own_names_for_the_same_twenty_classes():
    different = {b: a for a, b in zip(NAMES, VOC21.names[1:], strict=True) if a != b}
    assert different == {
        "aeroplane": "airplane",
        "diningtable": "dining table",
        "pottedplant": "potted plant",
        "tvmonitor": "television",
    }


def test_published_lists_choose_the_images_whatever_folders_they_name(files):
    images = Pascal5iDataModule(files).images("train")
    assert len(images) == 60 and images.name(0) == "2007_000000" and images.dataset == "pascal"
    assert images.aux_key(14, 15) == ("2007_000014", 15)
    val = Pascal5iDataModule(files).images("val")
    assert val.name(0) == "2008_000000" and Pascal5iDataModule(files).images("test").name(0) == val.name(0)


def test_labels_keep_their_ids_and_areas_leave_out_background_and_void(files):
    images = Pascal5iDataModule(files).images("train")
    image, label = images.read(6)
    assert image.shape == (32, 48, 3) and set(np.unique(label)) == {0, 1, 7, 255}
    assert images.areas[6] == {1: 64, 7: 64} and images.areas[4] == {5: 64}


def test_an_image_with_a_novel_class_is_not_trained_on_by_bam(files):
    data = Pascal5iDataModule(files, fold=0, **SMALL)  # image 6 shows 7, base, and 1, novel
    assert 6 not in {query for query, _ in data.pool("train").queries}
    hsnet = Pascal5iDataModule(files, fold=0, protocol="hsnet", **SMALL)
    assert (6, [7]) in hsnet.pool("train").queries


def test_the_smallest_area_is_2048_pixels_unless_another_is_given(files):
    assert (
        Pascal5iDataModule(files).min_pixels == 2048 and Pascal5iDataModule(files, **SMALL).min_pixels == 10
    )
    with pytest.raises(ValueError, match="classes of 2048 pixels or more"):
        Pascal5iDataModule(files).train_dataset()


def test_training_and_evaluation_give_batches(files):
    transform = ScaleRotateBlurFlipCrop((32, 32))
    data = Pascal5iDataModule(files, batch_size=2, num_workers=0, seed=3, transform=transform, **SMALL)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 32, 32) and batch["support_image"].shape == (2, 1, 3, 32, 32)
    (loader,) = data.test_dataloader()
    assert {int(batch["class_id"]) for batch in loader} <= {1, 2, 3, 4, 5}


def test_lists_of_hsnet_give_the_pairs_themselves(files, tmp_path):
    write_ids(
        tmp_path / "fold0.txt", ["2008_000001__02", "2008_000021__02", "2008_000000__01", "2008_000020__01"]
    )
    data = Pascal5iDataModule(files, protocol="hsnet", test_list=tmp_path / "fold0.txt", **SMALL)
    pool = data.pool("test")
    assert [(data.images("test").name(i), c) for i, c in pool.queries] == [
        ("2008_000001", [2]),
        ("2008_000021", [2]),
        ("2008_000000", [1]),
        ("2008_000020", [1]),
    ]
    write_ids(tmp_path / "fold0.txt", ["2008_000001__03"])
    with pytest.raises(ValueError, match="found 2008_000001 with class 3, which its label does not show"):
        Pascal5iDataModule(files, test_list=tmp_path / "fold0.txt", **SMALL).pool("test")


@pytest.mark.parametrize(
    "lines, found", [(["a b c"], "the line a b c|the line 'a b c'"), (["x", "x"], "2 lines"), ([], "0 lines")]
)
def test_a_file_that_is_no_list_is_refused(files, tmp_path, lines, found):
    write_ids(tmp_path / "list.txt", lines)
    with pytest.raises(ValueError, match=f"is no list of images: found ({found})"):
        Pascal5iDataModule(files, train_list=tmp_path / "list.txt").images("train")


def test_missing_lists_files_and_folders_are_named(root):
    with pytest.raises(FileNotFoundError, match=r"There is no list .*nowhere\.txt.*set test_list"):
        Pascal5iDataModule(root, test_list=root / "nowhere.txt").images("test")
    (root / "VOC2012/SegmentationClassAug/2007_000003.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of 120 files: the first is .*2007_000003\.png"):
        Pascal5iDataModule(root).images("train")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        Pascal5iDataModule(root / "nowhere")


def test_folders_are_listed_instead_of_asking_for_each_file(files, monkeypatch):
    asked, is_file = [], Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: asked.append(path.suffix) or is_file(path))
    assert len(Pascal5iDataModule(files).images("train")) == 60
    assert set(asked) <= {".txt"}


def test_a_link_to_nowhere_and_a_whole_missing_folder_are_missing_files(root):
    label = root / "VOC2012/SegmentationClassAug/2007_000003.png"
    label.unlink()
    label.symlink_to(root / "nowhere.png")
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of 120 files: the first is .*2007_000003\.png"):
        Pascal5iDataModule(root).images("train")
    (root / "VOC2012/JPEGImages").rename(root / "VOC2012/images")
    with pytest.raises(FileNotFoundError, match=r"lacks 61 of 120 files: the first is .*2007_000000\.jpg"):
        Pascal5iDataModule(root).images("train")


def test_areas_are_counted_once_and_again_when_labels_change(root, monkeypatch):
    counted = []
    read_label = Pascal5iDataModule(root).images("val").__class__.read_label
    monkeypatch.setattr(
        "datamodules.few_shot_files.FileImages.read_label",
        lambda self, index: counted.append(index) or read_label(self, index),
    )
    first = Pascal5iDataModule(root).images("val").areas
    (cache,) = root.glob("class_areas_pascal_*.json")
    assert len(counted) >= 40
    counted.clear()
    assert Pascal5iDataModule(root).images("val").areas == first and len(counted) < 40
    write_png(root / "VOC2012/SegmentationClassAug/2008_000000.png", np.full((32, 48), 9, np.uint8))
    assert Pascal5iDataModule(root).images("val").areas[0] == {9: 32 * 48}
    cache.write_text("{}")
    assert Pascal5iDataModule(root).images("val").areas[0] == {9: 32 * 48}


def test_a_folder_that_cannot_be_written_to_is_counted_each_time(root, monkeypatch):
    def refuse(path, document):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("datamodules.few_shot_files.write_json", refuse)
    with pytest.warns(UserWarning, match="counted at each start: .*Permission denied"):
        assert Pascal5iDataModule(root).images("val").areas[0] == {1: 64}


def test_all_options_reach_the_episodes(files, tmp_path):
    options = {
        **{"fold": 2, "supports": Supports(1), "eval_supports": {"five": Supports(1)}, "protocol": "hsnet"},
        **{
            "size": 16,
            "episodes": 4,
            "val_seed": 3,
            "test_seeds": [4, 5],
            "min_pixels": 5,
            "skip_rare": True,
        },
        **{"original_size": True, "exact_unpad": False, "episode_file": tmp_path / "e.json", "batch_size": 2},
        **{"eval_batch_size": 1, "num_workers": 1, "seed": 8},
    }
    data = Pascal5iDataModule(files, **options)
    renamed = {"episodes": data.number, "val_seed": data.seeds["val"][0], "test_seeds": data.seeds["test"]}
    found = {name: renamed.get(name) or getattr(data, name, None) for name in options if name != "size"}
    assert found == {name: value for name, value in options.items() if name != "size"} and data.fit.size == 16
