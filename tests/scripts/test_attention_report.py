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
    choose,
    finds_its_own,
    intersection_over_union,
    mixed,
    object_words,
    position_prior,
    score,
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


def test_maps_of_the_mini_model_depend_on_the_noise_and_the_word():
    diffusion = StableDiffusion("assets/mini-diffusion", parts=("unet", "vae_encoder", "text_encoder"))
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
