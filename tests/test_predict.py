import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from callbacks.pictures import heat_maps, legend
from config_files import UsageError
from functional.classes import class_table, open_table
from functional.palette import overlay
from lightning_modules.diffsegmenter import DiffSegmenterPrediction
from models.candidates import AllCandidates
from predict import find_device, load, main, untrained_model
from tests.tiny_model import write_tiny_model
from tests.tiny_run import tiny_config, write_config
from tests.tiny_video import random_frames, save_video
from train import main as train

COLORS = class_table("deliver11").colors
ROOT = Path(__file__).parent.parent
OPEN, MINI = ROOT / "conf/diffsegmenter_open.yaml", ROOT / "conf/mini/diffsegmenter_objects.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    path = write_config(folder / "c.yaml", tiny_config())
    train(["--config", str(path), "--output", str(folder / "run")])
    return folder / "run"


@pytest.fixture(scope="module")
def open_config(tmp_path_factory):
    """conf/diffsegmenter_open.yaml with a tiny model of few words that reads 16 tokens."""
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder, widths=(8, 16, 16, 16), vae_widths=(8, 8), heads=1)
    tokenizer = folder / "tokenizer/tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"closed_vocabulary": True}))
    config = yaml.safe_load(OPEN.read_text())
    network = config["model"]["init_args"]["network"]["init_args"]
    network["diffusion"]["init_args"]["path"], network["size"] = str(folder), [32, 32]
    return write_config(folder / "open.yaml", config)


@pytest.fixture(scope="module")
def segmenter(open_config):
    return load(open_config, classes=["dog", "hot dog", "grass"])


def candidates_config(path: Path, candidates) -> Path:
    """A second config that sets the candidates."""
    return write_config(path, {"model": {"init_args": {"candidates": candidates}}})


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


# --- classes of one's own


def test_classes_of_ones_own_give_ids_overlay_heat_maps_and_legend(open_config, segmenter, image, tmp_path):
    out = tmp_path / "out"
    words = ["--config", open_config, "--input", image, "--output", out, "--classes", "dog,hot  dog , grass"]
    main([str(word) for word in words])
    shown = {path.name: np.asarray(Image.open(path)) for path in out.iterdir()}
    assert set(shown) == {"street_ids.png", "street_overlay.png", "street_heat.png", "legend.png"}
    table, pixels, ids = (
        open_table(["dog", "hot dog", "grass"]),
        np.asarray(Image.open(image)),
        shown["street_ids.png"],
    )
    np.testing.assert_array_equal(ids, segmenter.predict(image))
    np.testing.assert_array_equal(shown["street_overlay.png"], overlay(pixels, ids, table.colors))
    np.testing.assert_array_equal(shown["street_heat.png"], heat_maps(pixels, segmenter.heat(image)))
    np.testing.assert_array_equal(shown["legend.png"], legend(table.names, table.colors, 480))


def test_the_heat_maps_of_the_classes_are_what_the_mask_is_made_of(segmenter, image):
    heat = segmenter.heat(image)
    assert list(heat) == ["dog", "hot dog", "grass"] == segmenter.names[1:]
    maps = np.stack(list(heat.values()))
    assert maps.shape == (3, 13, 21) and maps.dtype == np.float32
    assert maps.min() == 0 and maps.max() == 1
    assert not np.array_equal(maps[0], maps[2])
    mask = np.where(maps.max(0) > 0.5, 1 + maps.argmax(0), 0)
    np.testing.assert_array_equal(segmenter.predict(image), mask)


def test_a_config_takes_classes_as_text_or_list_and_several_files(open_config, segmenter, image, tmp_path):
    text = load(str(open_config), classes="grass, dog")
    assert text.names == ["background", "grass", "dog"]
    np.testing.assert_array_equal(text.heat(image)["dog"], segmenter.heat(image)["dog"])
    again = write_config(tmp_path / "seed.yaml", {"model": {"init_args": {"threshold": 1.0}}})
    assert (load([open_config, again], classes=["dog"]).predict(image) == 0).all()


def test_loading_a_config_leaves_the_users_random_numbers_alone(open_config):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load(open_config, classes=["dog"])
    assert torch.equal(torch.rand(3), expected)


def test_the_open_config_has_the_published_settings(monkeypatch):
    built = []
    monkeypatch.setattr("cli.build", lambda config: (built.append(config), None))
    untrained_model([OPEN], ["dog"])
    options = built[0]["model"]["init_args"]
    network = options["network"]["init_args"]
    assert options["classes"] == ["dog"] and options["candidates"] == "all"
    expected = {
        "timesteps": [100], "noises": 1, "level_weights": [0.1, 0.1, 0.5, 0.3], "self_power": 1,
        "size": [512, 512], "normalize": "per_class", "contrast": None,
    }  # fmt: skip
    assert {key: network[key] for key in expected} == expected
    assert network["diffusion"]["init_args"]["path"] == "sd-1.5"


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("", "found ['']"),
        ("dog, ,grass", "found ['dog', '', 'grass']"),
        ("dog,dog", "found ['dog', 'dog']"),
        ("dog, gras", "never read the word 'gras' (of 'gras'). Did you mean 'grass'?"),
        ("dog, " + "dog " * 20, "has 25 tokens with begin and end and the model reads 16"),
        (None, 'Name them, such as --classes "dog, bench, grass"'),
    ],
)
def test_classes_that_cannot_be_asked_for_are_refused_before_any_image(
    open_config, image, tmp_path, capsys, classes, message
):
    words = [] if classes is None else ["--classes", classes]
    output = tmp_path / "out"
    said = error_of(["--config", open_config, "--input", image, "--output", output, *words], capsys)
    assert message in said and len(said.splitlines()) <= 3
    assert not output.exists()


def test_a_model_of_a_class_table_refuses_other_classes(run, image, tmp_path, capsys):
    assert "was trained on classes of its own" in error_of(
        [run, "--input", image, "--classes", "dog"], capsys
    )
    config = write_config(tmp_path / "c.yaml", tiny_config())
    said = error_of(["--config", config, "--input", image, "--classes", "dog"], capsys)
    assert "Supervised" in said and "knows the classes of its table only" in said
    with pytest.raises(UsageError, match="of its own"):
        load(run, classes=["dog"])
    with pytest.raises(ValueError, match="Heat maps need a method"):
        load(run).heat(image)


@pytest.mark.parametrize("candidates", ["labels", {"class_path": "models.candidates.LabelCandidates"}])
def test_candidates_from_labels_become_all_classes_that_are_named(open_config, image, tmp_path, candidates):
    configs = [open_config, candidates_config(tmp_path / "labels.yaml", candidates)]
    assert list(load(configs, classes="dog, grass").heat(image)) == ["dog", "grass"]
    table = write_config(tmp_path / "table.yaml", {"model": {"init_args": {"classes": "voc21"}}})
    with pytest.raises(UsageError, match="takes them from labels"):
        load([*configs, table])


@pytest.mark.parametrize("config", [OPEN, MINI], ids=["open", "mini"])
def test_the_projects_configs_ask_for_classes_before_any_weights_are_read(config, image, capsys):
    said = error_of(["--config", config, "--input", image], capsys)
    assert "do not tell which classes to look for" in said and "--classes" in said
    with pytest.raises(UsageError, match=r"nowhere\.yaml does not exist"):
        load(config.with_name("nowhere.yaml"), classes=["dog"])


def test_other_candidates_stay_and_only_these_have_heat_maps(open_config, image, tmp_path):
    (tmp_path / "kept.json").write_text(json.dumps({"street": ["grass"]}))
    listed = {
        "class_path": "models.candidates.FileCandidates",
        "init_args": {"path": str(tmp_path / "kept.json")},
    }
    found = load([open_config, candidates_config(tmp_path / "file.yaml", listed)], classes="dog, grass")
    assert list(found.heat(image)) == ["grass"] and set(np.unique(found.predict(image))) == {0, 2}


# --- videos


def test_a_video_gives_ids_of_each_frame_and_one_video_of_overlays(run, tmp_path, capsys):
    pytest.importorskip("av")
    frames = random_frames()
    path = save_video(tmp_path / "clip.MOV", frames)
    main([str(run), "--input", str(path), "--output", str(tmp_path / "out")])
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    masks = [f"clip_ids/00000{i}.png" for i in range(3)]
    assert names == {*masks, "clip_overlay.mp4", "legend.png"}
    predictor = load(run)
    for frame, mask in zip(frames, masks, strict=True):
        ids = np.asarray(Image.open(tmp_path / "out" / mask))
        np.testing.assert_array_equal(ids, predictor.predict(frame))
    assert "3 frame(s)" in capsys.readouterr().out


def test_all_frames_of_a_video_have_the_noise_of_its_name(open_config, tmp_path, monkeypatch):
    pytest.importorskip("av")
    path, names = save_video(tmp_path / "clip.mov", random_frames()), []
    score_maps = DiffSegmenterPrediction.score_maps
    monkeypatch.setattr(
        DiffSegmenterPrediction,
        "score_maps",
        lambda self, batch: names.append(batch["name"]) or score_maps(self, batch),
    )
    main(
        [
            "--config",
            str(open_config),
            "--classes",
            "dog",
            "--input",
            str(path),
            "--output",
            str(tmp_path / "o"),
        ]
    )
    assert names == [["clip"]] * 3


def test_a_wrong_video_is_named_before_the_model_is_loaded(tmp_path, capsys):
    pytest.importorskip("av")
    (tmp_path / "text.mp4").write_text("text")
    assert "text.mp4 cannot be read as a video" in error_of(
        ["nowhere", "--input", tmp_path / "text.mp4"], capsys
    )
    assert "nowhere.mkv does not exist" in error_of(["nowhere", "--input", "nowhere.mkv"], capsys)


def test_a_model_that_keeps_candidates_by_name_refuses_videos(open_config, tmp_path, capsys, monkeypatch):
    pytest.importorskip("av")
    path = save_video(tmp_path / "clip.mov", random_frames())
    kept = SimpleNamespace(path="kept.json")
    monkeypatch.setattr(AllCandidates, "cache", kept, raising=False)
    args = ["--config", open_config, "--classes", "dog", "--input", path, "--output", tmp_path / "o"]
    assert "kept.json" in error_of(args, capsys)
