import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from functional.classes import class_table
from functional.palette import overlay
from predict import find_device, load, main
from tests.tiny_run import tiny_config, write_config
from train import main as train

COLORS = class_table("deliver11").colors


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    path = write_config(folder / "c.yaml", tiny_config())
    train(["--config", str(path), "--output", str(folder / "run")])
    return folder / "run"


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (13, 21, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "street.png")
    return tmp_path / "street.png"


def error_of(args, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_every_form_of_an_image_gives_the_same_label(run, image):
    predictor = load(run / "checkpoints/last.ckpt")
    pixels = np.asarray(Image.open(image))
    label = predictor.predict(image)
    assert label.shape == (13, 21) and label.dtype == np.uint8 and label.max() < 11
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255
    for form in (str(image), Image.open(image), pixels, tensor):
        np.testing.assert_array_equal(predictor.predict(form), label)


def test_a_run_folder_loads_its_best_checkpoint_and_a_broken_current_folder_does_not_matter(
    run, image, monkeypatch
):
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(
        load(run).predict(image), load(run / "checkpoints/best.ckpt").predict(image)
    )


def test_the_weights_of_the_checkpoint_are_used(run, image, tmp_path):
    checkpoint = torch.load(run / "checkpoints/last.ckpt")
    checkpoint["state_dict"]["network.head.weight"].zero_()
    checkpoint["state_dict"]["network.head.bias"].copy_(torch.eye(11)[7])
    torch.save(checkpoint, tmp_path / "seven.ckpt")
    assert (load(tmp_path / "seven.ckpt").predict(image) == 7).all()


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((3, 4, 4), np.uint8),
        torch.zeros(4, 4, 3),
        torch.full((3, 4, 4), 255.0),
        torch.zeros(3, 4, 4, dtype=torch.uint8),
        17,
    ],
)
def test_an_array_of_another_shape_type_or_range_is_refused(run, wrong):
    with pytest.raises(ValueError, match="found"):
        load(run).predict(wrong)


def test_a_file_gives_ids_overlay_and_legend(run, image, tmp_path, capsys):
    main([str(run), "--input", str(image), "--output", str(tmp_path / "out")])
    ids = np.asarray(Image.open(tmp_path / "out/street_ids.png"))
    np.testing.assert_array_equal(ids, load(run).predict(image))
    shown = np.asarray(Image.open(tmp_path / "out/street_overlay.png"))
    np.testing.assert_array_equal(shown, overlay(np.asarray(Image.open(image)), ids, COLORS))
    assert (tmp_path / "out/legend.png").is_file()
    assert str(tmp_path / "out") in capsys.readouterr().out


def test_a_folder_gives_masks_for_its_images_only(run, image, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.jpg"):
        Image.open(image).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    main([str(run), "--input", str(folder)])
    names = {path.name for path in (run / "predictions").iterdir()}
    assert names == {"a_ids.png", "a_overlay.png", "b_ids.png", "b_overlay.png", "legend.png"}


def test_a_method_without_training_predicts_from_its_config(image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["--config", str(write_config(tmp_path / "free.yaml", tiny_config())), "--input", str(image)])
    assert Path("runs/free/predictions/street_ids.png").is_file()


def test_the_device_is_where_the_model_lies_and_one_that_is_missing_is_refused(
    run, image, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device(None) == "cuda"  # where there is one
    assert find_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load(run).device == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for wrong in ("cuda", "cuda:1", "gpu"):
        message = error_of([run, "--input", image, "--output", tmp_path / "no", "--device", wrong], capsys)
        assert repr(wrong) in message and "There is: cpu." in message
        assert len(message.splitlines()) <= 3 and not (tmp_path / "no").exists()
    main([str(run), "--input", str(image), "--output", str(tmp_path / "yes"), "--device", "cpu"])
    assert (tmp_path / "yes/street_ids.png").is_file()


def test_mistakes_are_named_in_short(run, image, tmp_path, capsys):
    assert "nowhere.png does not exist" in error_of([run, "--input", "nowhere.png"], capsys)
    (tmp_path / "empty").mkdir()
    assert "holds no images" in error_of([run, "--input", tmp_path / "empty"], capsys)
    (tmp_path / "text.png").write_text("text")
    assert "text.png is not an image" in error_of([run, "--input", tmp_path / "text.png"], capsys)
    (tmp_path / "cut.png").write_bytes(image.read_bytes()[:400])
    assert "cut.png cannot be read" in error_of([run, "--input", tmp_path / "cut.png"], capsys)
    assert "no run folder" in error_of(["nowhere", "--input", image], capsys)
    Image.open(image).save(tmp_path / "street.jpg")
    assert "several images named street" in error_of([run, "--input", tmp_path], capsys)


class Malicious:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_code_in_a_checkpoint_is_not_run(image, tmp_path, capsys):
    torch.save({"state_dict": {}, "config": Malicious(tmp_path / "marker")}, tmp_path / "bad.ckpt")
    assert "bad.ckpt cannot be read safely" in error_of([tmp_path / "bad.ckpt", "--input", image], capsys)
    assert not (tmp_path / "marker").exists()


def test_a_checkpoint_of_another_program_is_refused(image, tmp_path, capsys):
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    assert "no checkpoint of this project" in error_of([tmp_path / "foreign.ckpt", "--input", image], capsys)


def test_the_checkpoint_alone_is_enough(run, image, tmp_path):
    alone = tmp_path / "alone.ckpt"
    alone.write_bytes((run / "checkpoints/best.ckpt").read_bytes())
    assert load(alone).names == list(class_table("deliver11").names)
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
