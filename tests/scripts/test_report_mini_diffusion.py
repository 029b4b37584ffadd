import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.mini_world.street import CONDITIONS
from functional.noise import alpha_bars
from models.diffusion.stable_diffusion import StableDiffusion
from scripts.report_mini_diffusion import (
    autoencoder_report,
    caption_losses,
    inversion_report,
    linear_probe,
    main,
    markdown,
    probe_features,
    street_scenes,
    to_pictures,
    to_tensor,
)
from tests.tiny_model import write_tiny_model

PARTS = ("unet", "vae_encoder", "vae_decoder", "text_encoder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Byte pieces make long captions. Under one seed the control would draw the same U-Net.
    return write_tiny_model(tmp_path_factory.mktemp("model"), num_tokens=200, seed=7)


@pytest.fixture(scope="module")
def diffusion(folder):
    return StableDiffusion(str(folder), parts=PARTS)


def test_pictures_become_images_and_pictures_again():
    pictures = list(np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8))
    image = to_tensor(pictures)
    assert image.shape == (2, 3, 4, 5) and image.max() <= 1
    assert all((a == b).all() for a, b in zip(to_pictures(image), pictures, strict=True))


def test_the_autoencoder_report_measures_all_pixels_and_the_saturation_that_is_kept():
    class Fading:
        """Reconstructs each picture in half of its brightness."""

        def encode(self, image):
            return image

        def decode(self, latent):
            return latent / 2

    image = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found, output = autoencoder_report(Fading(), image)
    torch.testing.assert_close(output, image / 2)
    assert found["saturation_kept"] == pytest.approx(0.5)
    assert found["psnr_db"] == pytest.approx(-10 * math.log10((image / 2).square().mean().item()), abs=1e-4)


def test_the_autoencoder_report_runs_on_a_model(diffusion):
    image, _ = street_scenes("test", 2)
    found, output = autoencoder_report(diffusion, image)
    assert output.shape == image.shape and output.min() >= 0 and output.max() <= 1
    assert 0 < found["psnr_db"] < 30 and found["saturation_kept"] > 0


def test_a_linear_probe_reads_separable_features_and_no_others():
    label = torch.randint(0, 11, (4, 8, 8), generator=torch.Generator().manual_seed(0))
    label = label.repeat_interleave(4, 1).repeat_interleave(4, 2)  # constant on each pixel of the features
    separable = torch.nn.functional.one_hot(label[:, ::4, ::4], 11).permute(0, 3, 1, 2).float()
    constant = torch.ones(4, 11, 8, 8)
    train, test = (separable[:2], label[:2]), (separable[2:], label[2:])
    good, blind = linear_probe(train, [test, (constant[2:], label[2:])], seed=0)
    assert good == pytest.approx(100) and blind < 10
    assert linear_probe(train, [test], seed=0) == linear_probe(train, [test], seed=0)


def test_the_seed_changes_the_probe():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 4, 8, 8, generator=generator)
    label = torch.randint(0, 11, (2, 8, 8), generator=generator)
    scores = [linear_probe((features, label), [(features, label)], seed) for seed in (0, 1)]
    assert scores[0] != scores[1]


def test_probe_features_have_the_size_of_the_latent_and_depend_on_timestep_and_noise(diffusion):
    image, _ = street_scenes("val", 1)
    features = probe_features(diffusion, image, 100, seed=0)
    assert features.shape[0] == 1 and features.shape[2:] == (32, 32)
    assert torch.equal(features, probe_features(diffusion, image, 100, seed=0))
    assert not torch.equal(features, probe_features(diffusion, image, 100, seed=1))
    assert not torch.equal(features, probe_features(diffusion, image, 500, seed=0))


def test_street_scenes_start_where_asked_and_wear_the_condition():
    image, label = street_scenes("val", 2)
    shifted, shifted_label = street_scenes("val", 1, first=1)
    assert torch.equal(image[1:], shifted) and torch.equal(label[1:], shifted_label)
    assert not torch.equal(*(street_scenes("val", 1, condition=name)[0] for name in ("day", "night")))


def test_caption_losses_compare_right_empty_and_wrong_captions_at_each_timestep(diffusion):
    found = caption_losses(diffusion, 3, (150, 550), seeds=[0])
    kinds = ("right", "empty", "wrong", "right below wrong %")
    assert set(found) == {f"t {t} {kind}" for t in (150, 550) for kind in kinds}
    interval = found["t 150 right below wrong %"]
    ratio = found["t 150 right"] / found["t 150 wrong"]
    assert interval["mean"] == pytest.approx(100 * (1 - ratio))
    assert interval["low"] <= interval["mean"] <= interval["high"]
    assert found["t 150 right"] != caption_losses(diffusion, 3, (150,), seeds=[1])["t 150 right"]


def test_inversion_of_a_model_that_predicts_the_same_noise_everywhere_has_no_error():
    class Constant:
        alpha_bars = alpha_bars(0.00085, 0.012, 1000, "scaled_linear")

        def encode(self, image):
            return image

        def encode_text(self, texts):
            return None

        def predict_noise(self, latent, timestep, context):
            return torch.ones_like(latent)

    found = inversion_report(Constant(), torch.rand(4, 4, 8, 8))
    assert found["worst error %"] < 1e-3


def test_inversion_reports_mean_and_worst(diffusion):
    image, _ = street_scenes("test", 3)
    found = inversion_report(diffusion, image, steps=5)
    assert 0 < found["mean error %"] < found["worst error %"]


def test_the_table_names_section_part_and_measure():
    report = {"captions": {"objects": {"right": 0.123456, "gap": {"mean": 1.0, "low": 0.5, "high": 1.25}}}}
    assert markdown(report).splitlines()[2:] == [
        "| captions | objects | right | 0.1235 |",
        "| captions | objects | gap | 1 (0.5 to 1.25) |",
    ]


@pytest.mark.slow
def test_the_command_writes_numbers_for_each_seed_and_pictures(folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "report"
    words = ["--model", str(folder), "--output", str(output), "--scenes", "2", "--seeds", "0", "3"]
    sections = ["autoencoder", "probe", "captions", "inversion"]
    main([*words, "--sections", *sections])
    report = json.loads((output / "report.json").read_text())["sections"]
    assert list(report) == sections
    probe = report["probe"]
    assert set(probe["trained, seed 0"]) == {*CONDITIONS, "mixed"}
    for kind in ("trained", "untrained"):
        assert probe[f"{kind}, seed 0"] != probe[f"{kind}, seed 3"]
    assert probe["trained, seed 0"] != probe["untrained, seed 0"]
    assert Image.open(output / "autoencoder_street.png").size == (2 * 128, 2 * 128)
    # a section measured again leaves the others as they are, unless they are of other seeds
    main([*words, "--sections", "captions"])
    assert json.loads((output / "report.json").read_text())["sections"] == report
    assert (output / "report.md").read_text().count("| captions |") == 16
    main([*words[:-1], "--sections", "captions"])
    assert list(json.loads((output / "report.json").read_text())["sections"]) == ["captions"]
    assert "it is begun anew" in capsys.readouterr().out


def test_a_missing_controlnet_is_said_before_anything_is_measured(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--model", str(folder), "--output", str(tmp_path / "none"), "--sections", "control"])
    assert "mini-controlnet-mask holds no ControlNet" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_the_command_measures_attention_of_the_mini_model(tmp_path):
    main(["--output", str(tmp_path), "--scenes", "2", "--seeds", "0", "--sections", "attention"])
    report = json.loads((tmp_path / "report.json").read_text())["sections"]
    assert set(report["attention"]) == {
        "streets",
        *(f"objects, {k}, {n}" for k in ("cross-attention", "completed") for n in ("trained", "untrained")),
    }
    assert Image.open(tmp_path / "attention.png").size[1] == 4 * 128
