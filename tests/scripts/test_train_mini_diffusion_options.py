"""Each option of the training's command line changes what it should, and nothing else."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from functional.fingerprint import weights_sha256
from scripts.mini_diffusion.layout import build_tokenizer
from scripts.mini_diffusion.state import weights_fingerprint
from scripts.train_mini_diffusion import load_or_build, main, parse_args, reconstruction_loss
from tests.small_diffusion import StepClock, few_images, few_scenes, small_unet, small_vae


@pytest.fixture(scope="module", autouse=True)
def small_world():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "build_unet": small_unet,
            "build_vae": small_vae,
            "vae_images": few_images,
            "Clock": StepClock,
        }.items():
            patch.setattr(f"scripts.train_mini_diffusion.{name}", value)
        patch.setattr("scripts.mini_diffusion.latents.captioned_scenes", few_scenes)
        yield


def train(work, *words, output=None) -> dict[str, str | int]:
    """Train for a few steps; return the record and the fingerprints of the parts."""
    output = output or work / "model"
    small = ["--minutes", "0.25", "--vae-share", "0.4", "--batch", "4", "--vae-batch", "2", "--scenes", "4"]
    main([*small, "--work", str(work), "--output", str(output), *words])
    parts = {path.parent.name: weights_sha256(load_file(path)) for path in output.rglob("*.safetensors")}
    return parts | {"record": json.loads((output / "training.json").read_text())}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def usual(work):
    return train(work)


def test_the_same_command_gives_the_same_weights(usual, tmp_path):
    assert train(tmp_path) == usual


def test_the_result_is_the_moving_average_and_not_the_live_weights(work, usual):
    for stage, part, folder in (("unet", "unet", "unet"), ("unet", "text", "text_encoder"), ("vae",) * 3):
        state = torch.load(work / f"{stage}.pt", weights_only=True)
        saved = load_file(next((work / "model" / folder).glob("*.safetensors")))
        # the latents' normalisation changes the convolutions beside the latent
        saved = {name: tensor for name, tensor in saved.items() if "quant_conv" not in name}
        assert all(torch.equal(state[f"ema_{part}"][name].half(), saved[name]) for name in saved)
        assert not all(torch.equal(state[part][name].half(), saved[name]) for name in saved)


@pytest.mark.parametrize(
    ("words", "same_vae"),
    [
        ("--seed 1", False),
        ("--vae-batch 3", False),
        ("--vae-share 0.6", False),
        ("--minutes 0.5", False),
        ("--lr 0.01", True),
        ("--batch 8", True),
        ("--scenes 6", True),
    ],
)
def test_an_option_changes_the_weights_that_depend_on_it(usual, tmp_path, words, same_vae):
    found = train(tmp_path, *words.split())
    assert found["unet"] != usual["unet"] and found["text_encoder"] != usual["text_encoder"]
    assert (found["vae"] == usual["vae"]) == same_vae


def test_the_number_of_threads_is_the_one_that_is_asked_for(tmp_path):
    before = torch.get_num_threads()
    try:
        train(tmp_path, "--threads", str(before + 1))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_the_stage_vae_alone_takes_all_of_the_time_and_saves_no_model(usual, tmp_path, capsys):
    arguments = ["--vae-batch", "2", "--work", str(tmp_path), "--output", str(tmp_path / "model")]
    main([*arguments, "--stages", "vae", "--minutes", "0.1"])  # the share of the usual run
    assert str(tmp_path / "vae.pt") in capsys.readouterr().out
    assert not (tmp_path / "model").exists() and not (tmp_path / "unet.pt").exists()
    assert train(tmp_path, "--stages", "unet", "--minutes", "0.15")["vae"] == usual["vae"]


@pytest.mark.parametrize(
    ("words", "file", "message"),
    [
        ("--seed 1", "vae.pt", "--seed was 0 and is 1"),
        ("--vae-batch 3", "vae.pt", "--vae-batch was 2 and is 3"),
        ("--stages unet --lr 0.01", "unet.pt", "--lr was 0.001 and is 0.01"),
        ("--stages unet --batch 8", "unet.pt", "--batch was 4 and is 8"),
        ("--stages unet --scenes 9", "unet.pt", "--scenes was [0-9]+ and is 9"),
        ("--init-from MODEL", "vae.pt", "--init-from was None and is weights with sha256 "),
        ("--stages unet --init-from MODEL", "unet.pt", "--init-from was None and is weights with sha256 "),
    ],
)
def test_the_state_of_another_training_is_refused_and_kept(work, usual, tmp_path, words, file, message):
    shutil.copytree(work, tmp_path / "work")
    model = tmp_path / "work" / "model"
    before = {path: path.read_bytes() for path in (tmp_path / "work").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"{file} holds .*{message}.*another --work, delete"):
        train(tmp_path / "work", *words.replace("MODEL", str(model)).split())
    assert {path: path.read_bytes() for path in before} == before


def test_the_state_of_a_start_from_other_weights_is_refused(work, usual, tmp_path):
    start = ["--stages", "unet", "--init-from", str(tmp_path / "model")]
    shutil.copytree(work / "model", tmp_path / "model")
    train(tmp_path / "work", *start)
    train(tmp_path / "work", *start, "--minutes", "0.5")  # the same weights go on
    shutil.copy(
        work / "model/vae/diffusion_pytorch_model.safetensors",
        tmp_path / "model/unet/diffusion_pytorch_model.safetensors",
    )
    with pytest.raises(ValueError, match=r"--init-from was weights with sha256 \w+ and is weights"):
        train(tmp_path / "work", *start)


def test_the_state_of_a_training_on_scenes_drawn_otherwise_is_refused(work, usual, tmp_path, monkeypatch):
    shutil.copytree(work, tmp_path / "work")
    monkeypatch.setattr("scripts.mini_diffusion.state.scenes_digest", lambda: "others")
    with pytest.raises(ValueError, match=r"unet.pt holds .*: scenes drawn was \w+ and is others"):
        train(tmp_path / "work", "--stages", "unet", "--minutes", "1")


def test_a_state_whose_time_is_spent_says_so_and_more_minutes_go_on(work, usual, tmp_path, capsys):
    shutil.copytree(work, tmp_path / "work")
    capsys.readouterr()
    assert train(tmp_path / "work")["unet"] == usual["unet"]
    printed = capsys.readouterr().out
    assert "vae.pt has spent its 0.1 minutes: more --minutes" in printed
    assert "unet.pt has spent its 0.15 minutes: more --minutes" in printed
    assert train(tmp_path / "work", "--minutes", "1")["record"]["steps"] > usual["record"]["steps"]
    assert "has spent" not in capsys.readouterr().out


def test_the_autoencoder_does_not_depend_on_what_else_draws_random_numbers(usual, tmp_path, monkeypatch):
    def drawing(output, image):
        torch.rand(1)
        return reconstruction_loss(output, image)

    monkeypatch.setattr("scripts.train_mini_diffusion.reconstruction_loss", drawing)
    assert train(tmp_path) == usual


def test_the_stage_unet_goes_on_and_leaves_the_autoencoder_as_it_is(work, usual, tmp_path):
    shutil.copytree(work, tmp_path / "work")
    state = (tmp_path / "work" / "vae.pt").read_bytes()
    found = train(tmp_path / "work", "--stages", "unet", "--minutes", "1")
    assert found["vae"] == usual["vae"] and (tmp_path / "work" / "vae.pt").read_bytes() == state
    assert found["record"]["steps"] > usual["record"]["steps"]


def test_training_from_a_folder_starts_at_its_weights_in_float32(work, usual, tmp_path):
    start = ["--init-from", str(work / "model"), "--stages", "unet"]
    tokenizer = build_tokenizer(tmp_path / "tokenizer")
    parts = dict(zip(("unet", "text_encoder"), load_or_build(parse_args(start), tokenizer), strict=True))
    for name, part in parts.items():
        assert {p.dtype for p in part.parameters()} == {torch.float32}
        assert weights_sha256(part.half()) == usual[name]
    found = train(tmp_path, *start)
    assert found["vae"] == usual["vae"] and found["unet"] != usual["unet"]
    assert usual["record"]["init_from"] is None and usual["record"]["scenes"] == 4
    assert found["record"]["init_from"] == weights_fingerprint(work / "model")


def test_a_start_whose_words_have_other_tokens_is_refused(work, usual, tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.mini_diffusion.layout.VOCABULARY", ("zebra", "car"))
    with pytest.raises(ValueError, match="other token ids"):
        train(tmp_path, "--init-from", str(work / "model"), "--stages", "unet")


@pytest.mark.cuda
def test_the_training_runs_on_the_device_that_is_asked_for(usual, tmp_path):
    found = train(tmp_path, "--device", "cuda")
    assert found["record"]["device"] == "cuda" and found["record"]["steps"] == usual["record"]["steps"]
