import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from datamodules.mini_world.captions import VOCABULARY
from scripts.mini_diffusion.latents import Latents, cached, cached_latents, encode, tokenize
from scripts.mini_diffusion.layout import (
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    save_pipeline,
)
from scripts.mini_diffusion.loop import (
    Clock,
    Training,
    cosine_rate,
    denoising_loss,
    draw_timesteps,
    frozen_copy,
    update_ema,
)
from scripts.mini_diffusion.scenes import captioned_object, captioned_street, sensor_crop, sensor_picture
from scripts.train_mini_diffusion import main, normalise_latents, reconstruction_loss, scheduler_config
from tests.small_diffusion import few_scenes, small_unet, small_vae


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_each_word_of_the_mini_world_is_one_token(tokenizer):
    for word in VOCABULARY:
        assert len(tokenizer(word)["input_ids"]) == 3, word  # begin, word, end


def test_captions_of_many_scenes_fit_the_tokenizer(tokenizer):
    captions = [captioned_object(i, 2)[1] for i in range(40)] + [
        captioned_street(i, 2)["captions"] for i in range(40)
    ]
    assert tokenize(tokenizer, captions).shape == (80, 2, tokenizer.model_max_length)


def test_a_caption_that_is_too_long_is_an_error_and_not_cut(tokenizer):
    with pytest.raises(ValueError, match="tokens"):
        tokenize(tokenizer, [["red " * 60]])


def test_street_crops_are_described_by_what_they_show():
    scene = captioned_street(3, 4)
    assert scene["image"].shape == (128, 128, 3) and len(scene["crops"]) == 2
    assert all(crop.shape == (64, 64, 3) and len(captions) == 4 for crop, captions in scene["crops"])


def test_sensor_crops_take_turns_and_say_nothing():
    crops = [sensor_crop(i, 2) for i in range(3)]
    assert all(picture.shape == (64, 64, 3) and captions == ["", ""] for picture, captions in crops)
    depth, infrared, event = (picture.astype(int) for picture, _ in crops)
    assert (np.ptp(depth, -1) == 0).all() and (np.ptp(infrared, -1) == 0).all() and np.ptp(event, -1).any()


def test_the_autoencoder_sees_each_sensor_and_the_palette():
    pictures = [sensor_picture(i) for i in range(4)]
    assert all(picture.shape == (128, 128, 3) and picture.dtype == np.uint8 for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == 4


@torch.no_grad()
def test_normalised_latents_have_unit_variance_and_decode_to_the_same_images():
    torch.manual_seed(0)
    vae, images = build_vae().eval(), torch.rand(16, 3, 64, 64)
    before = vae.decode(vae.encode(images * 2 - 1).latent_dist.mean).sample
    normalise_latents(vae, images)
    posterior = vae.encode(images * 2 - 1).latent_dist
    torch.testing.assert_close(vae.decode(posterior.mean).sample, before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(posterior.mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(posterior.mean.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)


def test_a_colour_error_on_a_saturated_pixel_costs_more_than_on_a_grey_one():
    grey, red = torch.zeros(1, 3, 4, 4), torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert reconstruction_loss(red * 0.9, red) > reconstruction_loss(grey + (red * 0.9 - red), grey)


def make_latents(tokens=6):
    latent = {
        "objects": torch.ones(5, 4, 8, 8),
        "crops": torch.full((5, 4, 8, 8), 2.0),
        "sensors": torch.full((5, 4, 8, 8), 3.0),
        "whole": torch.zeros(3, 4, 16, 16),
    }
    ids = {kind: torch.ones(len(value), 2, tokens, dtype=torch.int16) for kind, value in latent.items()}
    return Latents({k: v.half() for k, v in latent.items()}, ids, torch.zeros(tokens, dtype=torch.int16))


def test_a_batch_holds_one_resolution_and_some_empty_captions():
    latents, shapes, empty, count = make_latents(), set(), 0, 0
    for step in range(200):
        batch = latents.batch(np.random.default_rng(step), 8, "cpu")
        shapes.add(tuple(batch["latent"].shape))
        empty += (batch["tokens"] == 0).all(1).sum().item()
        count += len(batch["tokens"])
    assert shapes == {(8, 4, 8, 8), (2, 4, 16, 16)}
    assert 0.05 < empty / count < 0.15


def test_a_batch_keeps_the_shares_of_its_kinds():
    latents, whole = make_latents(), 0
    for step in range(300):
        kinds = latents.batch(np.random.default_rng(step), 100, "cpu")["latent"][:, 0, 0, 0].long()
        if kinds[0] == 0:  # whole streets
            whole += 1
        else:
            assert kinds.bincount(minlength=4).tolist() == [0, 70, 18, 12]  # objects, crops, sensors
    assert 0.06 < whole / 300 < 0.14


@pytest.mark.parametrize(("alpha_bar", "weight"), [(0.8, 1.25), (0.25, 4), (0.01, 10)])
def test_the_squared_error_of_a_timestep_is_divided_by_alpha_bar_up_to_ten_times(alpha_bar, weight):
    def wrong_by_a_fifth(noised, timestep, context):
        return SimpleNamespace(sample=noised / (1 - alpha_bar) ** 0.5 + 0.2)  # the latent is zero

    def text(tokens):
        return SimpleNamespace(last_hidden_state=tokens)

    batch = {"latent": torch.zeros(8, 4, 4, 4), "tokens": torch.zeros(8, 6).long()}
    alpha_bars = torch.full((1000,), alpha_bar)
    loss = denoising_loss(wrong_by_a_fifth, text, batch, alpha_bars, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(0.04 * weight, rel=1e-4)


def test_a_training_goes_on_from_its_own_state_only(tmp_path):
    def training(trained):
        modules = {"vae": small_vae()}
        return Training("vae", modules, 1e-3, Clock(60), tmp_path / "vae.pt", trained)

    first = training({"scenes drawn": "a"})
    first.step = 7
    first.save()
    assert training({"scenes drawn": "a"}).step == 7
    with pytest.raises(ValueError, match="another training: scenes drawn was a and is b"):
        training({"scenes drawn": "b"})


def test_timesteps_cover_the_range_and_favour_the_middle():
    timesteps = torch.cat([draw_timesteps(32, torch.Generator().manual_seed(i)) for i in range(50)])
    assert timesteps.min() >= 0 and timesteps.max() <= 999
    assert ((timesteps >= 200) & (timesteps < 900)).float().mean() > 0.8


def test_the_learning_rate_warms_up_and_falls_with_the_time_spent():
    assert cosine_rate(1.0, 0, 0.0) < cosine_rate(1.0, 149, 0.0) == pytest.approx(1.0)
    assert cosine_rate(1.0, 1000, 1.0) == pytest.approx(0.05)
    assert Clock(budget=10, spent=20).share == 1


def test_diffusers_loads_the_saved_folder_and_draws(tmp_path, tokenizer):
    torch.manual_seed(0)
    build_tokenizer(tmp_path / "tokenizer")
    scheduler = DDIMScheduler.from_config(scheduler_config())
    save_pipeline(
        tmp_path / "model",
        build_vae(),
        build_unet(),
        build_text_encoder(tokenizer),
        tmp_path / "tokenizer",
        scheduler,
    )
    assert sum(p.stat().st_size for p in (tmp_path / "model").rglob("*.safetensors")) < 20e6
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 64}
    image = pipeline("a photo of a red car", **size, num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 64, 64, 3)


def test_a_model_that_is_saved_again_leaves_the_card_beside_it(tmp_path, tokenizer):
    build_tokenizer(tmp_path / "tokenizer")
    model = tmp_path / "model"
    for name, text in {"README.md": "a card", "model_index.json": "old", "unet/old.txt": ""}.items():
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(text)
    parts = small_vae(), small_unet(), build_text_encoder(tokenizer)
    save_pipeline(model, *parts, tmp_path / "tokenizer", DDIMScheduler.from_config(scheduler_config()))
    assert (model / "README.md").read_text() == "a card"
    assert json.loads((model / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    assert not (model / "unet/old.txt").exists() and not (tmp_path / "model.tmp").exists()


def test_an_output_that_holds_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path), "--work", str(tmp_path / "work")])
    assert "holds no model but thesis.tex: give another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stages", "unet"], "needs an autoencoder: give --init-from"),
        (["--init-from", "nowhere"], "has no model_index.json"),
        (["--minutes", "0"], "leaves the stage vae no time"),
        (["--vae-share", "1"], "leaves the stage unet no time"),
    ],
)
def test_a_command_that_cannot_work_is_refused(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit):
        main([*words, "--work", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_an_average_moves_by_its_decay_and_takes_no_gradient():
    live = small_vae()
    average = frozen_copy(live)
    with torch.no_grad():
        live.quant_conv.bias += 1
    before = average.quant_conv.bias.clone()
    update_ema(average, live, 0.75)
    torch.testing.assert_close(average.quant_conv.bias, before + 0.25)
    assert not any(p.requires_grad for p in average.parameters())


def test_latents_are_encoded_again_for_another_autoencoder_or_other_scenes(tmp_path, tokenizer, monkeypatch):
    drawn = []

    def scenes(count):
        drawn.append(count)
        return few_scenes(count)

    monkeypatch.setattr("scripts.mini_diffusion.latents.captioned_scenes", scenes)
    vae, path = small_vae(), tmp_path / "latents.pt"
    first = cached_latents(vae, tokenizer, path, 2, "cpu")
    again = cached_latents(vae, tokenizer, path, 2, "cpu")
    assert drawn == [2] and all(torch.equal(first.latent[kind], again.latent[kind]) for kind in first.latent)
    cached_latents(vae, tokenizer, path, 3, "cpu")
    with torch.no_grad():
        vae.quant_conv.bias += 1
    cached_latents(vae, tokenizer, path, 3, "cpu")
    assert drawn == [2, 3, 3]
    monkeypatch.setattr("scripts.mini_diffusion.scenes.OBJECT_CAPTIONS", 2)
    cached_latents(vae, tokenizer, path, 3, "cpu")
    assert drawn == [2, 3, 3, 3]


def test_latents_whose_building_was_broken_off_are_built_again(tmp_path, monkeypatch):
    """F28."""
    path = tmp_path / "latents.pt"

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(path, "key", stop)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", lambda state, file: file.write_bytes(b"half") and stop())
        cached(path, "key", dict)
    assert not path.exists()
    assert cached(path, "key", lambda: {"a": 1}) == cached(path, "key", stop) == {"a": 1}


@pytest.mark.slow
def test_a_short_training_is_saved_resumed_and_continued_from(tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.mini_diffusion.scenes.STREET_SCENES", 4)
    monkeypatch.setattr("scripts.mini_diffusion.scenes.SENSOR_SCENES", 4)
    monkeypatch.setattr("scripts.mini_diffusion.scenes.OBJECT_SCENES", 4)
    common = ["--scenes", "8", "--batch", "4", "--vae-batch", "2", "--work", str(tmp_path / "work")]
    model = tmp_path / "model"
    main([*common, "--minutes", "0.1", "--output", str(model)])
    first = json.loads((model / "training.json").read_text())
    assert first["steps"] > 0
    main([*common, "--minutes", "0.2", "--output", str(model)])
    assert json.loads((model / "training.json").read_text())["steps"] > first["steps"]
    other = [*common[:-1], str(tmp_path / "other"), "--stages", "unet", "--init-from", str(model)]
    main([*other, "--minutes", "0.05", "--output", str(tmp_path / "next")])
    assert (tmp_path / "next" / "unet" / "diffusion_pytorch_model.safetensors").exists()


def test_latents_are_normalised_means_in_half_precision():
    torch.manual_seed(0)
    pictures = [np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)]
    latent = encode(build_vae().eval(), pictures, "cpu")
    assert latent.shape == (2, 4, 16, 16) and latent.dtype == torch.float16
