import json
import re
from functools import cache
from io import BytesIO
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from config_files import UsageError
from datamodules.auxiliary import Auxiliary
from datamodules.pascal5i import Pascal5iDataModule
from functional.support_images import profile_hash, support_seed
from models.hed import HED
from scripts import generate_support_images as script
from scripts import support_image_files
from scripts.support_image_files import read_record, whole, write_image, write_manifest
from tests.fake_few_shot import write_pascal5i
from tests.tiny_difffss import TwoPlanes, write_tiny_clip, write_tiny_models

TEMPLATE = "a photo of {a_name}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    write_tiny_models(path)
    with pytest.MonkeyPatch.context() as patch:  # each model is read once
        patch.setattr(script, "StableDiffusion", cache(script.StableDiffusion))
        patch.setattr(script, "load_controlnet", cache(script.load_controlnet))
        yield path


WEIGHTS = {"unet", "vae_decoder", "text_encoder", "controlnet"}
ALWAYS = {"ade_classes", "threshold", "retries", "weights"}
READ = Auxiliary("there", control="seg")  # what the configuration says


def pairs_of(images: TwoPlanes) -> list[script.Pair]:
    keys = [(i, c) for i in range(len(images)) for c in images.class_names]
    return [script.Pair(*images.aux_key(*key), images, *key) for key in keys]


@pytest.fixture
def command(folder, tmp_path, monkeypatch):
    """Runs the command on two images of two classes; returns the files of its root by relative path."""
    monkeypatch.setattr(script, "needed_pairs", lambda *_: (pairs_of(TwoPlanes()), [READ]))

    def run(*words: str, root: str = "root") -> dict[str, bytes]:
        given = [
            *("--config", "unused.yaml", "--root", str(tmp_path / root), "--device", "cpu"),
            *("--base", str(folder / "model"), "--controlnet", str(folder / "controlnet")),
            *("--prompt-template", TEMPLATE, "--negative-prompt", "", "--size", "32", "--dtype", "float32"),
            *("--steps", "1", "--num", "2", *words),
        ]
        script.main(given)
        files = sorted(path for path in (tmp_path / root).rglob("*") if path.is_file())
        return {path.relative_to(tmp_path / root).as_posix(): path.read_bytes() for path in files}

    return run


@pytest.fixture
def only(command, monkeypatch):
    """Runs the command on one image; returns the settings of its profile, and its images by name."""
    monkeypatch.setattr(script, "needed_pairs", lambda *_: (pairs_of(TwoPlanes(count=1)), [READ]))

    def run(*words: str, root: str = "root") -> tuple[dict, dict[str, bytes]]:
        files = command(*words, root=root)
        (path,) = [name for name in files if name.endswith("profile.yaml")]
        images = {name.rsplit("/", 1)[1]: data for name, data in files.items() if "image_" in name}
        return yaml.safe_load(files[path]), images

    return run


@pytest.fixture
def drawn(monkeypatch):
    """In place of the generator: images that depend on all seeds of their batch; returns (prompt, seeds)s."""
    calls = []

    def forward(self, prompt, negative, control, seeds):
        calls.append((prompt, seeds))
        noise = torch.Generator().manual_seed(sum(seeds))
        return torch.rand((len(seeds), *control.shape), generator=noise)

    monkeypatch.setattr(script.SupportGenerator, "forward", forward)
    return calls


def test_a_run_leaves_images_profile_and_manifest_under_the_names_of_the_published_code(command, tmp_path):
    files = command()
    profiles = {name.split("/")[2] for name in files}
    (profile,) = profiles
    start = f"pascal/seg/{profile}"
    names = [f"train2014/image_{i:03d}_{c}_{k}.jpg" for i in (0, 1) for c in (1, 2) for k in (0, 1)]
    others = ["manifest.jsonl", "manifest.lock", "profile.yaml"]
    assert sorted(files) == sorted(f"{start}/{n}" for n in [*names, *others])
    settings = yaml.safe_load(files[f"{start}/profile.yaml"])
    assert profile_hash(settings) == profile and settings["steps"] == 1 and settings["sampler"] == "ddim"
    assert set(settings["weights"]) == WEIGHTS
    # These keys alone: with others the names of all profiles that are there would change.
    assert set(settings) == {"control", *script.PUBLISHED, *script.SAMPLING, *ALWAYS}
    lines = [json.loads(line) for line in files[f"{start}/manifest.jsonl"].splitlines()]
    assert [line["path"] for line in lines] == names
    line = lines[3]
    assert (line["stem"], line["class"], line["k"]) == ("train2014/image_000", 2, 1)
    assert line["seed"] == support_seed("pascal", "train2014/image_000", 2, 1, 0)
    assert line["prompt"] == "a photo of a dog" and (line["height"], line["width"]) == (32, 32)
    assert line["accepted"] and line["profile"] == profile
    assert Image.open(tmp_path / "root" / start / names[0]).size == (32, 32)


def test_a_deleted_image_alone_is_written_again_with_the_same_bytes(command, tmp_path):
    files = command()
    path = next(tmp_path.rglob("image_001_1_1.jpg"))
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.jpg")}
    path.unlink()
    assert command() == files
    assert {p for p in times if p.stat().st_mtime_ns != times[p]} == {path}


def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_files(command, monkeypatch, drawn):
    complete, written, replace = command(), [], support_image_files.os.replace

    def stop_at_the_fourth(temporary, path):
        if len(written) == 3:
            temporary.with_name(f".{path.name}.ended-by-force.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        written.extend([path] if path.suffix == ".jpg" else [])
        replace(temporary, path)

    with monkeypatch.context() as patch:
        patch.setattr(support_image_files.os, "replace", stop_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            command(root="stopped")
    after = command(root="stopped")
    (left,) = set(after) - set(complete)
    assert after == complete | {left: b"half"} and left.endswith(".ended-by-force.tmp")


@pytest.mark.parametrize("number", [2, 3])
def test_shards_leave_the_same_files_as_one_run(command, monkeypatch, drawn, number):
    complete = command()
    for shard in reversed(range(number)):
        files = command("--shard", str(shard), "--num-shards", str(number), root="shards")
        assert (files == complete) == (shard == 0)
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", str(number))
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    for task in range(1, 1 + number):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        files = command(root="array")
        assert (files == complete) == (task == number)


def test_the_bytes_of_an_image_do_not_depend_on_how_many_are_drawn_or_lacking(only, tmp_path, drawn):
    (_, four), (_, eight) = only("--num", "4"), only("--num", "8")
    assert len(four) == 8 and len(eight) == 16 and {name: eight[name] for name in four} == four
    assert len(drawn) == 4  # the second run drew the second group of each pair alone
    next(tmp_path.rglob("image_000_1_0.jpg")).unlink()
    assert only("--num", "8")[1] == eight
    for num in (1, 5, 8):
        few = only("--num", str(num), root=f"root{num}")[1]
        assert len(few) == 2 * num and few == {name: eight[name] for name in few}
    assert {len(seeds) for _, seeds in drawn} == {script.GROUP}


def test_more_images_can_be_added_to_a_finished_profile(only):
    settings, few = only()
    more_settings, more = only("--num", "3")
    assert settings == more_settings and len(more) == 6
    assert {name: more[name] for name in few} == few


@pytest.mark.parametrize(
    "words",
    [
        ["--sampler", "unipc"],
        ["--steps", "2"],
        ["--guidance", "2"],
        ["--control-scale", "0.5"],
        ["--control-end", "0.5", "--steps", "2"],
        ["--seed", "1"],
        ["--prompt-template", "a {name}"],
        ["--negative-prompt", "a dog"],
        ["--size", "64"],
        ["--format", "png"],
        ["--dtype", "bfloat16"],
    ],
)
def test_each_option_gives_other_images_in_a_profile_of_their_own(only, words):
    before, after = only(), only(*words, root="other")
    assert profile_hash(before[0]) != profile_hash(after[0])
    pixels = [{record_less(data) for data in images.values()} for _, images in (before, after)]
    assert words[0] == "--format" or pixels[0].isdisjoint(pixels[1])
    assert set(before[1].values()).isdisjoint(after[1].values())


def test_classes_can_take_other_colours_of_ade20k(only, tmp_path):
    (tmp_path / "ade.json").write_text('{"plane": 67}')
    (before, plain), (after, other) = only(), only("--ade-classes", str(tmp_path / "ade.json"), root="other")
    assert after["ade_classes"] == {"plane": 67} and before["ade_classes"] == {}
    pixels = {name: (record_less(plain[name]), record_less(other[name])) for name in plain}
    assert all((a == b) == ("_2_" in name) for name, (a, b) in pixels.items())


def record_less(data: bytes) -> bytes:
    """The pixels of an image file."""
    return Image.open(BytesIO(data)).tobytes()


def make_drawing(folder, monkeypatch, tmp_path, *words, template=TEMPLATE, score=None) -> script.Drawing:
    args, _ = script.parse_args(
        [
            *("--config", "unused", "--root", str(tmp_path), "--device", "cpu", "--steps", "1"),
            *("--base", str(folder / "model"), "--controlnet", str(folder / "controlnet")),
            *("--dtype", "float32", "--prompt-template", template, "--size", "32", "--negative-prompt", ""),
            *words,
        ]
    )
    script.fill_in(args, "pascal", [READ])
    drawing = script.make_drawing(args, "pascal")
    drawing.score = score
    return drawing


def test_a_control_shows_the_one_class_of_the_pair(folder, monkeypatch, tmp_path):
    drawing = make_drawing(folder, monkeypatch, tmp_path)
    plane, dog = pairs_of(TwoPlanes())[:2]
    image, control, mask = drawing.control(plane)
    assert image.shape == (*mask.shape, 3) == (32, 32, 3) and control.shape == (3, 32, 32)
    assert torch.equal(mask, (control[0] * 255).round() == 0)  # ADE's class 90 has no red, the wall has 120
    assert not (mask & drawing.control(dog)[2]).any()
    for kind in ("mask", "edge"):
        drawing.settings["control"] = kind
        control = drawing.control(dog)[1]
        assert control.any() and not control[:, :8].any()  # the plane is not there


def test_hed_and_scribble_controls_are_edges_of_the_support(folder, monkeypatch, tmp_path):
    torch.manual_seed(0)
    network = HED((4, 4, 4, 4, 4))
    torch.save(network.state_dict(), tmp_path / "hed.pth")
    hed = ["--hed", str(tmp_path / "hed.pth"), "--size", "64"]
    drawing = make_drawing(folder, monkeypatch, tmp_path, "--control", "hed", *hed)
    image, control, mask = drawing.control(pairs_of(TwoPlanes())[1])
    edges = network(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)[0]
    assert torch.equal((control[0] * 255).round()[mask], edges[mask].float())
    assert not control[:, :20].any()
    assert "hed" in drawing.settings["weights"]
    scribbled = make_drawing(folder, monkeypatch, tmp_path, "--control", "scribble", *hed)
    assert set(scribbled.control(pairs_of(TwoPlanes())[1])[1].unique().tolist()) <= {0.0, 1.0}


def test_a_rejected_image_is_drawn_from_the_next_seed_and_others_stay(folder, monkeypatch, tmp_path):
    pair, seen = pairs_of(TwoPlanes())[0], []

    def score(image, mask, name):
        seen.append((image, mask.sum(), name))
        return 0.25 if len(seen) == 1 else 0.75

    filtered = ["--filter", "segmenter", "--threshold", "0.5", "--retries", "1"]
    plain = make_drawing(folder, monkeypatch, tmp_path).draw(pair, range(2))
    drawn = make_drawing(folder, monkeypatch, tmp_path, *filtered, score=score).draw(pair, range(2))
    assert drawn[0][1]["seed"] == plain[0][1]["seed"] + 1 and drawn[0][1]["score"] == 0.75
    assert np.array_equal(drawn[1][0], plain[1][0]) and not np.array_equal(drawn[0][0], plain[0][0])
    assert len(seen) == 3 and seen[0][2] == "plane"


def test_after_all_retries_the_real_support_takes_the_image_s_place(folder, monkeypatch, tmp_path):
    pair = pairs_of(TwoPlanes())[0]
    options = ["--filter", "segmenter", "--retries", "1"]
    drawing = make_drawing(folder, monkeypatch, tmp_path, *options, score=lambda *_: 0.0)
    pixels, record = drawing.draw(pair, [0])[0]
    assert np.array_equal(pixels, drawing.control(pair)[0])
    assert record["accepted"] is False and record["seed"] is None


def test_the_filter_of_the_command_line_scores_every_image(only):
    settings, images = only("--filter", "segmenter", "--threshold", "0", "--retries", "2")
    assert settings["threshold"] == 0 and settings["retries"] == 2 and len(images) == 4
    scores = [record_of(data)["score"] for data in images.values()]
    assert all(0 <= score <= 1 for score in scores) and len(set(scores)) > 1
    assert set(settings["weights"]) == {*WEIGHTS, "vae_encoder"}


def test_the_filter_clip_of_the_command_line_scores_every_image_and_its_model_is_in_the_profile(
    only, tmp_path
):
    plain, _ = only()
    assert set(plain["weights"]) == WEIGHTS and "clip" not in plain
    words, path = ["--filter", "clip", "--threshold", "-1", "--clip"], write_tiny_clip(tmp_path / "clip")
    settings, images = only(*words, path, root="one")
    scores = [record_of(data)["score"] for data in images.values()]
    assert all(-1 <= score <= 1 for score in scores) and len(set(scores)) > 1
    assert settings["clip"] == path and set(settings["weights"]) == {*WEIGHTS, "clip"}
    write_tiny_clip(tmp_path / "clip", seed=1)
    other, _ = only(*words, path, root="two")
    assert profile_hash(settings) != profile_hash(other)
    _, images = only(*words, path, "--threshold", "1.1", "--retries", "0", root="three")
    assert not any(record_of(data)["accepted"] for data in images.values())


def record_of(data: bytes) -> dict:
    """The record in an image file."""
    return json.loads(data[data.index(b"{") : data.index(b"}") + 1])


def test_a_contact_sheet_has_a_row_of_support_control_and_images_for_each_of_some_pairs(command, tmp_path):
    command("--sheet", str(tmp_path / "sheet.png"), "--sheet-rows", "2")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    width = script.TILE + 4
    assert sheet.shape[1] == 4 * width and sheet.shape[0] // width == 2
    assert (sheet[: script.TILE, :width] == (255, 0, 255)).all(-1).any()
    assert (sheet[10, width + 10] == 120).all()


def test_the_sheet_of_shards_is_that_of_one_run_and_shard_0_draws_it(command, tmp_path, drawn):
    command("--sheet", str(tmp_path / "one.png"))
    path = tmp_path / "shards.png"
    for shard in (4, 3, 2, 1, 0):  # the last has no pair
        assert not path.exists()
        command("--shard", str(shard), "--num-shards", "5", "--sheet", str(path), root="shards")
    assert path.read_bytes() == (tmp_path / "one.png").read_bytes()


def test_the_published_prompt_names_a_class_of_pascal_by_the_set_s_own_number(
    folder, monkeypatch, tmp_path, drawn
):
    write_pascal5i(tmp_path / "pascal")
    images = Pascal5iDataModule(root=str(tmp_path / "pascal"), fold=3, size=24).images("train")
    pair = script.Pair(*images.aux_key(16, 17), images, 16, 17)
    assert pair[:2] == ("2007_000016", 17) and (images.read(16)[1] == 17).any()
    drawing = make_drawing(folder, monkeypatch, tmp_path, template=script.PUBLISHED["prompt_template"])
    record = drawing.draw(pair, [0])[0][1]
    assert record["prompt"] == "a real shot photo of sheep, best quality, extremely detailed"
    assert drawn[0][0] == record["prompt"]


def test_prompts_and_settings_of_the_published_sets_are_the_default(folder):
    args, rest = script.parse_args(["--config", "a.yaml", "--data.fold", "2"])
    script.fill_in(args, "pascal", [READ])
    assert rest == ["--data.fold", "2"]
    assert (
        args.prompt_template.format(name="sheep")
        == "a real shot photo of sheep, best quality, extremely detailed"
    )
    assert args.negative_prompt.startswith("longbody, lowres") and args.negative_prompt.endswith("artwork")
    assert (args.sampler, args.steps, args.guidance, args.control_scale, args.num) == ("ddim", 20, 9, 1, 4)
    assert (args.base, args.controlnet) == ("sd-1.5", "lllyasviel/sd-controlnet-seg")


def test_the_mini_world_has_defaults_of_its_own_that_can_be_overridden():
    args, _ = script.parse_args(["--config", "a.yaml", "--control", "edge", "--guidance", "2"])
    script.fill_in(args, "mini20i", [READ])
    assert (args.size, args.guidance, args.format) == (64, 2, "png")
    assert args.controlnet == "assets/mini-controlnet-edge"


def test_root_control_and_number_are_those_that_the_configuration_reads():
    args, _ = script.parse_args(["--config", "a.yaml", "--device", "cpu"])
    script.fill_in(
        args, "pascal", [Auxiliary("there", control="hed", num=2), Auxiliary("there", control="hed")]
    )
    assert (args.root, args.control, args.num) == (Path("there"), "hed", 4)
    assert args.controlnet.endswith("-hed") and args.dtype == "float32"  # float16 is for GPUs
    two = [Auxiliary("there", "hed"), Auxiliary("there", "seg")]
    args, _ = script.parse_args(["--config", "a.yaml", "--root", "here"])
    with pytest.raises(UsageError, match="several: hed, seg"):
        script.fill_in(args, "pascal", two)
    args, _ = script.parse_args(["--config", "a.yaml", "--root", "here", "--control", "seg"])
    script.fill_in(args, "pascal", two)
    assert (args.root, args.control) == (Path("here"), "seg")


def test_each_filter_has_a_threshold_of_its_own():
    found = [
        script.parse_args(["--config", "a.yaml", *words])[0].threshold
        for words in (
            [],
            ["--filter", "segmenter"],
            ["--filter", "clip"],
            ["--filter", "clip", "--threshold", "0"],
        )
    ]
    assert found == [None, 0.5, 0.2, 0.0]


@pytest.mark.parametrize(
    "words", [["--shard", "2", "--num-shards", "2"], ["--num", "0"], ["--retries", "-1"]]
)
def test_options_out_of_range_end_the_command(words):
    with pytest.raises(SystemExit):
        script.parse_args(["--config", "a.yaml", *words])


@pytest.mark.parametrize(
    ("words", "known"),
    [
        (["--prompt-template", "a {nme}"], r"found 'a \{nme\}'. Use \{name\} or \{a_name\}"),
        (["--prompt-template", "a {}"], "--prompt-template has an unknown field"),
        (["--prompt-template", "a {name"], "--prompt-template has an unknown field"),
        (["--controlnet", "a/{name}"], r"--controlnet has an unknown field .* Use \{control\}"),
    ],
)
def test_an_unknown_field_in_braces_ends_the_command_before_anything_is_loaded(words, known, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--config", "a.yaml", *words])
    assert re.search(known, capsys.readouterr().err)


@pytest.mark.parametrize("control", ["mask", "edge"])
def test_controls_of_the_mini_world_are_refused_for_published_data_sets(control):
    words = ["--config", "a.yaml", "--control", control]
    script.fill_in(script.parse_args(words)[0], "mini20i", [READ])
    with pytest.raises(UsageError, match=f"--control {control} is for the mini world.*pascal.\nChoose"):
        script.fill_in(script.parse_args(words)[0], "pascal", [READ])
    args, _ = script.parse_args([*words, "--controlnet", "own"])
    if control == "edge":
        script.fill_in(args, "pascal", [READ])
    else:
        with pytest.raises(UsageError, match="mini world"):
            script.fill_in(args, "pascal", [READ])


def test_a_profile_that_was_changed_by_hand_is_refused(command, tmp_path):
    command()
    path = next(tmp_path.rglob("profile.yaml"))
    path.write_text(path.read_text().replace("steps: 1", "steps: 9"))
    with pytest.raises(UsageError, match="was changed"):
        command()


def config_file(path, **options):
    data = {"class_path": "tests.fake_few_shot.FakeFewShot", "init_args": options}
    return config_of(path, data)


def config_of(path, data):
    options = {"network": {"class_path": "tests.tiny_run.TinyNetwork"}, "classes": "mini_objects"}
    model = {"class_path": "lightning_modules.supervised.Supervised", "init_args": options}
    path.write_text(yaml.safe_dump({"model": model, "data": data}))
    return ["--config", str(path)]


def test_pairs_are_those_that_the_configuration_reads_in_all_folds_each_once(tmp_path):
    options = {"size": 24, "episodes": 12, "test_seeds": [7]}
    words = config_file(
        tmp_path / "a.yaml", **options, eval_supports={"aux": {"aux": {"source": "generated"}}}
    )
    one, settings = script.needed_pairs(words, None, ["test"])
    assert [aux.source for aux in settings] == ["generated"]
    assert {pair.class_id for pair in one} == {1, 2}
    two, _ = script.needed_pairs(words, [0, 1], ["val", "test"])
    keys = [pair[:2] for pair in two]
    assert keys == sorted(set(keys)) and {pair.class_id for pair in two} == {1, 2, 3, 4}
    assert set(keys) > {pair[:2] for pair in one}
    assert script.needed_pairs([*words, "--data.fold", "3"], None, ["test"])[0][0].class_id in (7, 8)


def test_the_images_of_the_chosen_splits_are_drawn(folder, tmp_path, drawn):
    generated = {"aux": {"source": "generated", "num": 1}}
    options = {"size": 24, "episodes": 2, "test_seeds": [7], "supports": generated}
    words = [*config_file(tmp_path / "a.yaml", **options), "--device", "cpu", "--num", "1", "--steps", "1"]
    words += ["--control", "edge", "--size", "32", "--prompt-template", "", "--negative-prompt", ""]
    words += ["--base", str(folder / "model"), "--controlnet", str(folder / "controlnet")]
    files = {}
    for splits in (["train"], ["train", "test"]):
        root = tmp_path / "-".join(splits)
        script.main([*words, "--root", str(root), "--split", *splits])
        files[root.name] = {path.name for path in root.rglob("*.jpg")}
        pairs, _ = script.needed_pairs(words[:2], None, splits)
        assert files[root.name] == {f"{Path(pair.stem).name}_{pair.number}_0.jpg" for pair in pairs}
    assert files["train"] and files["train"] < files["train-test"]


def test_a_configuration_without_generated_supports_is_refused(tmp_path):
    with pytest.raises(UsageError, match="read no generated images"):
        script.needed_pairs(config_file(tmp_path / "a.yaml", size=24, episodes=2), None, ["test"])
    words = config_of(tmp_path / "b.yaml", {"class_path": "tests.tiny_run.TinyData"})
    with pytest.raises(UsageError, match="TinyData has no few-shot episodes"):
        script.needed_pairs(words, None, ["test"])


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_an_image_carries_its_record_and_a_file_without_one_is_refused(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    path = tmp_path / "a" / f"b_1_0{suffix}"
    record = {"stem": "a/b", "class": 1, "k": 0, "prompt": 'ä "quoted" word'}
    write_image(path, pixels, record)
    assert read_record(path) == record
    assert write_manifest(tmp_path) == 1
    assert json.loads((tmp_path / "manifest.jsonl").read_text()) == {"path": f"a/b_1_0{suffix}", **record}
    path.rename(path.with_name(f"b_1_1{suffix}"))
    with pytest.raises(ValueError, match="was not written by"):
        write_manifest(tmp_path)
    Image.fromarray(pixels).save(path)
    with pytest.raises(ValueError, match="was not written by"):
        read_record(path)


def test_of_two_manifests_at_once_the_last_has_the_images_of_both_writers(tmp_path, monkeypatch):
    pixels, write, others = np.zeros((8, 8, 3), np.uint8), support_image_files.write_text, []
    write_image(tmp_path / "a_1_0.png", pixels, {"stem": "a", "class": 1, "k": 0})

    def slow(path, text):
        if not others:  # the first has looked already when the other writes an image, and ends
            write_image(tmp_path / "b_1_0.png", pixels, {"stem": "b", "class": 1, "k": 0})
            others.append(Thread(target=write_manifest, args=[tmp_path]))
            others[0].start()
            others[0].join(0.2)
            assert others[0].is_alive()
        write(path, text)

    monkeypatch.setattr(support_image_files, "write_text", slow)
    assert write_manifest(tmp_path) == 1  # it does not look again: other shards may write for days
    others[0].join()
    assert len((tmp_path / "manifest.jsonl").read_text().splitlines()) == 2


def test_two_writers_of_one_file_do_not_share_a_temporary_one_and_a_failure_leaves_none(tmp_path):
    path = tmp_path / "a.txt"
    with whole(path) as one, whole(path) as two:
        assert one != two and not path.exists()
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one"
    with pytest.raises(KeyboardInterrupt), whole(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "one")]
