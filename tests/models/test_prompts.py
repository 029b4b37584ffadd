"""Prompts of DiffSegmenter: which tokens stand for a class, which are emphasised, and what is refused."""

import copy
import json

import pytest
import torch
from transformers import CLIPTokenizer

from functional.classes import VOC21
from models.diffusion.stable_diffusion import StableDiffusion
from models.prompts import Prompt, PromptStyle
from scripts.mini_diffusion.layout import write_tokenizer

# One token each, as in CLIP's vocabulary. "potx" and "tedx" leave the pieces "pot" and "ted", by which CLIP
# reads "pottedplant", and "parkx" leaves "park".
WORDS = (
    *("a", "an", "photo", "photograph", "photography", "of", "plane", "flying", "hot", "dog", "traffic"),
    *("light", "people", "building", "buildings", "over", "in", "potx", "tedx", "plant", "parkx", "apple"),
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """A tokenizer that says that its model has read no other words, and one that, like CLIP's, does not."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 77, WORDS)
    file = folder / "tokenizer_config.json"
    config, found = json.loads(file.read_text()), {}
    for closed in (True, False):
        file.write_text(json.dumps(config | {"closed_vocabulary": closed}))
        found[closed] = CLIPTokenizer.from_pretrained(folder)
    return found


@pytest.fixture
def clip(tokenizers):
    return tokenizers[False]


@pytest.fixture(scope="module")
def diffusion(model_folder):
    return StableDiffusion(str(model_folder), parts=("text_encoder",))


def pieces(tokenizer, found: Prompt) -> tuple[list[str], list[str]]:
    """The tokens that count and those that are emphasised, as they are written."""
    written = tokenizer.convert_ids_to_tokens(tokenizer(found.text)["input_ids"])
    return [written[i] for i in found.tokens], [written[i] for i in found.emphasized]


def test_without_a_caption_the_prompt_is_prefix_and_name(clip):
    assert PromptStyle().prompt(clip, "plane") == Prompt("a photograph of plane", (4,), (4,))
    assert PromptStyle(prefix="").prompt(clip, "plane") == Prompt("plane", (1,), (1,))
    assert PromptStyle("a photo of").prompt(clip, "dog") == Prompt("a photo of dog", (4,), (4,))


def test_a_caption_goes_on_after_the_name_and_a_word_in_ing_counts_too(clip):
    found = PromptStyle().prompt(clip, "plane", "a photograph of plane flying over buildings")
    assert found == Prompt("a photograph of plane flying over buildings", (4, 5), (4,))
    assert pieces(clip, found) == (["plane</w>", "flying</w>"], ["plane</w>"])


def test_of_a_name_of_two_words_the_last_token_counts_or_all_and_the_last_word_is_emphasised(clip):
    word, last, mean = (
        "traffic light",
        PromptStyle("a photography of"),
        PromptStyle("a photography of", 1.21, "mean"),
    )
    assert last.prompt(clip, word) == Prompt("a photography of traffic light", (5,), (5,))
    assert mean.prompt(clip, word) == Prompt("a photography of traffic light", (4, 5), (5,))
    assert pieces(clip, last.prompt(clip, "hot dog")) == (["dog</w>"], ["dog</w>"])
    caption = "a photography of traffic light flying"
    assert last.prompt(clip, word, caption).tokens == (5, 6)
    assert mean.prompt(clip, word, caption).tokens == (4, 5, 6)


def test_of_a_word_of_three_tokens_the_last_counts_and_all_are_emphasised(clip):
    found = PromptStyle().prompt(clip, "pottedplant", "a photograph of pottedplant flying")
    assert found.tokens == (6, 7) and found.emphasized == (4, 5, 6)
    assert pieces(clip, found) == (["plant</w>", "flying</w>"], ["pot", "ted", "plant</w>"])
    assert PromptStyle(tokens="mean").prompt(clip, "pottedplant").tokens == (4, 5, 6)


def test_the_word_in_ing_is_an_option(clip):
    caption = "a photograph of plane flying"
    assert PromptStyle(ing=False).prompt(clip, "plane", caption) == Prompt(caption, (4,), (4,))


@pytest.mark.parametrize(
    ("rest", "counted"),
    [
        (" flying", ["plane</w>", "flying</w>"]),
        (" flying, over people", ["plane</w>", "flying</w>"]),
        (" building", ["plane</w>", "building</w>"]),  # as in the released code
        (" parking", ["plane</w>", "park"]),  # the first of its tokens
        (" buildings", ["plane</w>"]),
        (" over flying people", ["plane</w>"]),
        (", flying", ["plane</w>"]),
        ("-flying", ["plane</w>"]),
        (" (flying)", ["plane</w>"]),
        ("", ["plane</w>"]),
    ],
)
def test_only_the_next_word_counts_and_only_if_it_ends_in_ing(clip, rest, counted):
    found = PromptStyle().prompt(clip, "plane", f"a photograph of plane{rest}")
    assert found.text == f"a photograph of plane{rest}"
    assert pieces(clip, found)[0] == counted


def test_the_offset_of_the_released_code_counts_the_token_after_the_word_in_ing(clip):
    style = PromptStyle("a photography of", ing_offset=1)
    found = style.prompt(clip, "traffic light", "a photography of traffic light flying over people")
    assert found.tokens == (5, 7)
    assert pieces(clip, found)[0] == ["light</w>", "over</w>"]
    assert style.prompt(clip, "traffic light", "a photography of traffic light over people").tokens == (5,)


@pytest.mark.parametrize(
    ("prefix", "word", "start"),
    [
        ("a photo of a", "dog", "a photo of a dog"),
        ("a photo of a", "apple", "a photo of an apple"),
        ("a photo of a", "Apple", "a photo of an Apple"),
        ("a", "apple", "an apple"),
        ("a photograph of", "apple", "a photograph of apple"),
        ("pizza", "apple", "pizza apple"),
    ],
)
def test_an_article_at_the_end_of_the_prefix_fits_the_name(prefix, word, start):
    assert PromptStyle(prefix).start(word) == start


def test_positions_follow_the_article(clip):
    style = PromptStyle("a photo of a")
    found = [style.prompt(clip, word, f"{style.start(word)} flying") for word in ("dog", "apple", "hot dog")]
    assert [one.tokens for one in found] == [(5, 6), (5, 6), (6, 7)]
    assert [one.text.split()[3] for one in found] == ["a", "an", "a"]


def test_a_suffix_that_is_glued_to_the_name_is_dropped(clip):
    found = PromptStyle().prompt(clip, "plane", "a photograph of planes flying over")
    assert found == Prompt("a photograph of plane flying over", (4, 5), (4,))


def test_the_end_of_a_caption_that_the_model_cannot_read_is_left_out(tokenizers):
    short = copy.deepcopy(tokenizers[False])
    caption, start = "a photograph of plane flying over people, in light", "a photograph of plane"
    for limit, text in (
        (12, caption),
        (11, f"{start} flying over people, in"),
        (10, f"{start} flying over people,"),  # the comma is a token
        (9, f"{start} flying over"),
        (6, start),
    ):
        short.model_max_length = limit
        tokens = (4, 5) if "flying" in text else (4,)
        assert PromptStyle().prompt(short, "plane", caption) == Prompt(text, tokens, (4,))


def test_the_case_of_a_caption_does_not_matter_and_blanks_at_its_end_are_dropped(clip):
    found = PromptStyle().prompt(clip, "Plane", "a photograph of plane flying ")
    assert found == Prompt("a photograph of Plane flying", (4, 5), (4,))


def test_each_class_of_pascal_voc_is_found_even_where_its_name_falls_into_letters(clip):
    for word in VOC21.words[1:]:
        found = PromptStyle(tokens="mean").prompt(clip, word, f"a photograph of {word} in building")
        assert "".join(pieces(clip, found)[0]) == f"{word}</w>"
        assert found.emphasized == found.tokens


@pytest.mark.parametrize("caption", ["a picture of plane", "plane flying", "a photograph of dog", ""])
def test_a_caption_with_another_beginning_is_an_error_that_shows_both(clip, caption):
    with pytest.raises(ValueError, match="begin with the prompt 'a photograph of plane': found") as error:
        PromptStyle().prompt(clip, "plane", caption)
    assert repr(caption) in str(error.value)


def test_a_name_that_is_too_long_for_the_model_is_an_error_that_shows_it(diffusion):
    style, word = PromptStyle("a photo of"), " ".join(["red"] * 20)
    with pytest.raises(ValueError, match=f"{word}.* has 25 tokens.*reads 16"):
        style.encode(diffusion, [style.prompt(diffusion.tokenizer, word)])


@pytest.mark.parametrize("word", ["", "  "])
def test_an_empty_name_is_an_error(tokenizers, word):
    for tokenizer in tokenizers.values():
        with pytest.raises(ValueError, match=r"A class needs a name: found '\s*'"):
            PromptStyle().prompt(tokenizer, word)


def test_a_name_that_the_text_does_not_hold_as_tokens_of_its_own_is_an_error(clip):
    assert PromptStyle().prompt(clip, "dog!").tokens == (5,)
    with pytest.raises(ValueError, match=r"tokens of 'dog!' are not found in 'a photograph of dog!\?\?'"):
        PromptStyle().prompt(clip, "dog!", "a photograph of dog!??")


def test_a_model_of_few_words_refuses_others_and_names_the_nearest(tokenizers):
    closed = tokenizers[True]
    assert PromptStyle().prompt(closed, "traffic light").tokens == (5,)
    with pytest.raises(
        ValueError, match=r"never read the word 'plant3' \(of 'hot plant3'\)\. Did you mean 'plant'\?"
    ):
        PromptStyle().prompt(closed, "hot plant3")
    with pytest.raises(ValueError, match="'zebra'") as error:
        PromptStyle().prompt(closed, "zebra")
    assert "Did you mean" not in str(error.value) and "dog, flying" in str(error.value)
    assert PromptStyle().prompt(tokenizers[False], "zebra").text == "a photograph of zebra"


def test_only_the_emphasised_tokens_are_moved_off_the_empty_text(diffusion):
    style, words = PromptStyle("a photo of"), ("hot dog", "car")
    prompts = [style.prompt(diffusion.tokenizer, word) for word in words]
    moved, plain = style.encode(diffusion, prompts), diffusion.encode_text([one.text for one in prompts])
    empty = diffusion.encode_text([""])[0]
    assert moved.shape == (2, 16, 32)
    for row, z, last in zip(moved, plain, (5, 4), strict=True):
        others = [i for i in range(16) if i != last]
        assert torch.equal(row[others], z[others])
        torch.testing.assert_close(row[last] - empty[last], 1.21 * (z[last] - empty[last]))


def test_the_weight_of_the_emphasis_is_an_option_and_one_is_the_plain_text_bit_for_bit(diffusion):
    codes = {}
    for weight in (1, 1.21, 2):
        style = PromptStyle("a photo of", weight)
        codes[weight] = style.encode(diffusion, [style.prompt(diffusion.tokenizer, "dog")])
    assert torch.equal(codes[1], diffusion.encode_text(["a photo of dog"]))
    torch.testing.assert_close(
        codes[2][0, 4] - codes[1][0, 4], (codes[1][0, 4] - diffusion.encode_text([""])[0, 4])
    )
    assert not torch.equal(codes[1.21], codes[2])
