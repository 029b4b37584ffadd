"""What the scenes of the mini world say about themselves: one English sentence, drawn from a scene's facts.

Every word of every caption is in VOCABULARY, so that a tokenizer can give each a token of its own. Empty
captions (for guidance) are the business of the training that wants them.
"""

from collections.abc import Sequence

import numpy as np

from datamodules.mini_world.layout import CLOTHES, FACADES, FENCES, PAINTS, WALLS
from datamodules.mini_world.objects import BACKGROUNDS, CATEGORIES, COLORS
from functional.classes import DELIVER11

CONDITION_PHRASES = {
    "day": "by day",
    "night": "at night",
    "fog": "in fog",
    "rain": "in rain",
    "snow": "in snow",
}
SMALLEST_SHARE = 0.004  # of the picture that a class covers before a caption names it
_FILLER = ("a", "an", "photo", "of", "street", "with", "and", "in", "on")
_POLES_AND_SIGNS = ("tall", "short", "round", "triangular", "square")

VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        {
            *_FILLER,
            *_POLES_AND_SIGNS,
            *(word for phrase in CONDITION_PHRASES.values() for word in phrase.split()),
            *(word for name in DELIVER11.names for word in name.split()),
            *(word for words in (PAINTS, CLOTHES, FACADES, WALLS, FENCES) for word in words),
            *CATEGORIES,
            *COLORS,
            *BACKGROUNDS,
        }
    )
)


def named_classes(label: np.ndarray) -> list[str]:
    """The classes of deliver11 that a caption of this label [H, W] names: those that can be seen well."""
    share = np.bincount(label.ravel(), minlength=len(DELIVER11)) / label.size
    return [name for name, part in zip(DELIVER11.names, share, strict=True) if part >= SMALLEST_SHARE]


def street_caption(facts: dict, rng: np.random.Generator, present: Sequence[str]) -> str:
    """Describe a street scene or a crop of it.

    22 % of the captions name one class ("a photo of a red car at night"), 17 % two to four, the others all
    that are present, in random order; the condition is said in 40 % of the first kind and 80 % of the last.

    Args:
        facts: "caption_facts" of render_street.
        rng: draws the form of the sentence.
        present: names of the classes that are to be seen, best those of named_classes.
    """
    condition = CONDITION_PHRASES[facts["condition"]]
    if not present:
        return f"a photo of a street {condition}"
    names = [present[i] for i in rng.permutation(len(present))]
    form = rng.random()
    if form < 0.22 or len(names) == 1:
        thing = _street_thing(names[0], facts["attributes"], rng)
        return f"a photo of {article(thing)}" + (f" {condition}" if rng.random() < 0.4 else "")
    if form < 0.39:
        names = names[: int(rng.integers(2, 5))]
        whole_street = False
    else:
        whole_street = rng.random() < 0.8
    things = _join([_street_thing(name, facts["attributes"], rng) for name in names])
    return f"a photo of a street {condition} with {things}" if whole_street else f"a photo of {things}"


def object_caption(facts: dict, rng: np.random.Generator) -> str:
    """Describe an object scene: "a photo of a red mug and a fish on grass".

    Each colour is named with probability .6 and the background with .7; in 15 % only one object is named.

    Args:
        facts: "caption_facts" of render_objects.
        rng: draws the form of the sentence.
    """
    objects = [facts["objects"][i] for i in rng.permutation(len(facts["objects"]))]
    if rng.random() < 0.15:
        objects = objects[:1]
    things = [
        article(f"{color} {category}" if rng.random() < 0.6 else category) for category, color in objects
    ]
    ground = f" on {facts['background']}" if rng.random() < 0.7 else ""
    return f"a photo of {_join(things)}{ground}"


def _street_thing(name: str, attributes: dict[str, str], rng: np.random.Generator) -> str:
    if name not in attributes or rng.random() < 0.5:
        return name
    return f"person in {attributes[name]}" if name == "person" else f"{attributes[name]} {name}"


def article(thing: str) -> str:
    """A thing with "a" or "an" before it."""
    return f"an {thing}" if thing[0] in "aeiou" else f"a {thing}"


def _join(things: list[str]) -> str:
    return things[0] if len(things) == 1 else f"{', '.join(things[:-1])} and {things[-1]}"
