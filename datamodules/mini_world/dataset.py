"""The mini world as datasets: street scenes of one sensor and style, and object scenes, drawn on demand."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from datamodules.mini_world.captions import named_classes, object_caption, street_caption
from datamodules.mini_world.objects import CATEGORIES, render_objects
from datamodules.mini_world.scene import SPLITS, generator
from datamodules.mini_world.street import CONDITIONS, MODALITIES, STYLES, render_street

FARTHEST = 100.0  # metres at grey value 255 of a depth picture; 1 metre is 0


class RenderedDataset(Dataset, ABC):
    """Samples {"image": uint8 [S, S, 3], "label": uint8 [S, S], "name": str, "caption": str}.

    A sample is drawn when it is first asked for and then kept in memory (four bytes a pixel), so that later
    passes cost nothing. Arrays are the kept ones: copy before changing them.

    Args:
        split: "train", "val" or "test"; they share no scene.
        length: number of scenes.
        size: side in pixels, 64..512.
        offset: index of the first scene, so that two datasets of one split need not share scenes.

    Raises:
        ValueError: a value out of range; so do the subclasses.
    """

    label_map = np.arange(256, dtype=np.uint8)  # labels are drawn in the ids of the class table

    def __init__(self, split: str, length: int, size: int, offset: int = 0):
        if split not in SPLITS or length < 1 or offset < 0 or not 64 <= size <= 512:
            raise ValueError(
                f"The mini world has no {length} scenes of split {split!r}, size {size} and offset {offset}: "
                f"choose a split of {', '.join(SPLITS)}, a length >= 1, a size of 64..512, an offset >= 0."
            )
        self.split, self.length, self.size, self.offset = split, length, size, offset
        self.label_names = [f"{split}-{offset + i:06d}-{size}px" for i in range(length)]
        self.kept: dict[int, dict] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: int) -> dict:
        if not 0 <= item < self.length:
            raise IndexError(f"Sample {item} of a dataset of {self.length}.")
        if item not in self.kept:
            self.kept[item] = self.render(self.offset + item)
        return dict(self.kept[item])

    def read_label(self, item: int) -> np.ndarray:
        """Return the label of a sample, uint8 [S, S]."""
        return self[item]["label"]

    @abstractmethod
    def render(self, index: int) -> dict:
        """Draw the sample of this scene."""


class MiniStreetDataset(RenderedDataset):
    """Street scenes with the 11 classes of deliver11; size 128 is native.

    Depth is shown on a log scale, 1 m black to 100 m white; depth and infrared repeat grey in three channels.

    Args:
        split, length, size, offset: see RenderedDataset.
        style: "game" (synthetic source) or "real" (target); changes colour images only.
        conditions: scenes take these in turn; None leaves each scene its own (day 40 %, the others 15 %).
        modality: "rgb", "depth", "infrared" or "event".
    """

    def __init__(
        self,
        split: str,
        length: int,
        style: str = "real",
        conditions: Sequence[str] | None = None,
        modality: str = "rgb",
        size: int = 128,
        offset: int = 0,
    ):
        super().__init__(split, length, size, offset)
        _check_choice("style", [style], STYLES)
        _check_choice("modality", [modality], MODALITIES)
        if conditions is not None:
            _check_choice("conditions", conditions, CONDITIONS)
        self.style, self.conditions, self.modality = style, conditions, modality

    def read_label(self, item: int) -> np.ndarray:
        """Return the label of a sample, uint8 [S, S]; the image, most of the work, is not drawn."""
        return render_street(self.split, self.offset + item, size=self.size, sensors=())["label"]

    def render(self, index: int) -> dict:
        condition = None if self.conditions is None else self.conditions[index % len(self.conditions)]
        scene = render_street(
            self.split,
            index,
            size=self.size,
            style=self.style,
            condition=condition,
            sensors=(self.modality,),
        )
        image, label = scene[self.modality], scene["label"]
        if self.modality == "depth":
            image = np.rint(np.clip(np.log(image) / np.log(FARTHEST), 0, 1) * 255).astype(np.uint8)
        if image.ndim == 2:
            image = np.repeat(image[..., None], 3, axis=2)
        rng = generator(self.split, index, "caption")
        return {
            "image": image,
            "label": label,
            "name": f"street-{self.split}-{index:06d}-{scene['condition']}",
            "caption": street_caption(scene["caption_facts"], rng, named_classes(label)),
        }


class MiniObjectsDataset(RenderedDataset):
    """Object scenes with the classes of mini_objects (0 is the background); size 64 is native.

    Args:
        split, length, size, offset: see RenderedDataset.
        categories: what may be drawn; the label's ids stay those of the whole table.
    """

    def __init__(
        self,
        split: str,
        length: int,
        size: int = 64,
        categories: Sequence[str] = CATEGORIES,
        offset: int = 0,
    ):
        super().__init__(split, length, size, offset)
        _check_choice("categories", categories, CATEGORIES)
        self.categories = tuple(categories)

    def render(self, index: int) -> dict:
        scene = render_objects(self.split, index, size=self.size, categories=self.categories)
        rng = generator(self.split, index, "object caption")
        return {
            "image": scene["rgb"],
            "label": scene["label"],
            "name": f"objects-{self.split}-{index:06d}",
            "caption": object_caption(scene["caption_facts"], rng),
        }


def _check_choice(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in given if name not in known]
    if isinstance(given, str) or unknown or not given:
        raise ValueError(
            f"The mini world cannot take {unknown or given!r} as {option}: choose of {', '.join(known)}."
        )
