from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel

from datamodules.mini_world.objects import BACKGROUNDS, CATEGORIES, COLORS, VANISHING, render_objects
from scripts.mini_diffusion import judges
from scripts.mini_diffusion.judges import (
    ObjectClassifier,
    ObjectSegmenter,
    blurred,
    fit,
    mask_iou,
    object_scenes,
    score_judges,
    train_judges,
)
from scripts.mini_diffusion.samples import (
    Samples,
    Thing,
    draw,
    sample_controlled,
    sample_objects,
    score_controlled,
    score_samples,
    things_to_ask,
)

MODEL = Path(__file__).parents[2] / "assets/mini-diffusion"


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr("scripts.mini_diffusion.samples.draw", partial(draw, steps=2))


@pytest.fixture
def tiny_recipes(monkeypatch):
    for recipe in judges.RECIPES.values():
        for name, value in {"scenes": 8, "steps": 2, "batch": 4}.items():
            monkeypatch.setitem(recipe, name, value)
    monkeypatch.setattr(judges, "score_judges", partial(score_judges, scenes=8))


class Oracle:
    """Judges that say what they are told, whatever the picture."""

    def __init__(self, *said):
        self.said = said

    def name(self, image):
        return self.said

    def find(self, image):
        return self.said[0]


# ----------------------------------------------------------------------------------------------------- judges


def test_scenes_of_the_classifier_show_the_one_object_that_their_ids_name():
    scenes = object_scenes("val", 6, 1)
    assert scenes.image.shape == (6, 3, 64, 64) and scenes.image.dtype == torch.uint8
    for i in range(6):
        scene = render_objects("val", i, count=1)
        assert (scenes.image[i].permute(1, 2, 0).numpy() == scene["rgb"]).all()
        assert scenes.label[i].unique().tolist() == [0, 1 + scenes.category[i]]
        assert scene["objects"] == [(CATEGORIES[scenes.category[i]], list(COLORS)[scenes.color[i]])]


def test_the_classifier_learns_the_categories_it_saw_and_the_colours_of_unseen_scenes():
    torch.manual_seed(0)
    seen, unseen = object_scenes("train", 32, 1), object_scenes("test", 64, 1)
    classifier = fit(ObjectClassifier(), seen, 60, 8, 3e-3, seed=0)
    category, _ = classifier.name(seen.image / 255)
    _, color = classifier.name(unseen.image / 255)
    assert not classifier.training and category.shape == (32,)
    assert (category == seen.category).float().mean() > 0.8
    assert (color == unseen.color).float().mean() > 2 / len(COLORS)


def test_the_segmenter_learns_to_find_objects_of_unseen_scenes():
    torch.manual_seed(0)
    segmenter = fit(ObjectSegmenter(), object_scenes("train", 128, None), 35, 8, 3e-3, seed=0)
    unseen = object_scenes("test", 32, None)
    found, mask = segmenter.find(unseen.image / 255), unseen.label > 0
    assert found.shape == mask.shape and found.dtype == torch.bool
    # More than a mask of another scene and more than "everything" would reach.
    blind = max(mask_iou(found, mask.roll(1, 0)).mean(), mask_iou(torch.ones_like(mask), mask).mean())
    assert mask_iou(found, mask).mean() > 1.5 * blind


def test_every_second_image_is_blurred_and_the_others_stay():
    image = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    kept = image.clone()
    found = blurred(image, torch.Generator().manual_seed(0))
    assert torch.equal(image, kept) and torch.equal(found[1::2], image[1::2])
    assert found[::2].std() < 0.9 * image[::2].std()


def test_trained_judges_are_kept_and_read_again(tiny_recipes, tmp_path, capsys, monkeypatch):
    first = train_judges(tmp_path / "judges", seed=1)
    assert "held-out scenes: category %" in capsys.readouterr().out
    assert sorted(p.name.split("-")[0] for p in (tmp_path / "judges").iterdir()) == [
        "classifier",
        "segmenter",
    ]

    def refuse(*_, **__):
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(judges, "fit", refuse)
        again = train_judges(tmp_path / "judges", seed=1)
        with pytest.raises(AssertionError, match="trained again"):
            train_judges(tmp_path / "judges", seed=2)
        patch.setitem(judges.RECIPES["segmenter"], "lr", 1e-4)
        with pytest.raises(AssertionError, match="trained again"):
            train_judges(tmp_path / "judges", seed=1)
    for one, other in zip(first, again, strict=True):
        assert not other.training
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name


def test_judges_are_scored_on_changed_scenes():
    single, several = object_scenes("test", 8, 1), object_scenes("test", 8, None)
    oracle = Oracle(single.category, single.color), Oracle(several.label > 0)
    assert score_judges(*oracle, 8) == {"category %": 100, "color %": 100, "object IoU %": 100}
    seen = []
    score_judges(*oracle, 8, change=lambda image: seen.append(image.amax().item()) or image)
    assert len(seen) == 2 and 0.5 < max(seen) <= 1


def test_the_iou_of_masks_is_exact():
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    found = mask.clone()
    mask[0, :2], found[0, 1:3] = True, True  # 4 pixels of 12
    mask[1, 0] = True
    assert mask_iou(found, mask).tolist() == pytest.approx([100 / 3, 0, 100])


# ---------------------------------------------------------------------------------------------------- samples


def test_prompts_ask_evenly_for_all_categories_and_never_for_a_colour_that_vanishes():
    things = things_to_ask(260, seed=3)
    assert set(Counter(thing.category for thing in things).values()) == {10}
    assert not [thing for thing in things if VANISHING[thing.background] == thing.color]
    colors = Counter(thing.color for thing in things)
    assert set(colors) == set(COLORS) and max(colors.values()) <= 1.5 * min(colors.values())
    assert {thing.background for thing in things} == set(BACKGROUNDS)
    assert things == things_to_ask(260, seed=3) != things_to_ask(260, seed=4)
    assert Thing("cat", "orange", "snow").prompt == "a photo of an orange cat on snow"
    assert Thing("apple", "red", "wood").prompt == "a photo of a red apple on wood"


def test_the_scores_of_samples_are_shares_with_intervals_and_chance():
    things = things_to_ask(104, seed=0)
    category = torch.tensor([CATEGORIES.index(thing.category) for thing in things])
    color = torch.tensor([list(COLORS).index(thing.color) for thing in things])
    category[:26] = (category[:26] + 1) % len(CATEGORIES)
    found = score_samples(Oracle(category, color), Samples(torch.zeros(104, 3, 64, 64), things))
    assert found["samples"] == 104
    assert found["category %"]["mean"] == pytest.approx(75) and found["color %"]["mean"] == 100
    # Three quarters of 104: the normal interval is 75 +- 8.3.
    assert found["category %"]["low"] == pytest.approx(66.7, abs=1.5)
    assert found["category %"]["high"] == pytest.approx(83.3, abs=1.5)
    assert found["category by chance %"] == pytest.approx(3.846, abs=1e-3)
    assert found["color by chance %"] == pytest.approx(11.111, abs=1e-3)


def test_controlled_samples_are_scored_by_their_masks_and_by_those_of_other_scenes():
    label = torch.zeros(4, 64, 64, dtype=torch.uint8)
    for i in range(4):
        label[i, 16 * i : 16 * i + 16] = i + 1  # strips that do not touch
    samples = Samples(torch.zeros(4, 3, 64, 64), things_to_ask(4, 0), label)
    found = score_controlled(Oracle(label > 0), samples)
    assert found["samples"] == 4 and found["IoU %"]["mean"] == 100 and found["IoU by chance %"]["mean"] == 0
    half = (label > 0) & (torch.arange(64) < 32)
    assert score_controlled(Oracle(half), samples)["IoU %"]["mean"] == pytest.approx(50)


def test_images_are_drawn_from_the_noise_of_the_seeds_in_turn_over_all_batches(monkeypatch):
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32)

    def images(*seeds):
        return draw(pipeline, ["a photo of a red car"] * 5, 1.0, seeds, steps=1)

    both, first, second = images(0, 1), images(0), images(1)
    torch.testing.assert_close(both[::2], first[:3], atol=1e-4, rtol=0)
    torch.testing.assert_close(both[1::2], second[:2], atol=1e-4, rtol=0)
    assert min((first[0] - other).abs().max() for other in (first[1], second[0])) > 0.01
    monkeypatch.setattr("scripts.mini_diffusion.samples.BATCH", 3)
    torch.testing.assert_close(images(0, 1), both, atol=1e-4, rtol=0)


def test_sampling_is_a_function_of_the_seeds_and_uses_the_guidance(few_steps):
    first = sample_objects(MODEL, 2, guidance=4.0, seeds=[0, 5])
    assert first.image.shape == (2, 3, 64, 64) and first.image.min() >= 0 and first.image.max() <= 1
    assert first.things == things_to_ask(2, 0) and first.label is None
    assert torch.equal(first.image, sample_objects(MODEL, 2, guidance=4.0, seeds=[0, 5]).image)
    for other in ({"guidance": 4.0, "seeds": [0, 6]}, {"guidance": 1.0, "seeds": [0, 5]}):
        assert not torch.equal(first.image, sample_objects(MODEL, 2, **other).image)


def test_controlled_sampling_reads_the_control_of_its_kind_from_held_out_scenes(tmp_path, few_steps):
    unet = UNet2DConditionModel.from_pretrained(MODEL / "unet")
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 16))
    for layer in (controlnet.controlnet_cond_embedding.conv_out, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight)  # zero at first: no control would be seen
    controlnet.save_pretrained(tmp_path)
    mask, edge = (
        sample_controlled(MODEL, tmp_path, kind, 2, guidance=4.0, seeds=[0]) for kind in ("mask", "edge")
    )
    for i in range(2):
        scene = render_objects("test", i, count=1)
        assert (mask.label[i].numpy() == scene["label"]).all()
        assert mask.things[i] == (*scene["objects"][0], scene["caption_facts"]["background"])
    assert mask.image.shape == (2, 3, 64, 64) and not torch.equal(mask.image, edge.image)
