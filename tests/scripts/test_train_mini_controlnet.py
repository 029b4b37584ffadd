import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file
from transformers import CLIPTextModel

from datamodules.mini_world.objects import render_objects
from functional.fingerprint import weights_sha256
from scripts.mini_diffusion.latents import LabelledLatents, cached_labelled_latents
from scripts.mini_diffusion.layout import build_text_encoder, build_tokenizer, save_pipeline
from scripts.mini_diffusion.loop import denoising_loss, step_generator
from scripts.mini_diffusion.scenes import captioned_object, labelled_object
from scripts.mini_diffusion.state import weights_fingerprint
from scripts.train_mini_controlnet import CONTROLS, build_controlnet, controlled, main, save_controlnet
from scripts.train_mini_diffusion import scheduler_config
from tests.small_diffusion import StepClock, small_unet, small_vae

SHIPPED = Path(__file__).parents[2] / "assets/mini-diffusion"


def few_labelled_scenes(count: int) -> list:
    return [labelled_object(index, 2) for index in range(count)]


def save_small_model(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(folder.with_name(folder.name + "-tokenizer"))
    scheduler = DDIMScheduler.from_config(scheduler_config())
    parts = small_vae(), small_unet(), build_text_encoder(tokenizer)
    save_pipeline(folder, *parts, folder.with_name(folder.name + "-tokenizer"), scheduler)
    return folder


@pytest.fixture(scope="module", autouse=True)
def small_world():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scripts.train_mini_controlnet.Clock", StepClock)
        patch.setattr("scripts.mini_diffusion.latents.labelled_scenes", few_labelled_scenes)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("small") / "model", seed=0)


@pytest.fixture(scope="module")
def parts(model):
    """The frozen parts of the small model as the training has them."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").requires_grad_(False)
    text = CLIPTextModel.from_pretrained(model, subfolder="text_encoder", dtype=torch.float32)
    return unet, text.requires_grad_(False), AutoencoderKL.from_pretrained(model, subfolder="vae")


def train(model, work, *words) -> dict:
    """Train for three steps; return the record with a fingerprint of the weights."""
    small = ["--kind", "mask", "--minutes", "0.11", "--batch", "4", "--scenes", "4", "--model", str(model)]
    main([*small, "--work", str(work), *words])
    record = json.loads((work / "model/training.json").read_text())
    return record | {"weights": weights_sha256(ControlNetModel.from_pretrained(work / "model"))}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def usual(model, work):
    return train(model, work)


def draw(model, controlnet=None, control=None, prompt="a photo of a red car"):
    """A latent [1, 4, 16, 16] drawn by diffusers' pipeline, with the ControlNet or without."""
    kind, extra, given = StableDiffusionPipeline, {}, {}
    if controlnet is not None:
        kind, extra = StableDiffusionControlNetPipeline, {"controlnet": controlnet}
        given = {"image": torch.zeros(1, 3, 64, 64) if control is None else control}
    pipeline = kind.from_pretrained(model, dtype=torch.float32, **extra)
    pipeline.set_progress_bar_config(disable=True)
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    return pipeline(prompt, generator=torch.Generator().manual_seed(0), **options, **given).images


def small_batch() -> tuple[dict, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch = {
        "latent": torch.randn(4, 4, 16, 16, generator=generator),
        "tokens": torch.randint(500, (4, 48), generator=generator),
    }
    return batch, torch.rand(4, 3, 64, 64, generator=generator)


def loss_with(parts, controlnet) -> torch.Tensor:
    batch, control = small_batch()
    alpha_bars = DDIMScheduler.from_config(scheduler_config()).alphas_cumprod
    denoise = partial(controlled, parts[0], controlnet, control)
    return denoising_loss(denoise, parts[1], batch, alpha_bars, step_generator(0, 0))


# --------------------------------------------------------------------------------------------- the ControlNet


def test_a_controlnet_starts_with_the_encoder_of_its_unet_and_reads_the_control_at_the_size_of_the_latent(
    parts,
):
    unet, _, vae = parts
    controlnet = build_controlnet(unet, vae, None)
    for name in ("conv_in", "time_embedding", "down_blocks", "mid_block"):
        assert weights_sha256(getattr(controlnet, name)) == weights_sha256(getattr(unet, name)), name
    read = controlnet.controlnet_cond_embedding(torch.rand(2, 3, 64, 96))
    assert read.shape == (
        2,
        8,
        16,
        24,
    )  # the small U-Net's first channels; a quarter of the size


@pytest.mark.parametrize("folder", ["small", "shipped"])
def test_an_untrained_controlnet_leaves_what_the_pipeline_draws_as_it_is(model, folder):
    folder = SHIPPED if folder == "shipped" else model
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    untrained = build_controlnet(unet, vae, None)
    torch.testing.assert_close(draw(folder, untrained, torch.rand(1, 3, 64, 64)), draw(folder))


def test_the_controlnet_of_the_shipped_model_takes_at_most_10_mb(tmp_path):
    unet = UNet2DConditionModel.from_pretrained(SHIPPED, subfolder="unet")
    vae = AutoencoderKL.from_pretrained(SHIPPED, subfolder="vae")
    save_controlnet(tmp_path / "model", build_controlnet(unet, vae, None), {})
    assert sum(path.stat().st_size for path in (tmp_path / "model").iterdir()) <= 10e6


def test_gradients_reach_the_zero_convolutions_first_then_all_of_the_controlnet_and_nothing_else(parts):
    unet, text, vae = parts
    controlnet = build_controlnet(unet, vae, None)

    def reached() -> set[str]:
        controlnet.zero_grad()
        loss_with(parts, controlnet).backward()
        return {name for name, p in controlnet.named_parameters() if p.grad is not None and p.grad.any()}

    names = {name for name, _ in controlnet.named_parameters()}
    assert reached() == {name for name in names if name.startswith(("controlnet_down", "controlnet_mid"))}
    with torch.no_grad():
        for parameter in controlnet.parameters():
            parameter += 0.01
    assert reached() == names
    assert all(p.grad is None for part in (unet, text) for p in part.parameters())


def test_some_steps_lower_the_loss_below_that_of_the_frozen_model(parts):
    controlnet = build_controlnet(*parts[::2], None)
    optimizer = torch.optim.AdamW(controlnet.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = loss_with(parts, controlnet)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


# ------------------------------------------------------------------------------------------------- the scenes


def test_a_labelled_scene_is_the_captioned_one_with_its_label():
    picture, captions, label = labelled_object(5, 3)
    assert (captions, picture.tobytes()) == (captioned_object(5, 3)[1], captioned_object(5, 3)[0].tobytes())
    assert np.array_equal(label, render_objects("train", 5)["label"])


def test_a_batch_joins_latent_caption_and_label_of_one_scene_and_empties_the_share_that_is_asked_for():
    ids = torch.arange(1, 6)
    latent = ids.half().view(5, 1, 1, 1).expand(5, 4, 2, 2)
    label = ids.to(torch.uint8).view(5, 1, 1).expand(5, 8, 8)
    tokens = ids.to(torch.int16).view(5, 1, 1).expand(5, 2, 6)
    scenes = LabelledLatents(latent, tokens, label, torch.zeros(6, dtype=torch.int16))
    batch = scenes.batch(np.random.default_rng(0), 400, 0.5, "cpu")
    assert batch["latent"].dtype == torch.float32 and batch["label"].dtype == torch.int64
    of_latent, of_label, of_caption = (batch[k].flatten(1)[:, 0] for k in ("latent", "label", "tokens"))
    assert torch.equal(of_latent.long(), of_label)
    empty = of_caption == 0
    assert torch.equal(of_caption[~empty], of_label[~empty]) and 0.4 < empty.float().mean() < 0.6


def test_scenes_are_encoded_again_for_another_autoencoder_or_number(tmp_path, monkeypatch):
    drawn = []

    def scenes(count):
        drawn.append(count)
        return few_labelled_scenes(count)

    monkeypatch.setattr("scripts.mini_diffusion.latents.labelled_scenes", scenes)
    tokenizer, vae = build_tokenizer(tmp_path / "tokenizer"), small_vae()
    for count in (2, 2, 3):
        found = cached_labelled_latents(vae, tokenizer, tmp_path / "scenes.pt", count, "cpu")
        assert found.latent.shape == (count, 4, 16, 16) and found.label.shape == (count, 64, 64)
    with torch.no_grad():
        vae.quant_conv.bias += 1
    cached_labelled_latents(vae, tokenizer, tmp_path / "scenes.pt", 3, "cpu")
    assert drawn == [2, 3, 3]


# ------------------------------------------------------------------------------------------------ the command


def test_diffusers_loads_the_result_whose_drawings_follow_weights_control_and_prompt(model, tmp_path):
    train(model, tmp_path, "--lr", "0.3", "--minutes", "0.5")
    controlnet = ControlNetModel.from_pretrained(tmp_path / "model")
    label = torch.from_numpy(render_objects("val", 0)["label"])
    control = CONTROLS["mask"](label)
    usual = draw(model, controlnet, control)
    assert (usual - draw(model)).abs().max() > 1e-3
    assert (usual - draw(model, controlnet, CONTROLS["edge"](label))).abs().max() > 1e-4
    assert (usual - draw(model, controlnet, control, prompt="a photo of a fish")).abs().max() > 1e-4


def test_the_result_is_fp16_with_a_record_and_leaves_other_files_in_its_folder(model, usual, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/README.md").write_text("a card")
    assert train(model, tmp_path) == usual
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "training.json",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"controlnet.pt", "log.jsonl", "model", "scenes.pt"}
    weights = load_file(tmp_path / "model/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert (usual["kind"], usual["steps"], usual["samples"]) == ("mask", 3, 12)
    assert (usual["empty_captions"], usual["scenes"], usual["init_from"]) == (0.5, 4, None)
    assert usual["model"] == weights_fingerprint(model)


def test_the_result_is_the_moving_average_and_not_the_live_weights(work, usual):
    state = torch.load(work / "controlnet.pt", weights_only=True)
    saved = load_file(work / "model/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(state["ema_controlnet"][name].half(), saved[name]) for name in saved)
    assert not all(torch.equal(state["controlnet"][name].half(), saved[name]) for name in saved)


@pytest.mark.parametrize(
    "words",
    ["--kind edge", "--seed 1", "--lr 0.01", "--batch 8", "--scenes 6", "--minutes 0.2", "--model OTHER"],
)
def test_an_option_changes_the_weights(model, usual, tmp_path, words):
    if "OTHER" in words:
        words = words.replace("OTHER", str(save_small_model(tmp_path / "other", seed=1)))
    assert train(model, tmp_path / "work", *words.split())["weights"] != usual["weights"]


def test_a_training_that_is_killed_goes_on_as_if_nothing_had_happened(model, tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.mini_diffusion.loop.SAVE_SECONDS", -1)
    monkeypatch.setattr("scripts.mini_diffusion.loop.cosine_rate", lambda base, *_: base)
    whole, calls = train(model, tmp_path / "whole"), []

    def killed(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return denoising_loss(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("scripts.train_mini_controlnet.denoising_loss", killed)
        train(model, tmp_path / "work")
    assert not (tmp_path / "work/model").exists()
    again = train(model, tmp_path / "work")
    assert (again["steps"], again["weights"]) == (whole["steps"], whole["weights"]) and len(calls) == 2


def test_a_state_whose_time_is_spent_says_so_and_more_minutes_go_on(model, work, usual, tmp_path, capsys):
    shutil.copytree(work, tmp_path / "work")
    assert train(model, tmp_path / "work")["weights"] == usual["weights"]
    assert "controlnet.pt has spent its 0.11 minutes: more --minutes" in capsys.readouterr().out
    assert train(model, tmp_path / "work", "--minutes", "0.3")["steps"] > usual["steps"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--kind edge", "--kind was mask and is edge"),
        ("--seed 1", "--seed was 0 and is 1"),
        ("--lr 0.01", "--lr was 0.001 and is 0.01"),
        ("--batch 8", "--batch was 4 and is 8"),
        ("--init-from START", "--init-from was None and is weights with sha256 "),
        ("--model OTHER", r"--model was weights with sha256 \w+ and is weights with"),
    ],
)
def test_the_state_of_another_training_is_refused_and_kept(model, work, usual, tmp_path, words, message):
    shutil.copytree(work, tmp_path / "work")
    shutil.copytree(model, tmp_path / "other")
    weights = "diffusion_pytorch_model.safetensors"
    shutil.copy(tmp_path / "other/vae" / weights, tmp_path / "other/unet" / weights)
    before = {path: path.read_bytes() for path in (tmp_path / "work").rglob("*") if path.is_file()}
    words = words.replace("START", str(work / "model")).replace("OTHER", str(tmp_path / "other"))
    with pytest.raises(ValueError, match=f"controlnet.pt holds .*{message}.*another --work, delete"):
        train(model, tmp_path / "work", *words.split())
    assert {path: path.read_bytes() for path in before} == before


def test_the_state_of_a_training_on_scenes_drawn_otherwise_is_refused(
    model, work, usual, tmp_path, monkeypatch
):
    shutil.copytree(work, tmp_path / "work")
    monkeypatch.setattr("scripts.mini_diffusion.state.scenes_digest", lambda: "others")
    with pytest.raises(ValueError, match=r"controlnet.pt holds .*: scenes drawn was \w+ and is others"):
        train(model, tmp_path / "work", "--minutes", "0.3")


def test_a_training_goes_on_from_earlier_weights(model, work, usual, parts, tmp_path):
    unet, _, vae = parts
    start = build_controlnet(unet, vae, work / "model")
    assert {p.dtype for p in start.parameters()} == {torch.float32}
    assert weights_sha256(start) == usual["weights"]
    found = train(model, tmp_path, "--init-from", str(work / "model"))
    assert found["weights"] != usual["weights"]
    assert found["init_from"] == weights_fingerprint(work / "model")


def test_a_start_for_another_unet_is_refused(work, usual):
    unet = UNet2DConditionModel.from_pretrained(SHIPPED, subfolder="unet")
    with pytest.raises(ValueError, match="holds a ControlNet of another U-Net than that of --model"):
        build_controlnet(unet, small_vae(), work / "model")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--kind depth", "invalid choice: 'depth'"),
        ("--kind mask --minutes 0", "leaves no time to train"),
        ("--kind mask --model nowhere", "nowhere has no model_index.json"),
        ("--kind mask --init-from nowhere", "nowhere has no config.json"),
    ],
)
def test_a_command_that_cannot_work_is_refused(capsys, words, message):
    with pytest.raises(SystemExit):
        main(words.split())
    assert message in capsys.readouterr().err


def test_the_number_of_threads_is_the_one_that_is_asked_for(model, tmp_path, monkeypatch):
    before, found = torch.get_num_threads(), []

    def count(*_):
        found.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr("scripts.train_mini_controlnet.train", count)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(model, tmp_path, "--threads", str(before + 1))
        assert found == [before + 1]
    finally:
        torch.set_num_threads(before)


@pytest.mark.cuda
def test_the_training_runs_on_the_device_that_is_asked_for(model, usual, tmp_path):
    found = train(model, tmp_path, "--device", "cuda")
    assert found["device"] == "cuda" and found["steps"] == usual["steps"]
