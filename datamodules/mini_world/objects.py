"""Object scenes of the mini world: one to three coloured objects on a textured ground, with exact label.

Everything is a pure function of (split, index, options). The geometry is in units of the side, so a scene is
the same at every size.
"""

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import cv2
import numpy as np

from datamodules.mini_world.scene import SPLITS
from datamodules.mini_world.shapes import SHAPES
from functional.classes import MINI_FOLDS, MINI_RESERVE

CATEGORIES: tuple[str, ...] = tuple(SHAPES)

FOLDS, RESERVE = MINI_FOLDS, MINI_RESERVE

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 38, 36),
    "orange": (246, 140, 28),
    "yellow": (246, 218, 44),
    "green": (40, 150, 60),
    "blue": (40, 84, 214),
    "purple": (140, 56, 180),
    "pink": (248, 140, 190),
    "white": (238, 238, 238),
    "black": (34, 34, 38),
}

# Dark end, middle and light end of the colour ramp of each ground.
_RAMPS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "grass": ((36, 84, 28), (70, 138, 48), (118, 178, 74)),
    "sand": ((186, 156, 102), (222, 194, 140), (240, 220, 176)),
    "water": ((22, 66, 132), (48, 116, 190), (142, 196, 234)),
    "snow": ((190, 204, 226), (226, 234, 246), (252, 253, 255)),
    "brick": ((118, 48, 38), (176, 86, 66), (206, 192, 178)),
    "wood": ((86, 54, 30), (142, 96, 54), (184, 136, 86)),
}
# The object colour that could not be told from the ground and is therefore not drawn on it.
VANISHING = {
    "grass": "green",
    "sand": "yellow",
    "water": "blue",
    "snow": "white",
    "brick": "red",
    "wood": "orange",
}
BACKGROUNDS: tuple[str, ...] = tuple(_RAMPS)

_COUNT_WEIGHTS = (0.45, 0.45, 0.10)
# Smallest and largest radius of an object, in units of the side, by the number of objects in the scene.
_RADII = {1: (0.26, 0.42), 2: (0.18, 0.26), 3: (0.15, 0.20)}


def render_objects(
    split: str,
    index: int,
    *,
    size: int = 64,
    categories: Sequence[str] = CATEGORIES,
    count: int | None = None,
) -> dict:
    """Draw one object scene.

    Args:
        split, index: name the scene; scenes of different splits are never the same.
        size: side in pixels, 64..512.
        categories: names that may be drawn; a scene holds no category twice while there are enough of them.
        count: number of objects, 1..3; None draws it (45 %, 45 %, 10 %).

    Returns:
        rgb uint8 [S, S, 3]; label uint8 [S, S], 0 background and 1 + CATEGORIES.index(name); objects, a list
        of (category, color), largest first; caption_facts {"objects": the same list, "background": name}.

    Raises:
        ValueError: unknown split or category, negative index, or a size or count out of range.
    """
    _check(split, index, size, categories, count)
    digest = blake2b(f"objects/{split}/{index}".encode(), digest_size=16).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
    drawn_count = 1 + int(np.searchsorted(np.cumsum(_COUNT_WEIGHTS)[:-1], rng.random()))
    count = count or drawn_count
    background = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    colors = [name for name in COLORS if name != VANISHING[background]]
    names = [categories[i] for i in rng.choice(len(categories), count, replace=count > len(categories))]
    objects = [(name, colors[int(rng.integers(len(colors)))]) for name in names]
    centres, radii = _place(rng, count)
    poses = [_pose(rng, centre, radius) for centre, radius in zip(centres, radii, strict=True)]
    parts, owner = _draw_parts(objects, poses, 2 * size)

    tints = np.zeros((256, 1, 3), np.uint8)
    tints[1 : len(owner), 0] = np.concatenate([_part_colors(name, COLORS[color]) for name, color in objects])
    tone = _TEXTURES[background](rng, 2 * size)
    ground = cv2.applyColorMap(np.clip(tone * 255, 0, 255).astype(np.uint8), _ramp(background))
    picture = cv2.copyTo(cv2.applyColorMap(parts, tints), parts, ground)
    rgb = cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32)
    rgb *= _light(rng, size)[..., None]
    rgb += _grain(rng, size)
    return {
        "rgb": np.clip(rgb, 0, 255).astype(np.uint8),
        "label": _label(parts, owner, size),
        "objects": objects,
        "caption_facts": {"objects": objects, "background": background},
    }


def _check(split: str, index: int, size: int, categories: Sequence[str], count: int | None) -> None:
    if split not in SPLITS or index < 0 or not 64 <= size <= 512 or count not in (None, 1, 2, 3):
        raise ValueError(
            f"No object scene with split {split!r}, index {index}, size {size} and count {count}: choose a "
            f"split of {', '.join(SPLITS)}, an index >= 0, a size of 64..512 and a count of 1..3 or None."
        )
    unknown = [name for name in categories if name not in SHAPES]
    if isinstance(categories, str) or unknown or not categories:
        raise ValueError(
            f"Unknown object categories {categories!r}: give a list of names out of {', '.join(CATEGORIES)}."
        )


def _place(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres [count, 2] and radii [count] in units of the side, that overlap as little as 24 tries allow."""
    radii = np.sort(rng.uniform(*_RADII[count], count))[::-1]
    room = 0.5 - 0.92 * radii[:, None]
    centres = 0.5 + rng.uniform(-1, 1, (24, count, 2)) * room
    if count == 1:
        return centres[0], radii
    first, second = ([0], [1]) if count == 2 else ([0, 0, 1], [1, 2, 2])
    distance = np.linalg.norm(centres[:, first] - centres[:, second], axis=-1)
    gap = (distance - radii[first] - radii[second]).min(1)
    fits = np.flatnonzero(gap >= 0)
    return centres[fits[0] if len(fits) else gap.argmax()], radii


def _pose(rng: np.random.Generator, centre: np.ndarray, radius: float) -> np.ndarray:
    """Affine map [2, 3] from the object's frame to the unit square: stretch, shear, flip, turn, shift."""
    angle, stretch, shear = rng.uniform(-0.35, 0.35), rng.uniform(0.88, 1.0), rng.uniform(-0.12, 0.12)
    flip = 1.0 if rng.random() < 0.5 else -1.0
    shape = np.array([[flip, shear], [0.0, 1.0]]) * ((stretch,), (1.0,))
    cos, sin = np.cos(angle), np.sin(angle)
    return np.column_stack([radius * np.array([[cos, -sin], [sin, cos]]) @ shape, centre])


@lru_cache(maxsize=1)
def _outlines() -> dict[str, tuple[np.ndarray, list[list[int]]]]:
    """Per category: all its points [N, 2], and how many of them each contour of each part has."""
    return {
        name: (
            np.concatenate([contour for _, contours in parts for contour in contours]),
            [[len(contour) for contour in contours] for _, contours in parts],
        )
        for name, parts in SHAPES.items()
    }


def _draw_parts(objects, poses, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Part ids uint8 [side, side] (0 ground, counting over all objects), and the label of each part id."""
    canvas, owner = np.zeros((side, side), np.uint8), [0]
    for (name, _), pose in zip(objects, poses, strict=True):
        points, parts = _outlines()[name]
        # OpenCV takes fixed-point coordinates with 4 fractional bits; a pixel's centre is a whole number.
        fixed = np.rint(((points @ pose[:, :2].T + pose[:, 2]) * side - 0.5) * 16).astype(np.int32)
        at = 0
        for lengths in parts:
            contours = []
            for length in lengths:
                contours.append(fixed[at : at + length])
                at += length
            cv2.fillPoly(canvas, contours, len(owner), lineType=cv2.LINE_8, shift=4)
            owner.append(1 + CATEGORIES.index(name))
    return canvas, np.array(owner, np.uint8)


def _part_colors(name: str, color: tuple[int, int, int]) -> np.ndarray:
    base = np.array(color, float)
    tones = np.array([tone for tone, _ in SHAPES[name]])[:, None]
    # Black cannot get darker and white not lighter: such parts become grey, or eyes and spots would be lost.
    dark = base * tones if max(color) > 60 else base + 110 * (1 - tones)
    light = base + (255 - base) * (tones - 1) * 0.85 if min(color) < 200 else base * (1.2 - 0.2 * tones)
    return np.where(tones <= 1, dark, light)


def _label(parts: np.ndarray, owner: np.ndarray, size: int) -> np.ndarray:
    """Class of each pixel: the one that covers at least half of it, from the drawing at twice the size."""
    classes, label = owner[parts], np.zeros((size, size), np.uint8)
    for value in set(owner[1:].tolist()):
        cover = cv2.resize(
            (classes == value).view(np.uint8) * 255, (size, size), interpolation=cv2.INTER_AREA
        )
        label[cover >= 127] = value
    return label


@lru_cache(maxsize=1)
def _noise_bank() -> np.ndarray:
    return np.random.Generator(np.random.PCG64(1)).standard_normal((1024, 1024), dtype=np.float32)


def _noise(rng: np.random.Generator, columns: int, rows: int, side: int) -> np.ndarray:
    """Smooth noise float32 [side, side] of unit scale, with so many cells across and down."""
    x, y = rng.integers(0, 1024 - columns), rng.integers(0, 1024 - rows)
    cells = _noise_bank()[y : y + rows, x : x + columns]
    return cv2.resize(cells, (side, side), interpolation=cv2.INTER_LINEAR)


def _light(rng: np.random.Generator, size: int) -> np.ndarray:
    """Brightness factor [size, size]: exposure and a soft slope across the picture."""
    level, across, down = (
        np.float32(rng.uniform(*span)) for span in ((0.86, 1.08), (-0.2, 0.2), (-0.2, 0.2))
    )
    x, y = _axes(size)
    return (level - (across + down) / 2) + across * x + down * y


def _grain(rng: np.random.Generator, size: int) -> np.ndarray:
    x, y = rng.integers(0, 1024 - size, 2)
    return 3.0 * _noise_bank()[y : y + size, x : x + size, None]


@lru_cache(maxsize=8)
def _axes(side: int) -> tuple[np.ndarray, np.ndarray]:
    axis = ((np.arange(side, dtype=np.float32) + 0.5) / side)[None]
    return np.ascontiguousarray(axis), np.ascontiguousarray(axis.T)


@lru_cache(maxsize=len(_RAMPS))
def _ramp(name: str) -> np.ndarray:
    stops = np.array(_RAMPS[name], float)
    at = np.linspace(0, 1, 256)
    return np.stack([np.interp(at, (0, 0.5, 1), stops[:, c]) for c in range(3)], 1).astype(np.uint8)[:, None]


def _grass(rng, side):
    return (
        0.5
        + 0.08 * _noise(rng, 7, 7, side)
        + 0.13 * _noise(rng, 64, 20, side)
        + 0.05 * _noise(rng, 40, 40, side)
    )


def _sand(rng, side):
    x, y = _axes(side)
    phase = 2 * np.pi * (rng.uniform(5, 8) * y + rng.uniform(-2, 2) * x) + 0.9 * _noise(rng, 6, 6, side)
    return 0.5 + 0.09 * np.sin(phase) + 0.11 * _noise(rng, 90, 90, side) + 0.05 * _noise(rng, 6, 6, side)


def _water(rng, side):
    x, y = _axes(side)
    phase = 2 * np.pi * (rng.uniform(6, 9) * y + rng.uniform(-0.6, 0.6) * x) + 1.5 * _noise(rng, 9, 9, side)
    return 0.42 + 0.22 * np.sin(phase) + 0.1 * _noise(rng, 8, 30, side)


def _snow(rng, side):
    return 0.6 + 0.16 * _noise(rng, 6, 5, side) + 0.07 * _noise(rng, 70, 70, side)


def _brick(rng, side):
    x, y = _axes(side)
    rows, columns = int(rng.integers(7, 10)), int(rng.integers(3, 6))
    v = y * rows + rng.random(dtype=np.float32)
    row = np.floor(v)
    u = x * columns + 0.5 * (row % 2) + rng.random(dtype=np.float32)
    tones = rng.random((16, 16), dtype=np.float32)
    tone = 0.24 + 0.3 * tones[row.astype(np.int8) % 16, np.floor(u).astype(np.int8) % 16]
    tone += 0.05 * _noise(rng, 50, 50, side)
    return np.where(((v - row) < 0.14) | ((u - np.floor(u)) < 0.07), np.float32(0.92), tone)


def _wood(rng, side):
    _, y = _axes(side)
    planks = int(rng.integers(3, 6))
    v = y * planks + rng.random(dtype=np.float32)
    plank = np.floor(v)
    tones = rng.random(16, dtype=np.float32)[plank.astype(np.int8) % 16]
    rings = np.sin(2 * np.pi * (3 * v + tones * 7) + 1.2 * _noise(rng, 3, 24, side))
    tone = 0.32 + 0.35 * tones + 0.1 * rings + 0.06 * _noise(rng, 8, 80, side)
    return np.where((v - plank) < 0.06, np.float32(0.02), tone)


_TEXTURES = {"grass": _grass, "sand": _sand, "water": _water, "snow": _snow, "brick": _brick, "wood": _wood}
