"""Published labels become train ids beside them; an interrupted command goes on, and faults are named."""

import os

import cv2
import numpy as np
import pytest
from PIL import Image

from datamodules.gta5 import GTA5DataModule
from datamodules.label_maps import CITYSCAPES_IDS, MAPILLARY_IDS, SYNTHIA_IDS, train_id_table
from scripts.convert_labels import main
from tests.fake_data import blocks, write_gta5, write_mapillary, write_palette, write_png, write_synthia


def stored(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def write_label_ids(root) -> None:
    for split, city in (("train", "aachen"), ("val", "lindau")):
        path = root / f"gtFine/{split}/{city}/{city}_000001_000019_gtFine_labelIds.png"
        write_png(path, blocks(path, range(34), (32, 48)))


def files_of(root, pattern: str) -> list:
    return sorted(path for path in root.glob(pattern) if "TrainIds" not in path.name)


def converted(path, suffix: str = ".png"):
    return path.with_name(path.name.removesuffix(suffix) + "_labelTrainIds.png")


@pytest.mark.parametrize(
    "name, write, pattern, ids, count",
    [
        ("gta5", write_gta5, "labels/*.png", CITYSCAPES_IDS, 2),
        ("mapillary", write_mapillary, "validation/labels/*.png", MAPILLARY_IDS, 2),
    ],
)
def test_indices_of_a_palette_become_train_ids(tmp_path, capsys, name, write, pattern, ids, count):
    write(tmp_path)
    main([f"{name}={tmp_path}", "--overwrite", "--workers", "2"])
    published = files_of(tmp_path, pattern)
    assert len(published) == count
    for path in published:
        assert Image.open(path).mode == "P" and Image.open(converted(path)).mode == "L"
        assert np.array_equal(stored(converted(path)), train_id_table(ids)[stored(path)])
    assert capsys.readouterr().out == f"{name}: {count} labels written, 0 were there already\n"


def test_synthias_ids_are_those_of_the_red_channel(tmp_path):
    write_synthia(tmp_path)
    main([f"synthia={tmp_path}", "--overwrite"])
    for path in files_of(tmp_path, "GT/LABELS/*.png"):
        red = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[..., -1]
        assert red.dtype == np.uint16 and red.max() <= 22
        assert np.array_equal(stored(converted(path)), train_id_table(SYNTHIA_IDS)[red])


def test_label_ids_of_cityscapes_become_train_ids(tmp_path):
    write_label_ids(tmp_path)
    main([f"cityscapes={tmp_path}"])
    for path in files_of(tmp_path, "gtFine/*/*/*.png"):
        expected = train_id_table(CITYSCAPES_IDS)[stored(path)]
        assert np.array_equal(stored(converted(path, "_labelIds.png")), expected)
    assert (tmp_path / "gtFine/val/lindau/lindau_000001_000019_gtFine_labelTrainIds.png").is_file()


def test_what_is_there_is_left_alone_unless_it_is_to_be_overwritten(tmp_path, capsys):
    write_gta5(tmp_path)
    kept, missing = (tmp_path / f"labels/0000{i}_labelTrainIds.png" for i in (1, 2))
    missing.unlink()
    before = kept.read_bytes()
    main([f"gta5={tmp_path}"])
    assert kept.read_bytes() == before and missing.is_file()
    assert "gta5: 1 labels written, 1 were there already" in capsys.readouterr().out
    main([f"gta5={tmp_path}", "--overwrite"])
    assert kept.read_bytes() != before
    assert "gta5: 2 labels written, 0 were there already" in capsys.readouterr().out


def test_the_data_module_reads_what_was_written(tmp_path):
    write_gta5(tmp_path)
    main([f"gta5={tmp_path}", "--overwrite"])
    label = GTA5DataModule(tmp_path).train_dataset()[0]["label"]
    assert np.array_equal(label, train_id_table(CITYSCAPES_IDS)[stored(tmp_path / "labels/00001.png")])


def test_faults_are_named_while_all_other_files_are_converted(tmp_path, capsys):
    write_gta5(tmp_path / "gta5")
    write_synthia(tmp_path / "synthia")
    for path in (tmp_path / "gta5").glob("labels/*TrainIds.png"):
        path.unlink()
    grey, cut = tmp_path / "gta5/labels/00001.png", tmp_path / "gta5/labels/00003.png"
    write_palette(cut, blocks(cut, range(35), (32, 48)))
    cut.write_bytes(cut.read_bytes()[:-200])
    Image.open(grey).convert("L").save(grey)  # luminance
    shallow = tmp_path / "synthia/GT/LABELS/0000001.png"
    write_png(shallow, np.zeros((32, 48, 3), np.uint8))
    with pytest.raises(SystemExit) as stop:
        main([f"gta5={tmp_path / 'gta5'}", f"synthia={tmp_path / 'synthia'}", "--overwrite"])
    assert stop.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "gta5: 1 labels written, 0 were there already"
    assert f"  FAULT {grey} does not hold" in lines[1] and "Pillow mode L in place of P" in lines[1]
    assert f"  FAULT {cut} cannot be read" in lines[2]
    assert lines[3] == "synthia: 1 labels written, 0 were there already"
    assert f"  FAULT {shallow} does not hold" in lines[4] and "mode RGB in place of RGB;16" in lines[4]
    assert [converted(path).exists() for path in files_of(tmp_path / "gta5", "labels/*.png")] == [
        False, True, False
    ]  # fmt: skip


def test_an_interrupted_command_leaves_no_part_of_a_result(tmp_path, monkeypatch):
    write_gta5(tmp_path)
    (tmp_path / "labels/00001_labelTrainIds.png").unlink()

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            main([f"gta5={tmp_path}"])
    assert not (tmp_path / "labels/00001_labelTrainIds.png").exists()
    main([f"gta5={tmp_path}"])
    assert (tmp_path / "labels/00001_labelTrainIds.png").is_file()
    assert not list(tmp_path.rglob(".*.tmp"))


@pytest.mark.parametrize(
    "word, message",
    [
        ("gta=x", "did you mean gta5=ROOT"),
        ("acdc=x", "did you mean cityscapes or gta5"),
        ("gta5=nowhere", "gta5 has no published labels: looked for nowhere/labels"),
    ],
)
def test_a_wrong_name_or_root_is_said(word, message):
    with pytest.raises(ValueError, match=message):
        main([word])
