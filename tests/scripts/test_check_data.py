"""One report names every fault of a data set, and only faults make the command fail."""

from dataclasses import replace
from shutil import copy

import numpy as np
import pytest

from datamodules.cityscapes import CityscapesDataModule
from datamodules.deliver import DeliverDataModule
from datamodules.fmb import FMBDataModule
from scripts.check_data import data_sets, main
from tests.fake_data import (
    write_acdc,
    write_bdd100k,
    write_cityscapes,
    write_coco,
    write_coco_2014,
    write_dark_zurich,
    write_deliver,
    write_fmb,
    write_gta5,
    write_mapillary,
    write_pascal_context,
    write_pascal_voc,
    write_png,
    write_synthia,
)


@pytest.fixture
def fmb(tmp_path, monkeypatch):
    counts = {"train": {"Infrared": 2}, "test": {"Infrared": 2}}
    monkeypatch.setattr(FMBDataModule, "layout", replace(FMBDataModule.layout, counts=counts))
    write_fmb(tmp_path / "fmb")
    return tmp_path / "fmb"


def report(capsys, *words) -> list[str]:
    with pytest.raises(SystemExit) as stop:
        main([*map(str, words), "--workers", "2"])
    assert stop.value.code == 1
    return capsys.readouterr().out.splitlines()


def test_the_data_sets_are_known_by_name():
    assert set(data_sets()) >= {"cityscapes", "deliver", "fmb", "dsec", *NEW}


def test_a_complete_data_set_has_no_faults_and_its_sizes_and_ids_are_told(fmb, capsys):
    main([f"fmb={fmb}"])
    first, train, test, end = capsys.readouterr().out.splitlines()
    assert first == f"FMB in {fmb}" and end == "no faults"
    assert train == "  train: 2 images, sizes 48x32 (2) (published 800x600)"
    assert test.startswith("  test: 2 images, sizes 48x32 (2) (published 800x600), ids 0 1 2 ")


def test_all_faults_are_in_one_report(fmb, capsys):
    (fmb / "train/Infrared/00002.png").write_bytes((fmb / "train/Infrared/00002.png").read_bytes()[:200])
    copy(fmb / "train/Infrared/00001.png", fmb / "test/Infrared/00005.png")
    write_png(fmb / "test/Infrared/00006.png", np.zeros((32, 48), np.uint16))
    write_png(fmb / "test/Label/00003.png", np.full((32, 48), 77, np.uint8))
    write_png(fmb / "test/Label/00004.png", np.zeros((30, 48), np.uint8))
    write_png(fmb / "test/Label/00006.png", np.zeros((32, 48), np.uint8))
    lines = report(capsys, f"fmb={fmb}")
    faults = "\n".join(line for line in lines if line.startswith("  FAULT"))
    for expected in (
        "00002.png cannot be read",
        "test, folder Infrared: found 4 images, published are 2",
        "00003.png holds ids that its data set does not have: found [77]",
        "00004.png does not fit its image test/Infrared/00004.png",
        "There is no label",
        "00006.png holds 16-bit values",
        "train/Infrared/00001.png (train) and test/Infrared/00005.png (test) show the same picture",
    ):
        assert expected in faults
    assert faults.count("FAULT") == 7 and lines[-1] == (
        "7 faults: damaged file (1), image of the wrong kind (1), label of another size (1), label with "
        "unknown ids or of the wrong kind (1), missing file (1), picture in two splits (1), wrong number of "
        "images (1)"
    )


def test_sixteen_bit_images_can_be_accepted(fmb, capsys):
    write_png(fmb / "train/Infrared/00001.png", np.full((32, 48), 9999, np.uint16))
    report(capsys, f"fmb={fmb}")
    main([f"fmb={fmb}", "--rescale-16-bit"])


def test_pictures_of_one_colour_are_not_shared_by_splits(fmb, capsys):
    for file in ("train/Infrared/00001.png", "test/Infrared/00003.png"):
        write_png(fmb / file, np.full((32, 48, 3), (9, 0, 200), np.uint8))
    main([f"fmb={fmb}"])
    assert capsys.readouterr().out.endswith("no faults\n")


def test_a_number_of_workers_below_one_is_a_usage_error(fmb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([f"fmb={fmb}", "--workers", "0"])
    assert stop.value.code == 2 and "--workers must be at least 1: found 0" in capsys.readouterr().err


def test_incomplete_sets_are_told_by_folder_and_an_empty_one_too(tmp_path, capsys):
    write_deliver(tmp_path / "deliver")
    write_cityscapes(tmp_path / "cityscapes")
    (tmp_path / "fmb").mkdir()
    sets = [f"{name}={tmp_path / name}" for name in ("deliver", "cityscapes", "fmb")]
    lines = report(capsys, *sets)
    assert "  FAULT train, folder fog: found 0 images, published are 795." in lines
    assert "  FAULT val, folder val: found 2 images, published are 500." in lines
    assert "  FAULT test, folder Infrared: found 0 images, published are 280." in lines
    assert f"  FAULT test: found no {tmp_path}/fmb/test/Infrared/*.png." in lines
    folders = sum(len(part) for part in DeliverDataModule.layout.counts.values())
    numbers = folders + len(CityscapesDataModule.layout.counts) + 2
    assert lines[-1] == f"{numbers + 2} faults: empty split (2), wrong number of images ({numbers})"


def test_two_images_of_one_name_are_told_and_files_of_other_kinds_are_not(fmb, capsys):
    write_png(fmb / "train/Infrared/00001.JPG.png", np.zeros((4, 4), np.uint8))
    (fmb / "train/Infrared/00001.JPG.png").rename(fmb / "train/Infrared/00001.JPG")
    (fmb / "train/Infrared/00002.txt").write_text("notes")
    lines = report(capsys, f"fmb={fmb}")
    assert lines[-1] == "1 faults: name of two images (1)"
    assert f"{fmb}/train/Infrared/00001.JPG has the name of train/Infrared/00001.png" in "\n".join(lines)


@pytest.mark.parametrize(
    "word, message",
    [("delivr=x", "did you mean deliver=ROOT"), ("fmb", "fmb="), ("dsec=nowhere", "DSEC has no folder")],
)
def test_a_wrong_name_or_root_is_said(word, message):
    with pytest.raises(ValueError, match=message):
        main([word])


NEW = {
    "gta5": write_gta5,
    "synthia": write_synthia,
    "bdd100k": write_bdd100k,
    "mapillary": write_mapillary,
    "acdc": write_acdc,
    "dark_zurich": write_dark_zurich,
    "pascal_voc": write_pascal_voc,
    "pascal_context": write_pascal_context,
    "coco": write_coco,
    "coco_2014": write_coco_2014,
}


@pytest.mark.parametrize("name", NEW)
def test_only_the_numbers_of_images_are_wrong_in_small_copies(tmp_path, capsys, name):
    NEW[name](tmp_path)
    faults = [line for line in report(capsys, f"{name}={tmp_path}") if line.startswith("  FAULT")]
    counts = data_sets()[name].layout.counts.values()
    assert len(faults) == sum(len(folders) for folders in counts)
    assert all("images, published are" in fault for fault in faults)


def test_images_without_folders_and_those_of_another_layout_are_counted_together(tmp_path, capsys):
    write_gta5(tmp_path / "gta5")
    write_acdc(tmp_path / "acdc", flat=True)
    write_bdd100k(tmp_path / "bdd100k", older=True)
    sets = [f"{name}={tmp_path / name}" for name in ("gta5", "acdc", "bdd100k")]
    faults = [line for line in report(capsys, *sets) if line.startswith("  FAULT")]
    assert faults == [
        "  FAULT train, folder *: found 2 images, published are 24966.",
        "  FAULT val, folder *: found 8 images, published are 406.",
        "  FAULT val, folder *: found 2 images, published are 1000.",
    ]


def test_images_of_many_sizes_are_published_so(tmp_path, capsys):
    write_mapillary(tmp_path)
    lines = report(capsys, f"mapillary={tmp_path}")
    assert "sizes 48x32 (1), 32x48 (1) (published many sizes), ids" in lines[1]
