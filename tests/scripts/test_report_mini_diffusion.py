import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from datamodules.mini_world.objects import render_objects
from datamodules.mini_world.street import CONDITIONS
from functional.noise import alpha_bars
from models.diffusion.inversion import PATHS
from models.diffusion.stable_diffusion import StableDiffusion
from scripts.mini_diffusion.attention_report import object_words, position_prior, street_words
from scripts.mini_diffusion.samples import draw
from scripts.mini_diffusion.state import weights_fingerprint
from scripts.report_mini_diffusion import (
    PROMPTS,
    autoencoder_report,
    caption_losses,
    check_controlnet,
    control_section,
    earlier_sections,
    inversion_report,
    linear_probe,
    main,
    markdown,
    probe_features,
    samples_section,
    street_scenes,
    to_pictures,
    to_tensor,
)
from scripts.train_mini_controlnet import CONTROLS
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
    kinds = ("right", "empty", "wrong", "right below empty %", "right below wrong %")
    assert set(found) == {f"t {t} {kind}" for t in (150, 550) for kind in kinds}
    interval = found["t 150 right below wrong %"]
    ratio = found["t 150 right"] / found["t 150 wrong"]
    assert interval["mean"] == pytest.approx(100 * (1 - ratio))
    assert interval["low"] <= interval["mean"] <= interval["high"]
    assert found["t 150 right"] != caption_losses(diffusion, 3, (150,), seeds=[1])["t 150 right"]


def test_caption_losses_tell_how_far_the_right_caption_is_below_the_others(monkeypatch):
    """Scene i has the grey value i and the caption "i"; a caption leaves a known share of the noise."""

    class Reading:
        def encode(self, image):
            return (255 * image).round()

        def encode_text(self, texts):
            return torch.tensor([int(text or -1) for text in texts])

        def add_noise(self, latent, noise, timestep):
            return torch.cat([latent, noise], 1)

        def predict_noise(self, noised, timestep, caption):
            scene, noise = noised[:, 0, 0, 0], noised[:, 3:]
            left = torch.where(caption == scene, 1.0, torch.where(caption < 0, 2.0, 4.0))
            return noise * (1 - left[:, None, None, None])

    module = "scripts.report_mini_diffusion."
    scene = {i: {"rgb": np.full((8, 8, 3), i, np.uint8), "caption_facts": i} for i in range(5)}
    monkeypatch.setattr(module + "render_objects", lambda split, i: scene[i] if split == "test" else None)
    monkeypatch.setattr(module + "object_caption", lambda facts, rng: str(facts))
    one, other, both = (caption_losses(Reading(), 5, (150,), seeds) for seeds in ([0], [5], [0, 5]))
    for kind, share in {"right": 1, "empty": 4, "wrong": 16}.items():
        assert one[f"t 150 {kind}"] == pytest.approx(share, rel=0.2)
        assert one[f"t 150 {kind}"] != pytest.approx(other[f"t 150 {kind}"], rel=1e-4)
        assert both[f"t 150 {kind}"] == pytest.approx((one[f"t 150 {kind}"] + other[f"t 150 {kind}"]) / 2)
    assert both["t 150 right below empty %"]["mean"] == pytest.approx(75)
    assert both["t 150 right below wrong %"]["mean"] == pytest.approx(93.75)


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


def test_inversion_follows_the_path_up_to_160_and_back_and_is_measured_against_the_encoded_latent():
    class Turning:
        """No noise on the way up; on the way down the latent itself, and twice that for the second image."""

        alpha_bars = torch.linspace(1, 0.64, 101, dtype=torch.float64).repeat_interleave(10)

        def __init__(self):
            self.timesteps = []

        def encode(self, image):
            self.latent = 3 * image + 1
            return self.latent

        def encode_text(self, texts):
            assert texts == [""]

        def predict_noise(self, latent, timestep, context):
            self.timesteps.append(timestep)
            if len(self.timesteps) <= self.steps:
                return torch.zeros_like(latent)
            return self.latent * torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)

    image = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    model = Turning()
    model.steps = 37
    inversion_report(model, image)
    assert model.timesteps == [*PATHS[37].sources, *reversed(PATHS[37].targets)]
    assert max(model.timesteps) == 160
    # One step up to alpha-bar .64 and back adds -sqrt(.36 / .64) parts of what is predicted on the way down.
    model = Turning()
    model.steps, model.alpha_bars = 1, torch.tensor([1.0] + [0.64] * 100)
    found = inversion_report(model, image, steps=1)
    assert found["mean error %"]["mean"] == pytest.approx(112.5, rel=1e-4)
    assert found["worst error %"] == pytest.approx(150, rel=1e-4)


def test_inversion_reports_mean_and_worst(diffusion):
    image, _ = street_scenes("test", 3)
    found = inversion_report(diffusion, image, steps=5)
    mean = found["mean error %"]
    assert 0 < mean["low"] <= mean["mean"] <= mean["high"] <= found["worst error %"]


# ------------------------------------------------------------------------------------------- drawn pictures


class AnyJudge:
    """Stands for both judges: the first category and colour, and an object everywhere."""

    def name(self, image):
        return torch.zeros(2, len(image)).long()

    def find(self, image):
        return torch.ones(len(image), 64, 64, dtype=torch.bool)


@pytest.fixture
def drawn(monkeypatch):
    """Samples of one step, judged by AnyJudge; the guidance and the seeds of each call."""
    calls = []

    def brief(pipeline, prompts, guidance, seeds, control=None):
        calls.append((guidance, list(seeds)))
        return draw(pipeline, prompts, guidance, seeds, steps=1, control=control)

    monkeypatch.setattr("scripts.mini_diffusion.samples.draw", brief)
    monkeypatch.setattr("scripts.report_mini_diffusion.draw", brief)
    monkeypatch.setattr("scripts.report_mini_diffusion.train_judges", lambda _: (AnyJudge(), AnyJudge()))
    return calls


def options(model, output) -> SimpleNamespace:
    return SimpleNamespace(model=model, output=output, samples=10, seeds=[3, 4], judges=None)


def test_samples_are_judged_at_two_guidances_and_shown_in_a_row_for_each_of_three(
    folder, diffusion, drawn, tmp_path, monkeypatch
):
    change = []
    monkeypatch.setattr("scripts.report_mini_diffusion.score_judges", lambda *_, **k: change.append(k) or {})
    report = samples_section(options(folder, tmp_path), diffusion)
    assert drawn == [(1.0, [3]), (4.0, [3]), (7.5, [3]), (4.0, [3, 4]), (7.5, [3, 4])]
    assert [name for name in report if name.startswith("guidance")] == ["guidance 4", "guidance 7.5"]
    assert report["guidance 4"]["samples"] == 10
    assert report["guidance 4"]["category %"]["mean"] == 10  # each of ten categories once
    # real scenes as they are, then through the autoencoder
    image = torch.rand(2, 3, 64, 64)
    assert change[0] == {} and change[1]["change"](image).shape == image.shape
    assert not torch.equal(change[1]["change"](image), image)
    sheet = np.array(Image.open(tmp_path / "samples.png"))
    assert sheet.shape == (3 * 128, len(PROMPTS) * 128, 3)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    row = np.concatenate(to_pictures(draw(pipeline, list(PROMPTS), 4.0, [3], steps=1)), 1)
    assert np.array_equal(sheet[128:256:2, ::2], row)


@pytest.fixture
def beside_controlnets(folder, tmp_path):
    """The model with untrained ControlNets beside it."""
    (tmp_path / "model").symlink_to(folder)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    for kind in CONTROLS:
        ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 16)).save_pretrained(
            tmp_path / f"mini-controlnet-{kind}"
        )
    return tmp_path / "model"


def test_controlled_samples_are_judged_by_kind_and_shown_below_their_controls(
    beside_controlnets, drawn, tmp_path
):
    report = control_section(options(beside_controlnets, tmp_path), None)
    assert drawn == [(4.0, [3, 4])] * 2
    for kind in ("mask", "edge"):
        assert report[kind]["of"] == weights_fingerprint(tmp_path / f"mini-controlnet-{kind}")
        shares = [(render_objects("test", i, size=64, count=1)["label"] > 0).mean() for i in range(10)]
        assert report[kind]["IoU %"]["mean"] == pytest.approx(100 * np.mean(shares))
    assert report["mask"]["of"] != report["edge"]["of"]
    sheet = np.array(Image.open(tmp_path / "control.png"))
    assert sheet.shape == (4 * 128, 10 * 128, 3)
    label = torch.from_numpy(render_objects("test", 9, size=64, count=1)["label"])[None]
    for row, kind in ((0, "mask"), (2, "edge")):
        tile = sheet[128 * row : 128 * row + 128 : 2, -128::2]
        assert np.array_equal(tile, to_pictures(CONTROLS[kind](label))[0])


# --------------------------------------------------------------------------------------------- the command


def test_the_table_names_section_part_and_measure():
    report = {"captions": {"objects": {"right": 0.123456, "gap": {"mean": 1.0, "low": 0.5, "high": 1.25}}}}
    assert markdown(report).splitlines()[2:] == [
        "| captions | objects | right | 0.1235 |",
        "| captions | objects | gap | 1 (0.5 to 1.25) |",
    ]


def test_sections_of_the_same_weights_and_scenes_are_kept_and_others_refused(tmp_path):
    path, of = tmp_path / "report.json", {"weights": "a", "scenes": 64}
    assert earlier_sections(path, of) == {}
    path.write_text(json.dumps({"of": of, "sections": {"probe": {"seed 0": {}}}}))
    assert earlier_sections(path, of) == {"probe": {"seed 0": {}}}
    for other in ({"weights": "b", "scenes": 64}, {"weights": "a", "scenes": 8}):
        with pytest.raises(ValueError, match=r"was measured of .*Give another --output, or delete"):
            earlier_sections(path, other)


def test_a_controlnet_of_other_weights_is_refused_with_the_command_that_trains_one(tmp_path):
    model, net = tmp_path / "model", tmp_path / "mini-controlnet-edge"
    net.mkdir()
    words = f"--kind edge --model {model} --output {net}"
    message = f"edge holds a ControlNet of {{}}, and the model has new.*{words}"
    with pytest.raises(ValueError, match=message.format("nothing")):
        check_controlnet(model, "edge", "new")
    (net / "training.json").write_text('{"model": "old"}')
    with pytest.raises(ValueError, match=message.format("old")):
        check_controlnet(model, "edge", "new")
    check_controlnet(model, "edge", "old")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--scenes 7", "--scenes must be at least 8, --samples 10: found"),
        ("--samples 9", "--scenes must be at least 8, --samples 10: found"),
        ("--model nowhere", "--model nowhere has no model_index.json"),
    ],
)
def test_what_cannot_be_measured_is_refused(folder, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit):
        main(["--model", str(folder), "--output", str(tmp_path / "none"), *words.split()])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_the_command_writes_numbers_for_each_seed_and_pictures(folder, tmp_path, monkeypatch, capsys):
    def two_streets(split, count, **options):
        return street_scenes(split, 2, **options)

    monkeypatch.setattr("scripts.report_mini_diffusion.street_scenes", two_streets)
    output = tmp_path / "report"
    words = ["--model", str(folder), "--output", str(output), "--scenes", "8", "--seeds", "0", "3"]
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
    # a section measured again leaves the others as they are; those of other seeds are refused and kept
    main([*words, "--sections", "captions"])
    assert json.loads((output / "report.json").read_text())["sections"] == report
    assert (output / "report.md").read_text().count("| captions |") == 20
    with pytest.raises(SystemExit):
        main([*words[:-1], "--sections", "captions"])
    assert "report.json was measured of" in capsys.readouterr().err
    assert json.loads((output / "report.json").read_text())["sections"] == report


def test_a_missing_controlnet_is_said_before_anything_is_measured(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--model", str(folder), "--output", str(tmp_path / "none"), "--sections", "control"])
    assert "mini-controlnet-mask holds a ControlNet of nothing" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_the_command_measures_attention_of_the_mini_model(tmp_path, monkeypatch):
    module = "scripts.mini_diffusion.attention_report."
    monkeypatch.setattr(module + "object_words", lambda split, count: object_words(split, min(count, 8)))
    monkeypatch.setattr(module + "street_words", lambda split, count: street_words(split, 2))
    monkeypatch.setattr(module + "position_prior", lambda: position_prior(4))
    main(["--output", str(tmp_path), "--scenes", "8", "--seeds", "0", "--sections", "attention"])
    report = json.loads((tmp_path / "report.json").read_text())["sections"]
    assert set(report["attention"]) == {
        "streets",
        *(f"objects, {k}, {n}" for k in ("cross-attention", "completed") for n in ("trained", "untrained")),
    }
    assert Image.open(tmp_path / "attention.png").size[1] == 4 * 128
