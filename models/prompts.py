"""Prompts of DiffSegmenter (arXiv 2309.02773): a class in its context, and the tokens that stand for it."""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from models.diffusion.conditioning import emphasize
from models.diffusion.stable_diffusion import StableDiffusion


@dataclass(frozen=True)
class Prompt:
    """A text with the positions (begin of text is 0) of the tokens whose attention counts, and of those that
    are emphasised."""

    text: str
    tokens: tuple[int, ...]
    emphasized: tuple[int, ...]


class PromptStyle:
    """How a class is asked for: "{prefix} {name}{what a caption goes on with}".

    Args:
        prefix: words before the name. After "a" at its end a vowel makes it "an".
        emphasis: weight of the last word of the name, 1.21 for compel's `word++`; see emphasize.
        tokens: "last" counts the last sub-token of the name only, as the released code does, "mean" all.
        ing: also count the word after the name if it ends in "ing" ("plane flying"), by its first sub-token;
            only captions bring one.
        ing_offset: tokens between that word and the one that is counted; the released code has 1 for COCO, by
            mistake.
    """

    def __init__(
        self,
        prefix: str = "a photograph of",
        emphasis: float = 1.21,
        tokens: Literal["last", "mean"] = "last",
        ing: bool = True,
        ing_offset: int = 0,
    ):
        self.prefix, self.emphasis, self.tokens = prefix, emphasis, tokens
        self.ing, self.ing_offset = ing, ing_offset

    def start(self, word: str) -> str:
        """The prompt up to the name: what a captioner goes on with."""
        an = "n" if re.search(r"\ba$", self.prefix) and word[:1].lower() in "aeiou" else ""
        return f"{self.prefix}{an} {word}".strip()

    def prompt(self, tokenizer: CLIPTokenizer, word: str, caption: str | None = None) -> Prompt:
        """The prompt for a class.

        Args:
            word: how the class is called.
            caption: of the image, beginning with start(word); None adds no context. What the model cannot
                read of it is left out.

        Raises:
            ValueError: the word is empty, the model does not know it, or the caption begins otherwise.
        """
        start = self.start(word)
        own = token_ids(tokenizer, word)
        check_word(tokenizer, word, own)
        begin = 1 + len(token_ids(tokenizer, start)) - len(own)  # after the token that begins the text
        rest = "" if caption is None else continuation(caption, start)
        while rest and len(token_ids(tokenizer, start + rest)) + 2 > tokenizer.model_max_length:
            rest = " ".join(["", *rest.split()[:-1]])  # the end of the caption goes, the class stays
        text = start + rest
        if token_ids(tokenizer, text)[begin - 1 : begin - 1 + len(own)] != own:
            raise ValueError(
                f"The tokens of {word!r} are not found in {text!r}, where they should be. Call the class by "
                "plain words with blanks between."
            )
        end = begin + len(own)
        counted = [end - 1] if self.tokens == "last" else list(range(begin, end))
        if self.ing and re.match(r"\s+\w*ing\b", rest):
            counted.append(end + self.ing_offset)
        last_word = len(token_ids(tokenizer, word.split()[-1]))
        return Prompt(text, tuple(counted), tuple(range(end - last_word, end)))

    def encode(self, diffusion: StableDiffusion, prompts: list[Prompt], keep: bool = True) -> Tensor:
        """Emphasised text embeddings [N, tokens, width].

        Args:
            keep: the encodings, for the next image; not worth their memory if a caption changes each prompt.
        """
        [empty] = diffusion.encode_text([""])
        encoded = diffusion.encode_text([prompt.text for prompt in prompts], keep)
        rows = zip(encoded, prompts, strict=True)
        return torch.stack([emphasize(row, empty, one.emphasized, self.emphasis) for row, one in rows])


def token_ids(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    """Ids of a text's tokens without begin and end."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def check_word(tokenizer: CLIPTokenizer, word: str, own: list[int]) -> None:
    """Refuse a name without tokens, and one that a model of few words would read as fragments.

    A tokenizer whose config says `closed_vocabulary` has a token for each word that its model has ever read.

    Raises:
        ValueError: names the word, and the nearest that the model knows.
    """
    if not own:
        raise ValueError(f"A class needs a name: found {word!r}. Write a word for each class.")
    if not tokenizer.init_kwargs.get("closed_vocabulary"):
        return
    for part in word.split():
        if len(token_ids(tokenizer, part)) > 1:
            known = [token.removesuffix("</w>") for token in tokenizer.get_vocab() if token.endswith("</w>")]
            words = [name for name in known if len(name) > 1]
            near = get_close_matches(part, words, 1, cutoff=0.6)
            hint = f"Did you mean {near[0]!r}?" if near else f"It knows {', '.join(sorted(words))}."
            raise ValueError(f"This model has never read the word {part!r} (of {word!r}). {hint}")


def continuation(caption: str, start: str) -> str:
    """What a caption goes on with after its first words, without a suffix glued to the last of them.

    Raises:
        ValueError: the caption begins with other words.
    """
    if not caption.lower().startswith(start.lower()):
        raise ValueError(
            f"A caption has to begin with the prompt {start!r}: found {caption!r}. Take captions that were "
            "made with this prefix."
        )
    return re.sub(r"^\w+", "", caption[len(start) :]).rstrip()
