"""The pictures the mini diffusion model is trained on: rendered once by all cores, kept in one file."""

from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datamodules.mini_world.objects import render_objects
from datamodules.mini_world.street import render_street
from functional.classes import DELIVER11

STREET_SCENES, SENSOR_SCENES, OBJECT_SCENES = 3000, 600, 6000
STYLES = ("real", "game")


def depth_picture(depth: np.ndarray) -> np.ndarray:
    """Metric depth [H, W] to grey [H, W, 3] uint8, logarithmic from 1 to 100 m."""
    grey = np.log(np.clip(depth, 1, 100)) / np.log(100) * 255
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)


def street_picture(index: int) -> np.ndarray:
    return render_street("train", index, style=STYLES[index % 2])["rgb"]


def sensor_picture(index: int) -> np.ndarray:
    """In turn depth, infrared, event and the label in its palette colours: what MADM encodes besides photographs."""
    kind = ("depth", "infrared", "event", "label")[index % 4]
    scene = render_street("train", index, sensors=() if kind == "label" else (kind,))
    if kind == "depth":
        return depth_picture(scene["depth"])
    if kind == "label":
        return np.array(DELIVER11.colors, np.uint8)[scene["label"]]
    return np.repeat(scene[kind][..., None], 3, axis=-1) if scene[kind].ndim == 2 else scene[kind]


def object_picture(index: int) -> np.ndarray:
    return render_objects("train", index)["rgb"]


def render_all(function, count: int, description: str, processes: int = 2) -> list:
    """function(0), ..., function(count - 1), by several processes; a scene does not depend on who draws it."""
    with get_context("spawn").Pool(processes) as pool:
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
        """Random crops [B, 3, size, size] in [0, 1]: 45 % objects, 37 % street, 18 % other sensors and palettes."""
        crops = []
        for kind in generator.choice(3, size=batch, p=(0.45, 0.37, 0.18)):
            pictures = (self.objects, self.street, self.sensor)[kind]
            picture = pictures[generator.integers(len(pictures))]
            side = (
                size
                if kind == 0 or generator.random() < 0.6
                else int(generator.integers(size, picture.shape[0] + 1))
            )
            top, left = generator.integers(0, picture.shape[0] - side + 1, size=2)
            crop = picture[top : top + side, left : left + side]
            crops.append(
                cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA) if side != size else crop
            )
        return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float().div(255)


def vae_images(path: Path, seed: int) -> VaeImages:
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


# ---------------------------------------------------------------------------------------------------- captioned scenes


def captioned_object(index: int, captions: int) -> tuple[np.ndarray, list[str]]:
    """Picture [64, 64, 3] and several captions of it."""
    from datamodules.mini_world.captions import object_caption

    scene, rng = render_objects("train", index), np.random.default_rng((1, index))
    return scene["rgb"], [object_caption(scene["caption_facts"], rng) for _ in range(captions)]


def captioned_street(index: int, captions: int, size: int = 64) -> dict:
    """A whole street scene [128, 128, 3], two crops [size, size, 3] of it, and captions of each by what it shows."""
    from datamodules.mini_world.captions import street_caption

    rng = np.random.default_rng((2, index))
    scene = render_street("train", index, style=STYLES[index % 2])
    image, label = scene["rgb"], scene["label"]

    def describe(part: np.ndarray) -> list[str]:
        share = np.bincount(part.ravel(), minlength=len(DELIVER11)) / part.size
        present = [name for name, s in zip(DELIVER11.names, share, strict=True) if s >= 0.004]
        return [street_caption(scene["caption_facts"], rng, present) for _ in range(captions)]

    crops = []
    for _ in range(2):
        side = int(rng.integers(size, image.shape[0] + 1))
        top, left = rng.integers(0, image.shape[0] - side + 1, size=2)
        window = np.s_[top : top + side, left : left + side]
        crops.append(
            (cv2.resize(image[window], (size, size), interpolation=cv2.INTER_AREA), describe(label[window]))
        )
    return {"image": image, "captions": describe(label), "crops": crops}


def captioned_scenes(scenes: int, captions: int = 4) -> dict[str, list[tuple[np.ndarray, list[str]]]]:
    """`scenes` object scenes and as many street crops (64 px), and a quarter as many whole street scenes (128 px)."""
    objects = render_all(partial(captioned_object, captions=captions), scenes, "object scenes")
    street = render_all(partial(captioned_street, captions=captions), (scenes + 1) // 2, "street scenes")
    crops = [crop for scene in street for crop in scene["crops"]]
    whole = [(scene["image"], scene["captions"]) for scene in street[: (scenes + 3) // 4]]
    return {"objects": objects, "crops": crops, "whole": whole}
