"""Geometry of a street scene: a pinhole camera and flat layers in metres, painted far to near.

Every layer is a polygon on a plane whose inverse depth is linear in the image (1 / z = a x + b y + c), so one
table row per layer and one map of layer numbers give exact label, depth and texture coordinates at any size.
World axes: X right, Y up from the ground, Z forward (metres). Image units: the scene is 128 units wide at
every size. Nothing here knows the condition or the style, which is why both leave the label untouched.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b

import cv2
import numpy as np

from functional.classes import DELIVER11

SKY, BUILDING, FENCE, PERSON, POLE, ROAD, SIDEWALK, VEGETATION, CAR, WALL, SIGN = range(len(DELIVER11))
SPLITS = ("train", "val", "test")
FOCAL = 110.0  # in image units
SKY_DEPTH, FAR_DEPTH, NEAR_DEPTH = 200.0, 150.0, 0.5

# How a layer lies: decides its texture coordinates and how much light it gets.
FACE_SKY, FACE_GROUND, FACE_LEFT, FACE_RIGHT, FACE_FRONT = range(5)
# What a layer is made of: decides texture and grain (materials.py).
PLAIN, AIR, ASPHALT, PAVING, GRASS, FACADE, PICKETS, BARS, BLOCKS, FOLIAGE, ROOF = range(11)
COLUMNS = ("a", "b", "c", "label", "face", "material", "red", "green", "blue", "heat", "glow", "variant")


def generator(split: str, index: int, purpose: str) -> np.random.Generator:
    """Random numbers that depend on nothing but these three values, in any process and order."""
    digest = blake2b(f"street/{split}/{index}/{purpose}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


@dataclass
class Scene:
    """Layers far to near, and the few numbers that textures and light need to know about the street."""

    camera_height: float
    vanish_x: float
    horizon: float
    road: tuple[float, float]  # X of the left and right edge
    crossing: tuple[float, float] | None  # Z where the side street begins and ends
    switches: dict[str, bool]
    points: list = field(default_factory=list)
    counts: list = field(default_factory=list)
    rows: list = field(default_factory=list)
    shadows: list = field(default_factory=list)  # (X, Z, half width, half length) of dark spots on the ground
    lamps: list = field(default_factory=list)  # (X, Z) of street lamps
    attributes: dict = field(default_factory=dict)  # class name -> word about the instance noted last
    numbers: dict = field(default_factory=dict)  # class name -> instances placed

    def _add(self, points, plane, label, face, material, color, heat, glow, variant):
        self.points.extend(points)
        self.counts.append(len(points))
        self.rows.append((*plane, label, face, material, *color, heat, glow, variant))

    def front(self, z, outline, label, color, material=PLAIN, heat=0.0, glow=0.0, variant=0.0):
        """Add a layer that faces the camera at depth z; outline: (X, Y) pairs."""
        points = [(x, y, z) for x, y in outline]
        self._add(points, (0.0, 0.0, 1 / z), label, FACE_FRONT, material, color, heat, glow, variant)

    def side(self, x, outline, label, color, material=PLAIN, heat=0.0, glow=0.0, variant=0.0):
        """Add a layer along the street at lateral position x; outline: (Z, Y) pairs."""
        points = [(x, y, z) for z, y in outline]
        plane = (1 / (FOCAL * x), 0.0, -self.vanish_x / (FOCAL * x))
        face = FACE_LEFT if x < 0 else FACE_RIGHT
        self._add(points, plane, label, face, material, color, heat, glow, variant)

    def ground(self, x0, x1, z0, z1, label, color, material, heat=0.0):
        """Add a rectangle of ground."""
        points = [(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)]
        scale = 1 / (FOCAL * self.camera_height)
        plane = (0.0, scale, -self.horizon * scale)
        self._add(points, plane, label, FACE_GROUND, material, color, heat, 0.0, 0.0)

    def nearest_visible(self, x: float, margin: float) -> float:
        """Smallest depth at which lateral position x is at least `margin` units inside the image."""
        return FOCAL * abs(x) / ((self.vanish_x if x < 0 else 128 - self.vanish_x) - margin)

    def describe(self, name: str, word: str):
        """Note an instance; the word of the last stays: of what stands in rows, the nearest on one side."""
        self.attributes[name] = word
        self.numbers[name] = self.numbers.get(name, 0) + 1


@lru_cache(maxsize=8)
def pixel_grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Image coordinates x and y of the pixel centres in 1/128 of the side, each float32 [size * size]."""
    line = (np.arange(size, dtype=np.float32) + 0.5) * (128 / size)
    return np.tile(line, size), np.repeat(line, size)


def project(scene: Scene, points: np.ndarray, size: int) -> np.ndarray:
    """World points [N, 3] to pixels as fixed-point numbers with 4 fractional bits, int32 [N, 2]."""
    scale = FOCAL / points[:, 2]
    x = scene.vanish_x + points[:, 0] * scale
    y = scene.horizon + (scene.camera_height - points[:, 1]) * scale
    pixels = np.stack([x, y], axis=1) * (size / 128) - 0.5
    return np.rint(np.clip(pixels, -20000, 20000) * 16).astype(np.int32)


def paint(scene: Scene, size: int) -> dict:
    """Paint all layers and return what each pixel shows, as flat arrays of size * size.

    Keys: the table columns (label uint8; face, material, heat, glow, variant), color float32 [N, 3], layer
    (number, intp), z (metres, sky 200), x and height (metres), u and v (texture coordinates in metres) and
    shadow (0..1, on the ground only).
    """
    pixels = project(scene, np.array(scene.points, dtype=np.float64), size)
    layers = np.zeros((size, size), dtype=np.int32)
    start = 0
    for number, count in enumerate(scene.counts):
        cv2.fillPoly(layers, [pixels[start : start + count]], number, cv2.LINE_8, 4)
        start += count
    layer = layers.ravel().astype(np.intp)

    table = np.array(scene.rows, dtype=np.float32)
    column = {name: table[:, i] for i, name in enumerate(COLUMNS)}
    out = {name: column[name].astype(np.uint8).take(layer) for name in ("label", "face", "material")}
    out |= {name: column[name].take(layer) for name in ("heat", "glow", "variant")}
    out["color"] = table[:, 6:9].take(layer, axis=0)
    xs, ys = pixel_grid(size)
    inverse = column["a"].take(layer) * xs + column["b"].take(layer) * ys + column["c"].take(layer)
    z = 1 / np.clip(inverse, 1 / FAR_DEPTH, 1 / NEAR_DEPTH)
    z[out["label"] == SKY] = SKY_DEPTH
    x = (xs - np.float32(scene.vanish_x)) * z / np.float32(FOCAL)
    height = np.float32(scene.camera_height) - (ys - np.float32(scene.horizon)) * z / np.float32(FOCAL)
    along = (out["face"] == FACE_LEFT) | (out["face"] == FACE_RIGHT)
    ground = out["face"] == FACE_GROUND
    out |= {"layer": layer, "z": z, "x": x, "height": height}
    out |= {
        "u": np.where(along, z, x),
        "v": np.where(ground, z, height),
        "shadow": _shadows(scene, size, ground),
    }
    return out


def _shadows(scene: Scene, size: int, ground: np.ndarray) -> np.ndarray:
    """Contact shadows: without them objects seem to float."""
    mask = np.zeros((size, size), dtype=np.uint8)
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    for x, z, half_width, half_length in scene.shadows:
        ring = [
            x + half_width * np.cos(angles),
            0 * angles,
            np.maximum(z + half_length * np.sin(angles), NEAR_DEPTH),
        ]
        cv2.fillPoly(mask, [project(scene, np.stack(ring, axis=1), size)], 1, cv2.LINE_8, 4)
    return (mask.ravel() * ground).astype(np.float32)
