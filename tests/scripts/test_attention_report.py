import numpy as np
import pytest
import torch
from torch.testing import assert_close

from datamodules.mini_world.street import render_street
from functional.classes import DELIVER11
from models.diffusion.stable_diffusion import StableDiffusion
from scripts.mini_diffusion.attention_report import (
    THRESHOLDS,
    Settings,
    Words,
    area_under_curve,
    attention_sheet,
    averaged,
    choose,
    finds_its_own,
    intersection_over_union,
    mixed,
    object_attention_report,
    object_words,
    position_prior,
    score,
    street_attention_report,
    street_words,
    weight_choices,
    word_maps,
)


def test_words_are_the_named_objects_and_classes():
    objects, street = object_words("val", 6), street_words("val", 2)
    assert len(objects.name) >= 6 and objects.image.shape[1:] == (3, 64, 64)
    assert objects.mask.any((1, 2)).all() and set(objects.scene) == set(range(6))
    assert "road" in street.name and street.mask.shape[1:] == (128, 128)
    assert (street.mask.float().mean((1, 2)) >= 0.004).all()


def made_words() -> Words:
    """Two objects in scene 0 (left and right half), one in scene 1."""
    mask = torch.zeros(3, 8, 8, dtype=torch.bool)
    mask[0, :, :4] = mask[1, :, 4:] = mask[2, 2:6, 2:6] = True
    return Words(torch.rand(3, 3, 8, 8), mask, ["car", "star", "car"], np.array([0, 0, 1]))


def test_intersection_over_union_of_known_masks():
    words = made_words()
    found = intersection_over_union(words.mask.float(), words.mask.roll(1, 0), torch.tensor([0.5]))
    assert_close(found[:, 0], torch.tensor([8 / 40, 0.0, 8 / 40]))


def test_the_area_under_the_curve_is_that_of_all_pairs_and_counts_ties_half():
    torch.manual_seed(0)
    maps, mask = torch.randint(0, 5, (3, 6, 6)).float(), torch.rand(3, 6, 6) < 0.4
    for found, one, inside in zip(area_under_curve(maps, mask), maps, mask, strict=True):
        difference = one[inside][:, None] - one[~inside][None]
        pairs = (difference > 0).double() + 0.5 * (difference == 0)
        assert found == pytest.approx(pairs.mean().item())


def test_a_word_finds_its_own_object_only_with_a_map_of_its_own():
    words = made_words()
    own = finds_its_own(words.mask.float(), words)
    assert own[:2].tolist() == [1, 1] and np.isnan(own[2])
    swapped = words.mask[[1, 0, 2]].float()
    assert finds_its_own(swapped, words)[:2].tolist() == [0, 0]
    anything = torch.ones(3, 8, 8)
    assert finds_its_own(anything, words)[:2].tolist() == [0, 0]


def test_the_best_timestep_weights_and_threshold_are_chosen():
    words = made_words()
    good = torch.stack([torch.rand(3, 8, 8), 0.3 + 0.7 * words.mask.float()], 1)
    found = choose({50: torch.rand(3, 2, 8, 8), 100: good}, words, [(1.0, 0.0), (0.0, 1.0)])
    assert (found.timestep, found.weights) == (100, (0.0, 1.0))
    iou, area, _ = score(good, words, found)
    assert_close(iou, torch.full((3,), 100.0))
    assert_close(area, torch.ones(3, dtype=torch.float64))
    assert score(good, words, Settings(100, (0.0, 1.0), 1.0))[0].max() == 0


def test_weights_sum_to_one():
    choices = weight_choices()
    assert len(choices) == 56 and all(sum(c) == pytest.approx(1) for c in choices)


def test_the_prior_is_the_frequency_of_the_class_in_training_scenes():
    prior = position_prior(scenes=4)
    labels = np.stack([render_street("train", i)["label"] for i in range(4)])
    for i, name in enumerate(DELIVER11.names):
        assert_close(prior[name], torch.from_numpy((labels == i).mean(0)).float())
    assert len(prior) == 11 and prior["road"].shape == (128, 128)


def test_measures_are_averaged_over_the_noise_seeds():
    first, second = torch.tensor([1.0, 4.0]), torch.tensor([3.0, 8.0])
    iou, own = averaged([(first, torch.zeros(2)), (second, second)])
    assert iou.tolist() == [2, 6] and own.tolist() == [1.5, 4]


@pytest.mark.parametrize("kind", ["objects", "streets"])
def test_settings_are_the_best_of_val_whatever_the_best_of_test_are(monkeypatch, kind):
    """The maps of `val` are right at thresholds from .6 on, those of `test` at thresholds below .5."""
    mask = torch.zeros(3, 128, 128, dtype=torch.bool)
    mask[0, :, :64] = mask[1, :, 64:] = mask[2, 32:96, 32:96] = True
    names, image = ["road", "building", "road"], torch.zeros(3, 3, 128, 128)
    words = {split: Words(image, mask, names, np.array([0, 0, 1])) for split in ("val", "test")}
    seen = []

    def word_maps(_, of, timestep, seed):
        seen.append(("val" if of is words["val"] else "test", seed))
        low, high = (0.59, 1.0) if of is words["val"] else (0.0, 0.5)
        one = torch.where(mask, high, low)
        one[0, 0, -1] = one[1, 0, 0] = one[2, 0, 0] = 0
        one[0, 0, 0] = one[1, 0, -1] = one[2, 64, 64] = 1
        return (one[:, None].repeat(1, 4, 1, 1),) * 2

    for name, fake in {
        "object_words": lambda split, _: words[split],
        "street_words": lambda split, _: words[split],
        "word_maps": word_maps,
        "position_prior": lambda: dict.fromkeys(names, torch.rand(128, 128)),
    }.items():
        monkeypatch.setattr(f"scripts.mini_diffusion.attention_report.{name}", fake)
    if kind == "objects":
        found = object_attention_report(None, 3, [3, 1], timesteps=[100])["completed"]
        assert found["settings"].startswith("t 100, levels (") and "threshold 0.6" in found["settings"]
        assert found["finds its own of several %"]["mean"] == 100
        assert found["the same by chance %"] == 50  # of two objects
        assert found["IoU %"]["mean"] < 1
    else:
        found = street_attention_report(None, 3, [3, 1])
        assert found["settings"].startswith("t 150, levels (")
        assert (found["road scenes"], found["building scenes"]) == (2, 1)
        assert found["road attention IoU %"]["mean"] < 1 and found["road attention AUC"]["mean"] > 0.99
        assert found["road prior AUC"]["mean"] < 0.6
    assert sorted(seen) == [("test", 1), ("test", 3), ("val", 4)]


@pytest.fixture(scope="module")
def diffusion():
    return StableDiffusion("assets/mini-diffusion", parts=("unet", "vae_encoder", "text_encoder"))


def test_words_of_a_scene_share_its_noise_and_have_an_article(diffusion, monkeypatch):
    image, prompts, encode_text = (
        object_words("val", 1).image[:1].repeat(2, 1, 1, 1),
        [],
        diffusion.encode_text,
    )
    monkeypatch.setattr(diffusion, "encode_text", lambda texts: prompts.extend(texts) or encode_text(texts))

    def maps(*scene):
        return word_maps(diffusion, Words(image, image[:, 0] > 0, ["apple"] * 2, np.array(scene)), 150, 0)[0]

    one, two = maps(4, 4), maps(4, 5)
    assert_close(one[0], one[1], atol=1e-4, rtol=0)
    assert (two[0] - two[1]).abs().max() > 0.01
    assert prompts == ["a photo of an apple"] * 4


def test_maps_of_the_mini_model_depend_on_the_noise_and_the_word(diffusion):
    words = object_words("val", 2)
    plain, completed = word_maps(diffusion, words, 150, seed=0)
    assert plain.shape == completed.shape == (len(words.name), 4, 16, 16)
    assert plain.min() == 0 and plain.max() == 1
    assert completed.std() < plain.std()  # means over places lie closer together
    assert not torch.equal(plain, word_maps(diffusion, words, 150, seed=1)[0])
    words.name[0] = "boat" if words.name[0] != "boat" else "car"
    assert not torch.equal(plain[0], word_maps(diffusion, words, 150, seed=0)[0][0])
    assert mixed(plain, (1, 0, 0, 0), (64, 64)).shape == (len(words.name), 64, 64)
    assert attention_sheet(diffusion, 3, seed=0).shape == (4 * 128, 3 * 128, 3)
    assert len(THRESHOLDS) == 49
