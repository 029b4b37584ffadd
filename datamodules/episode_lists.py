"""Which images make an episode: lists of queries and supports by class, draws from them, frozen lists."""

import json
import os
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from datamodules.auxiliary import FewShotImages

Protocol = Literal["bam", "hsnet"]


class Episode(NamedTuple):
    """Indices of the query, the class looked for, and indices of real supports in the order of their use."""

    query: int
    class_id: int
    supports: tuple[int, ...]


class EpisodePool:
    """Queries, and for each class the images that can support it.

    "bam" walks over images and draws one of the query's classes, of whatever area; "hsnet" walks over pairs
    of image and class; with `by_class` it draws a class, then an image (its authors' way on COCO).

    Args:
        areas: see FewShotImages.
        classes: ids that may be looked for.
        protocol, by_class: as above.
        min_pixels: smallest area with which a class counts in lists (2 * 32 * 32 in BAM's code).
        shot: real supports of an episode; a class with no more images than this is left out.
        exclusive: leave out images that show any class besides `classes`, in whatever area.
        pairs: (image, class) in place of those that `min_pixels` gives.

    Raises:
        ValueError: no episode can be drawn.
    """

    def __init__(
        self,
        areas: Sequence[dict[int, int]],
        classes: Collection[int],
        protocol: Protocol,
        by_class: bool = False,
        min_pixels: int = 1,
        shot: int = 1,
        exclusive: bool = False,
        pairs: Sequence[tuple[int, int]] | None = None,
    ):
        if pairs is None:
            pairs = [(i, c) for i, found in enumerate(areas) for c in found if found[c] >= min_pixels]
        wanted = frozenset(classes)
        pairs = [(i, c) for i, c in pairs if c in wanted and not (exclusive and areas[i].keys() - wanted)]
        members: dict[int, list[int]] = {c: [] for c in sorted(wanted)}
        for image, c in pairs:
            members[c].append(image)
        self.supports = {c: np.array(found) for c, found in members.items() if len(found) > shot}
        listed = sorted({image for image, _ in pairs})
        present = {c for image in listed for c in areas[image]} & wanted
        self.rare = {c: len(members[c]) for c in sorted(present - self.supports.keys())}
        if protocol == "bam":
            queries = [(image, sorted(areas[image].keys() & self.supports.keys())) for image in listed]
        else:
            queries = [(image, [c]) for image, c in pairs if c in self.supports]
        self.queries = [query for query in queries if query[1]]
        self.by_class = by_class and protocol == "hsnet"
        if not self.queries:
            raise ValueError(
                f"No episodes can be drawn: found {len(listed)} images of {len(wanted)} classes of "
                f"{min_pixels} pixels or more, and no class with more than {shot}. Lower min_pixels or shot."
            )
        self.classes = np.array(list(self.supports))
        self.length = len({i for i, _ in self.queries}) if self.by_class else len(self.queries)

    def __len__(self) -> int:
        """Episodes in a pass: images, (image, class) pairs, or with by_class distinct images."""
        return self.length

    def draw(self, index: int, rng: np.random.Generator, count: int | None = None) -> Episode:
        """Draw the episode of a query: `count` different supports (None: all), none of them the query."""
        query, classes = self.queries[index % len(self.queries)]
        class_id = int(rng.choice(self.classes if self.by_class else classes))
        if self.by_class:
            query = int(rng.choice(self.supports[class_id]))
        members = self.supports[class_id]
        # All are permuted whatever the count, so that fewer supports are the first of more.
        order = rng.permutation(members[members != query])[:count]
        return Episode(query, class_id, tuple(order.tolist()))

    def pairs(self) -> list[tuple[int, int]]:
        """Return all (image, class) that can be supports."""
        return [(image, c) for c, images in self.supports.items() for image in images.tolist()]


def evaluation_episodes(pool: EpisodePool, number: int | None, seed: int, stored: int) -> list[Episode]:
    """Draw the episodes of an evaluation, each with a generator of (seed, its position).

    Args:
        number: of episodes, the queries coming again from the start if need be; None takes each query once.
        stored: most supports of an episode.
    """
    count = len(pool) if number is None else number
    return [pool.draw(i, np.random.default_rng([seed, i]), stored) for i in range(count)]


def warn_of_rare_classes(rare: dict[int, int], names: dict[int, str], shot: int, skip: bool) -> None:
    """Tell which classes have too few images for an episode and are left out.

    Raises:
        ValueError: there are some, and they may not be left out.
    """
    if not rare:
        return
    found = ", ".join(f"{names[c]} ({count})" for c, count in rare.items())
    what = f"Classes with too few images for episodes of {shot} + 1 images: found {found}"
    if not skip:
        raise ValueError(
            f"{what}. Set skip_rare: true to leave them out, lower a shot above 5, or add images."
        )
    warnings.warn(f"{what}. They are left out.", stacklevel=2)


def freeze_episodes(path: Path, header: dict, lists: dict[str, list[Episode]], images: dict) -> None:
    """Write lists of episodes as JSON; images are told by their names.

    Args:
        header: what the lists belong to.
        lists: by "val/<seed>" or "test/<seed>".
        images: FewShotImages by "val" and "test".
    """
    named = {}
    for key, episodes in lists.items():
        name = images[key.split("/")[0]].name
        named[key] = [[name(e.query), e.class_id, [name(index) for index in e.supports]] for e in episodes]
    write_json(path, {**header, "episodes": named})


def write_json(path: Path, document: dict) -> None:
    """Write a file whole or not at all; processes that write the same at once do not disturb each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(document) + "\n", "utf-8")
    os.replace(temporary, path)


def read_episodes(
    path: Path, header: dict, key: str, images: FewShotImages, classes: Collection[int], shot: int
) -> list[Episode]:
    """Read a list that freeze_episodes wrote.

    Raises:
        ValueError: the file is none, is of something else, or a query or support is not what it should be.
    """
    advice = "Correct the options, or remove the file and it is written again."
    try:
        found = json.loads(path.read_text("utf-8"))
        own = {name: found.get(name) for name in header}
        entries = [(query, c, list(supports)) for query, c, supports in found["episodes"].get(key, [])]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no list of episodes: found {error!r}. {advice}") from None
    if own != header or not entries:
        raise ValueError(
            f"{path} holds no episodes {key} of {header}: found lists {', '.join(found['episodes'])} of "
            f"{own}. {advice}"
        )
    index = {images.name(i): i for i in range(len(images))}
    for number, (query, c, supports) in enumerate(entries):
        known = c in classes and {query, *supports} <= index.keys()
        shown = known and all(c in images.areas[index[name]] for name in (query, *supports))
        if not shown or query in supports or len(set(supports)) < max(len(supports), shot):
            raise ValueError(
                f"{path}, {key}: episode {number} cannot be used: found query {query}, class {c}, supports "
                f"{supports}. It needs {shot} different images of a class of this fold. {advice}"
            )
    return [Episode(index[query], c, tuple(index[name] for name in found)) for query, c, found in entries]
