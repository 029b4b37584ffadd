import re

import numpy as np
import pytest

from datamodules.mini_world.captions import (
    CONDITION_PHRASES,
    VOCABULARY,
    named_classes,
    object_caption,
    street_caption,
)
from datamodules.mini_world.dataset import MiniStreetDataset
from datamodules.mini_world.objects import BACKGROUNDS, render_objects
from datamodules.mini_world.street import render_street
from functional.classes import DELIVER11
from scripts.mini_diffusion.scenes import captioned_street

FACTS = {"condition": "night", "attributes": {"car": "red", "person": "blue", "traffic sign": "round"}}
TWO_OBJECTS = {"objects": [("mug", "red"), ("umbrella", "orange")], "background": "grass"}


def words(caption):
    return set(re.findall(r"[a-z]+", caption))


def many(describe, count=600):
    rng = np.random.default_rng(0)
    return [describe(rng) for _ in range(count)]


def test_every_word_of_every_caption_is_in_the_vocabulary():
    rng, used = np.random.default_rng(0), set()
    for index in range(60):
        scene = render_street("train", index, size=64)
        present = [DELIVER11.names[i] for i in np.unique(scene["label"])]
        for _ in range(20):
            used |= words(street_caption(scene["caption_facts"], rng, present))
            used |= words(object_caption(render_objects("train", index)["caption_facts"], rng))
    assert used <= set(VOCABULARY)
    assert len(used) > 0.9 * len(VOCABULARY)


def test_the_vocabulary_holds_single_lower_case_words_once():
    assert all(re.fullmatch(r"[a-z]+", word) for word in VOCABULARY)
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    assert {"traffic", "sign", "umbrella", "an", "snow"} <= set(VOCABULARY)


def test_a_street_caption_names_only_classes_that_are_present():
    captions = many(lambda rng: street_caption(FACTS, rng, ["road", "car"]))
    named = set().union(*map(words, captions))
    assert {"road", "car", "red", "night"} <= named
    assert not {"person", "blue", "traffic", "sign", "sky"} & named


def test_street_captions_take_all_their_forms():
    captions = many(lambda rng: street_caption(FACTS, rng, DELIVER11.names))
    assert "a photo of a red car at night" in many(lambda rng: street_caption(FACTS, rng, ["car"]))
    assert any(caption.startswith("a photo of a street at night with ") for caption in captions)
    assert any("person in blue" in caption for caption in captions)
    assert any("round traffic sign" in caption for caption in captions)
    alone = np.mean(["," not in caption and " and " not in caption for caption in captions])
    assert alone == pytest.approx(0.22, abs=0.05)


def test_the_condition_of_a_street_is_said_in_its_own_words():
    for condition, phrase in CONDITION_PHRASES.items():
        captions = many(
            lambda rng, c=condition: street_caption(FACTS | {"condition": c}, rng, ["sky", "road"])
        )
        assert any(phrase in caption for caption in captions)
        others = [other for other in CONDITION_PHRASES.values() if other != phrase]
        assert not any(other in caption for caption in captions for other in others)


def test_a_street_without_a_large_class_still_has_a_caption():
    assert street_caption(FACTS, np.random.default_rng(0), []) == "a photo of a street at night"


def test_object_captions_name_the_objects_their_colours_and_the_background_as_often_as_stated():
    captions = many(lambda rng: object_caption(TWO_OBJECTS, rng), 2000)
    assert "a photo of a red mug and an umbrella on grass" in captions
    assert "a photo of an orange umbrella" in captions
    both = [c for c in captions if "mug" in c and "umbrella" in c]
    assert len(both) / len(captions) == pytest.approx(0.85, abs=0.04)
    assert np.mean(["red" in c for c in both]) == pytest.approx(0.6, abs=0.05)
    assert np.mean(["grass" in c for c in captions]) == pytest.approx(0.7, abs=0.05)
    assert not any(ground in c for c in captions for ground in set(BACKGROUNDS) - {"grass"})


def test_three_objects_are_joined_by_a_comma_and_an_and():
    facts = {"objects": [("mug", "red"), ("cat", "blue"), ("star", "pink")], "background": "sand"}
    captions = many(lambda rng: object_caption(facts, rng))
    assert "a photo of a mug, a blue cat and a star on sand" in captions


def test_a_caption_names_the_classes_that_cover_four_thousandths_of_the_picture():
    label = np.full(1000, DELIVER11.names.index("road"), np.uint8)
    label[:4], label[4:7] = DELIVER11.names.index("car"), DELIVER11.names.index("pole")
    assert named_classes(label.reshape(20, 50)) == ["road", "car"]


def test_datasets_and_the_training_of_the_mini_diffusion_name_classes_by_one_rule(monkeypatch):
    monkeypatch.setattr("datamodules.mini_world.captions.SMALLEST_SHARE", 2)  # no class is as large
    street = [MiniStreetDataset("train", 5)[i]["caption"] for i in range(5)]
    crops = [text for crop in captioned_street(3, 4)["crops"] for text in crop[1]]
    assert all(text.startswith("a photo of a street ") for text in street + crops)
