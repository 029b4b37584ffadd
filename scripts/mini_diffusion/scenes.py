"""The pictures the mini diffusion model is trained on: rendered once, by several processes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datamodules.mini_world.captions import named_classes, object_caption, street_caption
from datamodules.mini_world.dataset import MiniStreetDataset
from datamodules.mini_world.objects import render_objects
from datamodules.mini_world.street import render_street
from functional.classes import DELIVER11

STREET_SCENES, SENSOR_SCENES, OBJECT_SCENES = 3000, 600, 6000
STYLES = ("real", "game")
CROP = 64  # side of a street crop
OBJECT_CAPTIONS, STREET_CAPTIONS = 8, 4  # of each picture


def to_tensor(pictures: Sequence[np.ndarray]) -> Tensor:
    """uint8 [H, W, 3] pictures to [N, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def street_picture(index: int) -> np.ndarray:
    """Scene [128, 128, 3]; the two styles take turns."""
    return render_street("train", index, style=STYLES[index % 2])["rgb"]


def sensor_picture(index: int) -> np.ndarray:
    """In turn depth, infrared, event and the label in its palette, [128, 128, 3]: MADM encodes them all."""
    kind = ("depth", "infrared", "event", "label")[index % 4]
    if kind == "label":
        return np.array(DELIVER11.colors, np.uint8)[render_street("train", index, sensors=())["label"]]
    return MiniStreetDataset("train", index + 1, modality=kind)[index]["image"]


def object_picture(index: int) -> np.ndarray:
    """Object scene [64, 64, 3]."""
    return render_objects("train", index)["rgb"]


def render_all(function, count: int, description: str) -> list:
    """function(0), ..., function(count - 1), by two processes; a scene does not depend on who draws it."""
    with get_context("spawn").Pool(2) as pool:
        return list(
            tqdm(pool.imap(function, range(count), chunksize=32), total=count, desc=description, unit="scene")
        )


@dataclass
class VaeImages:
    """uint8 pictures [N, H, W, 3] of the three kinds."""

    street: np.ndarray
    sensor: np.ndarray
    objects: np.ndarray

    def crops(self, generator: np.random.Generator, batch: int, size: int) -> Tensor:
        """Random crops [B, 3, size, size] in [0, 1]: 45 % objects, 37 % street, 18 % sensors and palettes."""
        crops = []
        for kind in generator.choice(3, size=batch, p=(0.45, 0.37, 0.18)):
            pictures = (self.objects, self.street, self.sensor)[kind]
            picture = pictures[generator.integers(len(pictures))]
            side = size
            if kind > 0 and generator.random() >= 0.6:  # street scenes also shrunk: a wider view
                side = int(generator.integers(size, picture.shape[0] + 1))
            top, left = generator.integers(0, picture.shape[0] - side + 1, size=2)
            crop = picture[top : top + side, left : left + side]
            if side != size:
                crop = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA)
            crops.append(crop)
        return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float().div(255)


def vae_images(path: Path) -> VaeImages:
    """Render the pictures, or read them from `path` where an earlier run left them."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {
            "street": np.stack(render_all(street_picture, STREET_SCENES, "street scenes")),
            "sensor": np.stack(render_all(sensor_picture, SENSOR_SCENES, "sensor scenes")),
            "objects": np.stack(render_all(object_picture, OBJECT_SCENES, "object scenes")),
        }
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, **arrays)
        temporary.replace(path)
    with np.load(path, allow_pickle=False) as arrays:
        return VaeImages(**{kind: arrays[kind] for kind in ("street", "sensor", "objects")})


# ------------------------------------------------------------------------------------------- captioned scenes


def labelled_object(index: int, captions: int) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Picture [64, 64, 3] of an object scene, several captions of it, and its label [64, 64]."""
    scene, rng = render_objects("train", index), np.random.default_rng((1, index))
    sentences = [object_caption(scene["caption_facts"], rng) for _ in range(captions)]
    return scene["rgb"], sentences, scene["label"]


def captioned_object(index: int, captions: int) -> tuple[np.ndarray, list[str]]:
    """Picture [64, 64, 3] and several captions of it."""
    return labelled_object(index, captions)[:2]


def captioned_street(index: int, captions: int) -> dict:
    """A street scene, two crops of it, and captions of each by what it shows.

    Returns:
        "image" [128, 128, 3], its "captions", and "crops", pairs of a picture [64, 64, 3] and its captions.
    """
    rng = np.random.default_rng((2, index))
    scene = render_street("train", index, style=STYLES[index % 2])
    image, label = scene["rgb"], scene["label"]

    def describe(part: np.ndarray) -> list[str]:
        present = named_classes(part)
        return [street_caption(scene["caption_facts"], rng, present) for _ in range(captions)]

    crops = []
    for _ in range(2):
        side = int(rng.integers(CROP, image.shape[0] + 1))
        top, left = rng.integers(0, image.shape[0] - side + 1, size=2)
        window = np.s_[top : top + side, left : left + side]
        picture = cv2.resize(image[window], (CROP, CROP), interpolation=cv2.INTER_AREA)
        crops.append((picture, describe(label[window])))
    return {"image": image, "captions": describe(label), "crops": crops}


def sensor_crop(index: int, captions: int) -> tuple[np.ndarray, list[str]]:
    """A crop [64, 64, 3] of a depth, infrared or event image, in turn, with empty captions.

    Stable Diffusion has seen pictures of all kinds. Nothing is said of these, so that no label of a sensor
    enters what is later adapted to it.
    """
    rng, kind = np.random.default_rng((3, index)), ("depth", "infrared", "event")[index % 3]
    picture = MiniStreetDataset("train", index + 1, modality=kind)[index]["image"]
    top, left = rng.integers(0, picture.shape[0] - CROP + 1, size=2)
    return picture[top : top + CROP, left : left + CROP], [""] * captions


def scenes_digest() -> str:
    """A name for how scenes and captions are drawn: it changes with most changes of either."""
    first = [captioned_object(i, OBJECT_CAPTIONS) for i in range(8)]
    first += [captioned_street(0, STREET_CAPTIONS)["crops"][0], *(sensor_crop(i, 1) for i in range(3))]
    digest = hashlib.sha256()
    for picture, captions in first:
        digest.update(picture.tobytes() + "\n".join(captions).encode())
    return digest.hexdigest()[:12]


def captioned_scenes(scenes: int) -> dict[str, list[tuple[np.ndarray, list[str]]]]:
    """`scenes` object scenes, a quarter as many street and sensor crops, a sixteenth whole streets."""
    objects = render_all(partial(captioned_object, captions=OBJECT_CAPTIONS), scenes, "object scenes")
    draw_street = partial(captioned_street, captions=STREET_CAPTIONS)
    street = render_all(draw_street, (scenes + 7) // 8, "street scenes")
    sensors = render_all(partial(sensor_crop, captions=1), (scenes + 3) // 4, "sensor crops")
    crops = [crop for scene in street for crop in scene["crops"]]
    whole = [(scene["image"], scene["captions"]) for scene in street[: (scenes + 15) // 16]]
    return {"objects": objects, "crops": crops, "sensors": sensors, "whole": whole}


def labelled_scenes(scenes: int) -> list[tuple[np.ndarray, list[str], np.ndarray]]:
    """Object scenes with captions and label."""
    return render_all(partial(labelled_object, captions=OBJECT_CAPTIONS), scenes, "object scenes")
