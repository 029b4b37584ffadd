import hashlib

import pytest

from functional.support_images import SUFFIXES, parse_support_name, profile_hash, support_name, support_seed


@pytest.mark.parametrize(
    ("stem", "class_number", "k", "name"),
    [
        ("2008_000008", 15, 0, "2008_000008_15_0"),
        ("train2014/COCO_train2014_000000367917", 1, 0, "train2014/COCO_train2014_000000367917_1_0"),
        ("abacus/3", 1, 0, "abacus/3_1_0"),
    ],
)
def test_names_are_those_of_the_published_code_and_can_be_read_back(stem, class_number, k, name):
    assert support_name(stem, class_number, k) == name
    for suffix in ("", *SUFFIXES):
        assert parse_support_name(f"{name}{suffix}") == (stem, class_number, k)


def test_jpg_is_looked_for_before_png():
    assert SUFFIXES == (".jpg", ".png")


@pytest.mark.parametrize("name", ["2008_000008_15_control.jpg", "a_1.png", "_1_2.png", "a_1_²", "a_1_-2"])
def test_a_name_of_another_form_is_an_error_that_shows_it(name):
    with pytest.raises(ValueError, match="<stem>_<class>_<k>"):
        parse_support_name(name)


def test_a_seed_is_the_first_8_bytes_of_a_hash_of_the_key():
    digest = hashlib.sha256(b"pascal|2008_000008|15|2|7").digest()
    expected = int.from_bytes(digest[:8], "big") % 2**31
    assert support_seed("pascal", "2008_000008", 15, 2, 7) == expected


def test_each_part_of_the_key_changes_the_seed():
    key = ("pascal", "2008_000008", 15, 2, 7)
    others = [("coco", *key[1:]), (key[0], "2008_000009", *key[2:])]
    others += [(*key[:2], 16, *key[3:]), (*key[:3], 3, 7), (*key[:4], 8)]
    seeds = {support_seed(*other) for other in [key, *others]}
    assert len(seeds) == 6 and all(0 <= seed < 2**31 for seed in seeds)
    assert support_seed(*key) == support_seed(*key)


def test_a_profile_s_name_depends_on_every_setting_and_not_on_their_order():
    settings = {"sampler": "ddim", "steps": 20}
    assert profile_hash(settings) == profile_hash({"steps": 20, "sampler": "ddim"})
    assert profile_hash(settings) != profile_hash(settings | {"sampler": "unipc"})
    assert len(profile_hash(settings)) == 12
