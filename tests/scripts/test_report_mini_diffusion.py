import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.mini_world.street import CONDITIONS
from models.diffusion.stable_diffusion import StableDiffusion
from scripts.report_mini_diffusion import (
    autoencoder_report,
    caption_losses,
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
    found = caption_losses(diffusion, 3, (150, 550), seed=0)
    assert set(found) == {f"t{t}_{kind}" for t in (150, 550) for kind in ("right", "empty", "wrong")}
    assert len(set(found.values())) == 6 and all(value > 0 for value in found.values())
    assert found != caption_losses(diffusion, 3, (150, 550), seed=1)


def test_the_table_names_section_and_measure():
    assert (
        markdown({"captions": {"t150_right": 0.123456}}).splitlines()[2] == "| captions t150_right | 0.1235 |"
    )


@pytest.mark.slow
def test_the_command_writes_numbers_for_each_seed_and_pictures(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("scripts.report_mini_diffusion.PROMPTS", ("a photo of a red car",))
    output = tmp_path / "report"
    main(["--model", str(folder), "--output", str(output), "--scenes", "2", "--seeds", "0", "3"])
    report = json.loads((output / "report.json").read_text())
    assert set(report["probe trained seed 0"]) == {*CONDITIONS, "mixed"}
    for kind in ("trained", "untrained"):
        assert report[f"probe {kind} seed 0"] != report[f"probe {kind} seed 3"]
    assert report["probe trained seed 0"] != report["probe untrained seed 0"]
    assert Image.open(output / "autoencoder_street.png").size == (2 * 128, 2 * 128)
    assert Image.open(output / "samples.png").size == (128, 3 * 128)  # a row per guidance, twice as large
    assert (output / "report.md").read_text() in capsys.readouterr().out
