"""mini-20i: what a fold shows to whom. The pretraining of a fold never sees its novel categories."""

import numpy as np
import pytest

from datamodules.mini_world.few_shot import Mini20iDataModule, MiniBaseDataModule, MiniFewShotImages
from datamodules.mini_world.objects import FOLDS, RESERVE
from functional.classes import MINI_OBJECTS, class_table


@pytest.mark.parametrize("fold", range(4))
def test_a_base_learner_sees_base_categories_and_the_reserve_and_never_novel_ones(fold):
    data = MiniBaseDataModule(fold, size=64, train_length=300, eval_length=40)
    assert data.classes == f"mini20i_base{fold}"
    names = class_table(data.classes).names
    assert set(names) == {"background", *MINI_OBJECTS.names} - set(FOLDS[fold]) and names[16:] == RESERVE
    drawn = {data.train_set.categories, *(s["scenes"].categories for s in data.eval_sets.values())}
    assert drawn == {names[1:]}  # what the renderer is given to draw
    seen = {
        name
        for dataset in (data.train_set, data.eval_datasets("val")["scenes"])
        for i in range(len(dataset))
        for name in np.array(names)[np.unique(dataset[i]["label"])]
    }
    assert seen == set(names)  # all of them, and nothing else


def test_with_novel_categories_these_are_drawn_and_are_background():
    with_novel = MiniBaseDataModule(1, size=64, with_novel=True, train_length=60).train_set
    spoken = {word for i in range(60) for word in with_novel[i]["caption"].split()}
    assert spoken & set(FOLDS[1])
    shown = {number for i in range(60) for number in np.unique(with_novel[i]["label"])}
    assert shown <= set(range(22)) and len(shown) > 15


def test_base_labels_say_what_the_scene_shows():
    scenes = MiniBaseDataModule(2, size=64, train_length=20).train_set
    names = np.array(class_table("mini20i_base2").names)
    for i in range(20):
        scene = scenes[i]
        shown = set(names[np.unique(scene["label"])[1:]])
        assert all(name in MINI_OBJECTS.names for name in shown) and shown
        spoken = {word for word in scene["caption"].split() if word in names}
        assert spoken <= shown


def test_scenes_are_brought_to_the_size_of_episodes():
    small, large = (MiniBaseDataModule(0, size=size, train_length=2).train_set[1] for size in (64, 128))
    assert large["image"].shape == (128, 128, 3) and large["label"].shape == (128, 128)
    assert np.array_equal(large["label"][::2, ::2], small["label"])


def test_training_episodes_ask_for_base_categories_and_evaluation_for_the_folds():
    data = Mini20iDataModule(fold=1, train_length=200, episodes=60, size=64)
    assert set(data.novel_classes.values()) == set(FOLDS[1])
    assert set(data.base_classes.values()) == {n for fold in FOLDS for n in fold} - set(FOLDS[1])
    train = data.train_dataset()
    asked = {train[i % len(train), i]["class_id"] for i in range(120)}
    assert asked == set(data.base_classes)
    assert {e.class_id for e in data.episodes("test")[0]} == set(data.novel_classes)


def test_base_numbers_of_episodes_are_those_of_the_base_learner():
    data = Mini20iDataModule(fold=3, train_length=60, eval_length=60, protocol="bam", size=64, episodes=5)
    names = class_table("mini20i_base3").names
    train = data.train_dataset()
    for i in range(20):
        episode = train[i, i]
        assert names[episode["base_class"]] == MINI_OBJECTS.names[episode["class_id"]]
        assert episode["base_class"] in episode["base_label"]


def test_the_scenes_are_of_the_folds_categories_and_their_areas_are_counted():
    images = MiniFewShotImages("test", 30)
    for i in range(30):
        _, label = images.read(i)
        assert images.areas[i] == {int(c): int((label == c).sum()) for c in np.unique(label) if c}
        assert images.areas[i].keys() <= images.class_names.keys()
    assert images.aux_key(3, 7) == ("objects-test-000003", 7)
    assert not set(images.class_names.values()) & set(RESERVE)
