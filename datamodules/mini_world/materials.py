"""What surfaces look like: structure of both styles (windows, markings, pickets) and the grain of `real`.

Structure and grain are kept apart because the event camera looks at the first alone, which keeps fine texture
near the camera from flooding its image.
"""

from functools import lru_cache

import cv2
import numpy as np

from datamodules.mini_world import scene as sc

BANK = 512  # side of the noise maps
GRAIN = {
    sc.PLAIN: 0.08, sc.ASPHALT: 0.22, sc.PAVING: 0.16, sc.GRASS: 0.4, sc.FACADE: 0.2,
    sc.PICKETS: 0.2, sc.BARS: 0.08, sc.BLOCKS: 0.3, sc.FOLIAGE: 0.6, sc.ROOF: 0.25,
}  # fmt: skip


@lru_cache(maxsize=1)
def noise_bank() -> tuple[np.ndarray, np.ndarray]:
    """Fine [4, 512, 512] and smooth [4, 512, 512] periodic noise, float32, mean 0, standard deviation 1."""
    rng = sc.generator("bank", 0, "noise")
    fine = rng.standard_normal((4, BANK, BANK), dtype=np.float32)
    smooth = np.empty_like(fine)
    for i in range(4):
        total = np.zeros((BANK, BANK), dtype=np.float32)
        for sigma in (6, 16, 40):
            layer = cv2.GaussianBlur(
                np.pad(rng.standard_normal((BANK, BANK), dtype=np.float32), 128, "wrap"), (0, 0), sigma
            )
            layer = layer[128:-128, 128:-128]
            total += layer / layer.std() * sigma**0.5
        smooth[i] = (total - total.mean()) / total.std()
    return fine, smooth


def noise_at(maps: np.ndarray, number: int, u: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """Look a noise map up at texture coordinates in metres; it repeats every 512 / scale metres."""
    column = (u * scale).astype(np.int32) & (BANK - 1)
    line = (v * scale).astype(np.int32) & (BANK - 1)
    return maps[number].ravel().take(line * BANK + column)


def cell_random(i: np.ndarray, j: np.ndarray, seed: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each cell (i, j) of a layer, float32."""
    mixed = (
        (i.astype(np.int64) * 73856093) ^ (j.astype(np.int64) * 19349663) ^ (seed.astype(np.int64) * 83492791)
    )
    mixed = (mixed ^ (mixed >> 13)) * 1274126177
    return ((mixed >> 8) & 1023).astype(np.float32) / 1024


def structure(scene: sc.Scene, surface: dict) -> dict:
    """Add the structure of each material to a painted scene.

    Returns:
        albedo float32 [N, 3], and `window` 0..1: 0 no window, else a random number of its cell above 0.
    """
    albedo = surface["color"].copy()
    window = np.zeros(len(albedo), dtype=np.float32)
    drawings = {
        sc.ASPHALT: _asphalt, sc.PAVING: _paving, sc.PICKETS: _pickets,
        sc.BARS: _bars, sc.BLOCKS: _blocks, sc.FACADE: _facade,
    }  # fmt: skip
    for material, draw in drawings.items():
        where = np.flatnonzero(surface["material"] == material)
        if len(where):
            u, v = surface["u"].take(where), surface["v"].take(where)
            draw(scene, albedo, window, where, u, v, surface)
    return {"albedo": albedo, "window": window}


def _asphalt(scene, albedo, window, where, x, z, surface):
    left, right = scene.road
    dash = (np.abs(x - (left + right) / 2) < 0.09) & (z % 4 < 2.2)
    line = dash | (np.abs(x - left - 0.2) < 0.07) | (np.abs(x - right + 0.2) < 0.07)
    if scene.crossing:
        z0, z1 = scene.crossing
        line &= (z < z0 - 3.4) | (z > z1)
        line |= (z > z0 - 3) & (z < z0 - 0.6) & (x % 1.0 < 0.5) & (x > left) & (x < right)
    albedo[where[line & (z < 60)]] = (0.84, 0.84, 0.8)


def _paving(scene, albedo, window, where, x, z, surface):
    left, right = scene.road
    tone = 1 + 0.1 * (((np.floor(x / 0.7) + np.floor(z / 0.7)) % 2) - 0.5) * (z < 14)
    kerb = ((x > left - 0.16) & (x < left + 0.05)) | ((x < right + 0.16) & (x > right - 0.05))
    tone[kerb] = 1.3
    albedo[where] *= tone[:, None].astype(np.float32)


def _pickets(scene, albedo, window, where, u, v, surface):
    height = surface["variant"].take(where)
    rail = (np.abs(v - 0.25 * height) < 0.09) | (np.abs(v - 0.72 * height) < 0.09)
    gap = (u % 0.5 > 0.34) & ~rail
    albedo[where[gap]] *= 0.22
    albedo[where[rail & (u % 0.5 > 0.34)]] *= 0.7


def _bars(scene, albedo, window, where, u, v, surface):
    height = surface["variant"].take(where)
    frame = (v > height - 0.16) | ((v > 0.12) & (v < 0.28)) | (u % 2.0 < 0.16)
    gap = (u % 0.4 > 0.16) & ~frame
    albedo[where[gap]] = (0.56, 0.6, 0.58)  # stands for what shows through, lighter than the bars


def _blocks(scene, albedo, window, where, u, v, surface):
    height = surface["variant"].take(where)
    line = np.floor(v / 0.42)
    shifted = u / 0.9 + 0.5 * (line % 2)
    tone = 0.84 + 0.32 * cell_random(np.floor(shifted), line, height * 64)
    tone[(v % 0.42 < 0.06) | (shifted % 1 < 0.06)] = 0.62
    tone[v > height - 0.22] = 1.25
    albedo[where] *= tone[:, None]


def _facade(scene, albedo, window, where, u, v, surface):
    variant = surface["variant"].take(where)
    pitch = 1.9 + 0.35 * (np.abs(variant) % 3)
    i, j = np.floor(u / pitch), np.floor(v / 2.9)
    across, up = u / pitch - i, v - 2.9 * j
    inside = (across > 0.26) & (across < 0.74) & (up > 0.9) & (up < 2.3) & (v > 0)
    sill = (across > 0.22) & (across < 0.78) & (up > 0.74) & (up <= 0.9) & (v > 0)
    door = (j == 0) & (i % 4 == 1) & (across > 0.28) & (across < 0.72) & (v < 2.2)
    albedo[where[v < 0.5]] *= 0.75
    albedo[where[sill]] *= 1.25
    panes, random = where[inside], cell_random(i[inside], j[inside], variant[inside] * 16)
    albedo[panes] = np.array([0.2, 0.27, 0.36], np.float32) * (0.8 + 0.5 * random)[:, None]
    window[panes] = 0.001 + 0.999 * random
    albedo[where[door]] = (0.3, 0.17, 0.1)
    window[where[door]] = 0


def grain(surface: dict, rng: np.random.Generator) -> np.ndarray:
    """Relative brightness of the texture of each pixel, float32 [N], about 1; fades with distance."""
    fine, smooth = noise_bank()
    strength = np.zeros(16, dtype=np.float32)
    strength[list(GRAIN)] = list(GRAIN.values())
    material, u, v = surface["material"], surface["u"], surface["v"]
    shift = rng.uniform(0, 30, 2).astype(np.float32)
    texture = 0.75 * noise_at(fine, 0, u + shift[0], v + shift[1], 14.0)
    texture += 0.75 * noise_at(smooth, 1, u + shift[1], v + shift[0], 40.0)
    brick = (material == sc.FACADE) & (surface["v"] % 0.24 < 0.06)
    texture -= 1.2 * brick
    leaves = material == sc.FOLIAGE
    texture = np.where(leaves, noise_at(smooth, 2, u, v, 110.0) + 0.4 * texture, texture)
    return np.clip(1 + strength.take(material) * texture * np.minimum(1, 9 / surface["z"]), 0.3, 1.9)
