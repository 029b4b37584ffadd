"""Auxiliary supports: where files lie, what stands in for missing ones, the controls without files."""

import shutil

import numpy as np
import pytest
from PIL import Image

from datamodules.auxiliary import Auxiliary, SupportReader, Supports, object_mask
from tests.fake_data import write_png
from tests.fake_few_shot import FakeImages, fake_few_shot, jittered

IMAGES = FakeImages()
PROFILE = "fake/mask/a1b2"


@pytest.fixture
def root(tmp_path):
    """Two grey images of 64x80 for each (image, class): 100 + k, or of class 2 another grey."""
    for index, found in enumerate(IMAGES.areas):
        for c in found:
            for k in (0, 1):
                path = tmp_path / PROFILE / f"folder/{index:03d}_{c}_{k}.png"
                write_png(path, np.full((64, 80, 3), 100 + k + 50 * (c == 2), np.uint8))
    return tmp_path


def read(supports: Supports, class_id: int = 1, indices=(0, 8), split: str = "test", rng=None):
    return SupportReader(IMAGES, supports, split).read(class_id, indices, rng)


def test_auxiliary_images_have_the_size_and_the_very_mask_of_the_first_real_support(root):
    real, *aux = read(Supports(1, Auxiliary(root, num=2)))
    image, label = IMAGES.read(0)
    assert np.array_equal(real.image, image) and real.weight == 1 and not real.is_aux
    assert np.array_equal(real.mask, object_mask(label, 1)) and set(np.unique(real.mask)) == {0, 1, 255}
    assert [int(support.image[0, 0, 0]) for support in aux] == [100, 101]
    for support in aux:
        assert support.image.shape == image.shape and support.is_aux and support.weight == 1
        assert np.array_equal(support.mask, real.mask)


def test_an_image_has_auxiliary_images_of_its_own_for_each_class(root):
    support = read(Supports(1, Auxiliary(root, num=1)), class_id=2)[1]
    assert support.image[0, 0, 0] == 150


def test_the_number_and_the_weight_of_auxiliary_images_can_be_chosen(root):
    found = read(Supports(2, Auxiliary(root, num=1, weight=0.25)))
    assert [support.weight for support in found] == [1, 1, 0.25]


def test_real_supports_come_first_and_one_or_all_of_them_have_auxiliary_images(root):
    first = read(Supports(2, Auxiliary(root, num=2, anchor="first")))
    every = read(Supports(2, Auxiliary(root, num=2, anchor="all")))
    assert [s.is_aux for s in first] == [False] * 2 + [True] * 2
    assert [s.is_aux for s in every] == [False] * 2 + [True] * 4
    # Image 8 is higher than image 0: masks and sizes are each those of their own support.
    assert [s.image.shape[0] for s in every] == [24, 32, 24, 24, 32, 32]


@pytest.mark.parametrize("use_in, numbers", [("both", [2, 2]), ("test", [0, 2]), ("none", [0, 0])])
def test_training_and_evaluation_can_have_auxiliary_images_or_not(root, use_in, numbers):
    supports = Supports(1, Auxiliary(root, num=2, use_in=use_in))
    assert [len(read(supports, split=split)) - 1 for split in ("train", "val")] == numbers


def test_without_a_profile_the_only_one_is_taken_and_several_have_to_be_told_apart(root):
    other = root / "fake/mask/other"
    write_png(other / "folder/000_1_0.png", np.full((8, 8, 3), 9, np.uint8))
    with pytest.raises(ValueError, match=r"several profiles: found a1b2, other\. Set aux\.profile"):
        read(Supports(1, Auxiliary(root, num=1)))
    assert read(Supports(1, Auxiliary(root, profile="other", num=1)))[1].image[0, 0, 0] == 9
    flat = Auxiliary(other, profile="", num=1)
    assert read(Supports(1, flat))[1].image[0, 0, 0] == 9


def test_the_folder_of_another_control_is_another(root):
    with pytest.raises(FileNotFoundError, match=r"looked for .*fake/hed/\* and found no folder"):
        read(Supports(1, Auxiliary(root, control="hed")))
    shutil.move(root / "fake/mask", root / "fake/hed")
    assert len(read(Supports(1, Auxiliary(root, control="hed", num=2)))) == 3


def test_a_jpeg_is_taken_before_a_png_of_the_same_name(root):
    Image.new("RGB", (80, 64), (7, 7, 7)).save(root / PROFILE / "folder/000_1_0.jpg")
    assert read(Supports(1, Auxiliary(root, num=1)))[1].image[0, 0, 0] == 7


def test_a_missing_file_is_an_error_the_real_support_or_an_image_of_weight_0(root):
    (root / PROFILE / "folder/000_1_1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 auxiliary images are missing.*folder/000_1_1\.jpg"):
        read(Supports(1, Auxiliary(root, num=2)))
    for missing, weight in (("duplicate", 1.0), ("drop", 0.0)):
        real, there, stand_in = read(Supports(1, Auxiliary(root, num=2, missing=missing)))
        assert np.array_equal(stand_in.image, real.image) and stand_in.weight == weight and there.weight == 1


def test_missing_files_are_told_before_the_first_episode(root):
    for c in IMAGES.class_names:
        (root / PROFILE / f"folder/000_{c}_0.png").unlink(missing_ok=True)

    def data(missing: str):
        return fake_few_shot(
            fold=3, supports=Supports(1, Auxiliary(root, num=2, missing=missing)), protocol="hsnet"
        )

    with pytest.raises(FileNotFoundError, match=r"2 of \d+ auxiliary images are missing.*folder/000_1_0"):
        data("error").train_dataset()
    with pytest.warns(UserWarning, match=r"2 of \d+ auxiliary images are missing.*aux\.missing: drop"):
        data("drop").train_dataset()
    data("error").eval_datasets("val")  # whose supports are complete


def test_copies_and_jittered_copies_need_no_files():
    real, *copies = read(Supports(1, Auxiliary(source="duplicate", num=2)))
    assert all(np.array_equal(copy.image, real.image) and copy.is_aux for copy in copies)
    real, first, second = read(jittered(num=2))
    assert not np.array_equal(first.image, real.image) and not np.array_equal(first.image, second.image)
    assert first.image.shape == real.image.shape and np.array_equal(first.mask, real.mask)
    assert np.array_equal(first.image, read(jittered(num=1))[1].image)  # as if it came from a file


def test_in_training_auxiliary_images_give_way_to_the_real_support_with_a_probability():
    supports, replaced = jittered(num=4, dropout_p=0.25), 0
    for seed in range(50):
        real, *aux = read(supports, split="train", rng=np.random.default_rng(seed))
        assert len(aux) == 4
        replaced += sum(np.array_equal(support.image, real.image) for support in aux)
    assert 30 < replaced < 80
    plain = read(jittered(num=4))
    always = read(supports, split="val")
    assert all(np.array_equal(a.image, b.image) for a, b in zip(plain, always, strict=True))


def test_dropout_reaches_the_training_batches_and_not_those_of_evaluation():
    data = fake_few_shot(supports=jittered(num=1, dropout_p=1.0))
    sample = data.train_dataset()[0, 0]
    assert np.array_equal(sample["support_image"][0], sample["support_image"][1])
    sample = data.eval_datasets("val")["1-shot"][0]
    assert not np.array_equal(sample["support_image"][0], sample["support_image"][1])


def test_the_pairs_whose_files_are_read_are_those_of_the_first_supports_of_the_episodes():
    aux = Auxiliary("nowhere", num=2)
    data = fake_few_shot(eval_supports={"plain": Supports(2), "aux": Supports(2, aux)}, test_seeds=[1, 2])
    episodes = [e for run in data.episodes("test") for e in run]
    assert data.support_pairs("test") == sorted({(e.supports[0], e.class_id) for e in episodes})
    assert data.support_pairs("train") == []
    every = fake_few_shot(supports=Supports(2, Auxiliary("nowhere", anchor="all")))
    wanted = {(image, e.class_id) for e in every.episodes("val")[0] for image in e.supports[:2]}
    assert every.support_pairs("val") == sorted(wanted)
    assert every.support_pairs("train") == sorted(every.pool("train").pairs())
    assert fake_few_shot(supports=jittered()).support_pairs("test") == []


@pytest.mark.parametrize("options", [{"num": -1}, {"weight": -0.1}, {"dropout_p": 1.1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="Auxiliary images need num >= 0"):
        Auxiliary(**options)
    with pytest.raises(ValueError, match="needs a real support: found shot 0"):
        Supports(0)
