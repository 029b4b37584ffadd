"""Episodes: who may be query and support, what is drawn again the same, what a batch holds."""

import json
from itertools import islice

import numpy as np
import pytest
import torch

from datamodules.auxiliary import Auxiliary, Supports
from datamodules.episode_lists import EpisodePool
from datamodules.few_shot import mark_object
from datamodules.transforms import RandomCropFlipJitter
from tests.fake_few_shot import FakeImages, fake_few_shot, jittered


def first_batches(data, count: int = 4) -> list[dict]:
    return list(islice(data.train_dataloader(), count))


def assert_same(a: dict, b: dict):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert np.array_equal(value, b[key]), key


def evaluated(data, split: str = "val") -> dict[str, list[dict]]:
    return {
        name: [dataset[i] for i in range(len(dataset))] for name, dataset in data.eval_datasets(split).items()
    }


@pytest.mark.parametrize("protocol", ["bam", "hsnet"])
@pytest.mark.parametrize("by_class", [False, True])
def test_supports_differ_from_the_query_and_all_show_a_class_that_may_be_asked_for(protocol, by_class):
    areas = FakeImages().areas
    pool = EpisodePool(areas, [1, 2, 5], protocol, by_class, min_pixels=10, shot=3)
    for draw in range(10_000):
        query, class_id, supports = pool.draw(draw, np.random.default_rng(draw), 3)
        assert class_id in (1, 2, 5) and len({query, *supports}) == 4
        assert all(class_id in areas[image] for image in (query, *supports))


def test_base_and_novel_classes_are_all_classes_without_overlap():
    for fold in range(4):
        data = fake_few_shot(fold=fold)
        assert not data.base_classes.keys() & data.novel_classes.keys()
        assert data.base_classes | data.novel_classes == FakeImages.class_names
        assert data.eval_classes("val") == data.novel_classes and len(data.novel_classes) == 2
    with pytest.raises(ValueError, match="no fold 4: found folds 0 to 3"):
        fake_few_shot(fold=4)


def test_training_images_of_bam_show_no_novel_class_and_those_of_hsnet_may():
    areas = FakeImages().areas
    novel = {name: fake_few_shot(protocol=name).novel_classes.keys() for name in ("bam", "hsnet")}
    for name, shown in (("bam", False), ("hsnet", True)):
        pool = fake_few_shot(protocol=name).pool("train")
        queries = {query for query, _ in pool.queries} | {image for image, _ in pool.pairs()}
        assert any(areas[image].keys() & novel[name] for image in queries) is shown


def test_a_query_of_bam_may_show_its_class_in_any_area_but_a_support_has_the_smallest_one():
    # The corners, of 16 pixels, are below this area; the squares are above.
    options = {"min_pixels": 20, "shot": 1}
    areas = FakeImages().areas
    pool = EpisodePool(areas, range(1, 9), "bam", **options)
    episodes = [pool.draw(0, np.random.default_rng(i)) for i in range(20)]
    assert areas[0] == {1: 64, 2: 16} and {e.class_id for e in episodes} == {1, 2}
    assert all(areas[image][e.class_id] >= 20 for e in episodes for image in e.supports)
    entries = EpisodePool(areas, range(1, 9), "hsnet", **options).queries
    assert [classes for image, classes in entries if image == 0] == [[1]]


def test_objects_below_2048_pixels_are_no_supports_by_default():
    areas = [{1: 45 * 45}, {1: 46 * 46}, {1: 46 * 46}]
    pool = EpisodePool(areas, [1], "bam", min_pixels=2048)
    assert pool.pairs() == [(1, 1), (2, 1)] and [image for image, _ in pool.queries] == [1, 2]


def test_by_class_draws_classes_evenly_however_many_images_they_have():
    areas = [{1: 9}] * 90 + [{2: 9}] * 10
    classes = {}
    for by_class in (False, True):
        pool = EpisodePool(areas, [1, 2], "hsnet", by_class)
        drawn = [pool.draw(i, np.random.default_rng(i)).class_id for i in range(400)]
        classes[by_class] = drawn.count(2) / 400
    assert classes[False] == pytest.approx(0.1) and classes[True] == pytest.approx(0.5, abs=0.1)


def test_all_settings_of_supports_see_the_same_queries_and_the_first_of_the_same_supports():
    settings = {"one": Supports(1), "five": Supports(5), "aux": jittered(num=3)}
    sets = evaluated(fake_few_shot(eval_supports=settings))
    assert list(sets) == ["one", "five", "aux"]
    for one, five, aux in zip(*sets.values(), strict=True):
        for key in ("image", "label", "class_id", "name", "episode"):
            assert np.array_equal(one[key], five[key]) and np.array_equal(one[key], aux[key])
        assert len(one["support_image"]) == 1 and len(five["support_image"]) == 5
        assert torch.equal(one["support_image"][0], five["support_image"][0])
        assert torch.equal(one["support_image"][0], aux["support_image"][0])
        assert aux["is_aux"].tolist() == [False, True, True, True] and not five["is_aux"].any()
    alone = evaluated(fake_few_shot(supports=Supports(1)))
    assert_same(sets["one"][3], alone["1-shot"][3])


def test_seeds_of_test_are_sets_of_their_own_and_decide_on_the_episodes():
    data = fake_few_shot(test_seeds=[510, 365], val_seed=510)
    assert data.val_set_names == ["1-shot"] and data.test_set_names == ["1-shot seed 510", "1-shot seed 365"]
    assert list(data.eval_datasets("test")) == data.test_set_names
    first, other = data.episodes("test")
    assert data.episodes("val") == [first] and first != other
    assert [e.query for e in first] == [e.query for e in other]  # images are walked through in order
    assert fake_few_shot(val_seed=321).seeds["val"] == [321]


def test_queries_come_again_until_there_are_enough_and_without_a_number_each_comes_once():
    assert len(fake_few_shot(episodes=50).episodes("val")[0]) == 50
    data = fake_few_shot(episodes=None)
    queries = [e.query for e in data.episodes("val")[0]]
    assert queries == sorted(set(queries)) == [query for query, _ in data.pool("val").queries]


@pytest.mark.parametrize("protocol", ["bam", "hsnet"])
def test_without_auxiliary_images_everything_is_bit_for_bit_as_if_there_were_no_such_thing(protocol):
    none = Supports(2, Auxiliary("nowhere", num=0))
    unused = Supports(2, Auxiliary("nowhere", use_in="none"))
    plain, *others = (fake_few_shot(protocol=protocol, supports=s) for s in (Supports(2), none, unused))
    for other in others:
        for a, b in zip(first_batches(plain), first_batches(other), strict=True):
            assert_same(a, b)
        for a, b in zip(evaluated(plain)["2-shot"], evaluated(other)["2-shot"], strict=True):
            assert_same(a, b)


def test_queries_and_real_supports_of_training_stay_the_same_beside_auxiliary_ones():
    transform = RandomCropFlipJitter((16, 16))
    plain = first_batches(fake_few_shot(transform=transform))
    more = first_batches(fake_few_shot(transform=transform, supports=jittered(dropout_p=0.5)))
    for a, b in zip(plain, more, strict=True):
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"])
        assert torch.equal(a["support_image"], b["support_image"][:, :1])


def test_training_does_not_depend_on_workers_and_goes_on_after_the_batches_of_its_state():
    options = {"batch_size": 2, "supports": jittered(), "transform": RandomCropFlipJitter((16, 16))}
    batches = first_batches(fake_few_shot(**options), 4)
    for a, b in zip(batches, first_batches(fake_few_shot(**options, num_workers=1), 4), strict=True):
        assert_same(a, b)
    resumed = fake_few_shot(**options)
    resumed.load_state_dict({"batches_drawn": 3})
    assert_same(first_batches(resumed, 1)[0], batches[3])
    assert first_batches(fake_few_shot(**options, seed=1), 1)[0]["name"] != batches[0]["name"]


def test_a_batch_holds_what_a_few_shot_network_is_given():
    batch = first_batches(fake_few_shot(batch_size=3, supports=jittered(num=2, shot=2, weight=0.5)), 1)[0]
    assert batch["image"].shape == (3, 3, 24, 24) and batch["label"].shape == (3, 24, 24)
    assert batch["support_image"].shape == (3, 4, 3, 24, 24) and batch["support_label"].shape == (
        3,
        4,
        24,
        24,
    )
    assert batch["support_weight"].tolist() == [[1, 1, 0.5, 0.5]] * 3
    assert batch["is_aux"].tolist() == [[False, False, True, True]] * 3
    assert batch["class_id"].dtype == batch["label"].dtype == batch["support_label"].dtype == torch.int64
    assert batch["image"].dtype == torch.float32 and 0.5 < batch["image"].max() <= 1
    assert set(batch["label"].unique().tolist()) == {0, 1, 255} and batch["episode"].tolist() == [0, 1, 2]


def test_base_labels_number_the_base_classes_and_take_novel_ones_as_background():
    data = fake_few_shot(fold=1, protocol="hsnet")  # novel are 3 and 4
    dataset, images = data.train_dataset(), FakeImages()
    assert data.base_learner_ids() == [1, 2, 5, 6, 7, 8]
    numbers = {0: 0, 1: 1, 2: 2, 3: 0, 4: 0, 5: 3, 6: 4, 7: 5, 8: 6, 255: 255}
    seen = set()
    for item in range(len(dataset)):
        sample = dataset[item, item]
        image, label = images.read(int(sample["name"].removeprefix("image-")))
        expected = np.vectorize(numbers.get)(data.fit(image, label)[1])
        assert np.array_equal(sample["base_label"], expected)
        assert sample["base_class"] == numbers[sample["class_id"]] > 0
        seen |= set(np.unique(label))
    assert {3, 4} <= seen


def test_void_pixels_of_a_training_query_are_ignored_by_bam_and_background_for_hsnet():
    ids = {name: set() for name in ("bam", "hsnet")}
    for name, found in ids.items():
        for batch in first_batches(fake_few_shot(protocol=name)):
            found |= set(batch["label"].unique().tolist())
            assert 255 in batch["support_label"] and 255 in batch["base_label"]
    assert ids == {"bam": {0, 1, 255}, "hsnet": {0, 1}}
    assert 255 in evaluated(fake_few_shot(protocol="hsnet"))["1-shot"][0]["label"]


def test_each_image_of_a_training_episode_is_augmented_on_its_own_with_the_object_marked_1():
    seen = []

    def transform(image, label, seed):
        seen.append((seed, set(np.unique(label))))
        return image[:8, :8], label[:8, :8]

    sample = fake_few_shot(transform=transform, supports=jittered()).train_dataset()[0, 5]
    assert sample["image"].shape == (3, 8, 8) and sample["support_image"].shape == (3, 3, 8, 8)
    assert len({seed for seed, _ in seen}) == len(seen) == 4 and all(1 in ids for _, ids in seen)
    assert sample["base_label"].shape == sample["label"].shape == (8, 8)


def test_marking_the_object_keeps_all_other_classes_apart():
    label = np.array([[0, 7, 1], [300, 255, 7]])
    marked, ids = mark_object(label, 7)
    assert marked.tolist() == [[0, 1, 2], [3, 255, 1]] and ids == [0, 7, 1, 300]
    assert marked.dtype == np.uint8


def test_labels_are_scored_at_the_size_of_the_network_or_of_their_file():
    for options, shapes in (
        ({"protocol": "bam"}, {(24, 24)}),
        ({"protocol": "bam", "original_size": True}, {(32, 32)}),
        ({"protocol": "bam", "original_size": True, "exact_unpad": True}, {(24, 32), (28, 32), (32, 32)}),
        ({"protocol": "hsnet", "original_size": True}, {(24, 32), (28, 32), (32, 32)}),
    ):
        samples = evaluated(fake_few_shot(size=24, **options))["1-shot"]
        assert {sample["label"].shape for sample in samples} == shapes
        assert all(sample["image"].shape == (24, 24, 3) for sample in samples)
        assert ("valid_size" in samples[0]) is ("exact_unpad" in options)
    sample = evaluated(fake_few_shot(size=24, original_size=True, exact_unpad=True))["1-shot"][0]
    height, width = sample["valid_size"].tolist()
    assert (
        (height, width) == (16, 24)
        and not sample["image"][height:].any()
        and sample["image"][height - 1].any()
    )


@pytest.mark.parametrize(
    "options",
    [
        {"original_size": True, "eval_batch_size": 2},
        {"exact_unpad": True},
        {"original_size": True, "exact_unpad": True, "protocol": "hsnet"},
    ],
)
def test_options_of_full_size_that_do_not_go_together_are_refused(options):
    with pytest.raises(ValueError, match="Scoring at full size needs eval_batch_size 1"):
        fake_few_shot(**options)


def test_classes_with_too_few_images_are_left_out_of_training_and_an_error_in_evaluation(monkeypatch):
    # Of the images with class 1 or 3 as their square, all but two have a square of 4 pixels.
    images = FakeImages(small=tuple(i for i in range(16, 48) if i % 8 in (0, 2)))
    data = fake_few_shot(fold=0, supports=Supports(2), min_pixels=20)
    monkeypatch.setattr(data, "fake_images", images)
    with pytest.warns(UserWarning, match=r"too few images for episodes of 2 .*thing 3 \(2\)"):
        assert 3 not in data.pool("train").supports
    with pytest.raises(
        ValueError, match=r"too few images for episodes of 5 \+ 1 images: found thing 1 \(2\)"
    ):
        data.eval_datasets("val")
    skipping = fake_few_shot(fold=0, supports=Supports(2), min_pixels=20, skip_rare=True)
    monkeypatch.setattr(skipping, "fake_images", images)
    with pytest.warns(UserWarning, match="They are left out"):
        assert {e.class_id for e in skipping.episodes("val")[0]} == {2}


def test_no_class_with_enough_images_is_an_error():
    with pytest.raises(ValueError, match=r"No episodes can be drawn: found 0 images of 2 classes"):
        fake_few_shot(min_pixels=1000).eval_datasets("val")


def test_a_file_of_episodes_is_written_once_and_then_decides(tmp_path):
    path = tmp_path / "lists/fold0.json"
    drawn = fake_few_shot()
    written = fake_few_shot(episode_file=path)
    assert written.episodes("val") == drawn.episodes("val")
    assert [p.name for p in path.parent.iterdir()] == ["fold0.json"]
    document = json.loads(path.read_text())
    assert set(document["episodes"]) == {"val/321", "test/7"} and document["fold"] == 0
    document["episodes"]["val/321"] = document["episodes"]["val/321"][::-1]
    path.write_text(json.dumps(document))
    assert fake_few_shot(episode_file=path).episodes("val")[0] == drawn.episodes("val")[0][::-1]
    assert fake_few_shot(episode_file=path).episodes("test") == drawn.episodes("test")
    # Enough supports are stored for five shots, so that all settings can share the file.
    assert len(evaluated(fake_few_shot(episode_file=path, supports=Supports(5)))["5-shot"][0]["is_aux"]) == 5


@pytest.mark.parametrize(
    "options, found",
    [
        ({"fold": 1}, "holds no episodes val/321 of .*'fold': 1"),
        ({"protocol": "hsnet"}, "holds no episodes"),
        ({"val_seed": 5}, "holds no episodes val/5 .*found lists val/321, test/7"),
        ({"episodes": 13}, "holds no episodes"),
        ({"supports": Supports(6)}, "episode 0 cannot be used.*It needs 6 different images"),
    ],
)
def test_a_file_of_other_episodes_is_refused(tmp_path, options, found):
    fake_few_shot(episode_file=tmp_path / "list.json").episodes("val")
    with pytest.raises(ValueError, match=found):
        fake_few_shot(episode_file=tmp_path / "list.json", **options).episodes("val")


@pytest.mark.parametrize(
    "part, value", [(0, "image-3"), (1, 5), (2, ["image-0"]), (2, ["image-8", "image-8"])]
)
def test_an_episode_that_cannot_be_is_refused(tmp_path, part, value):
    path = tmp_path / "list.json"
    fake_few_shot(episode_file=path).episodes("val")
    document = json.loads(path.read_text())
    document["episodes"]["val/321"][0][part] = value
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="val/321: episode 0 cannot be used"):
        fake_few_shot(episode_file=path).episodes("val")
    path.write_text("[]")
    with pytest.raises(ValueError, match="is no list of episodes"):
        fake_few_shot(episode_file=path).episodes("val")


def test_processes_share_the_episodes_between_them(monkeypatch):
    numbers = []
    for rank in (0, 1):
        data = fake_few_shot()
        monkeypatch.setattr(data, "rank_and_world_size", lambda rank=rank: (rank, 2))
        numbers.append([int(batch["episode"]) for batch in data.val_dataloader()[0]])
    assert numbers == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]


def test_one_shot_and_five_shot_tests_ask_for_the_same_queries_and_classes_where_some_are_rare(monkeypatch):
    images = FakeImages(small=tuple(i for i in range(40, 48) if i % 8 == 0))  # class 1 has five images left
    found = []
    for shot in (1, 5):
        data = fake_few_shot(fold=0, supports=Supports(shot), min_pixels=20, skip_rare=True)
        monkeypatch.setattr(data, "fake_images", images)
        with pytest.warns(UserWarning, match=r"5 \+ 1 images: found thing 1"):
            found.append([(e.query, e.class_id, e.supports) for e in data.episodes("test")[0]])
    assert found[0] == found[1]
