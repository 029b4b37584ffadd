"""Light and weather on a painted street, and the finish of the two styles.

`game`: what a simple renderer gives; flat, saturated and without noise. `real`: what a cheap camera gives;
grain, cloudy sky, exposure and white balance that vary, lens blur, vignetting and sensor noise.
"""

from functools import lru_cache

import cv2
import numpy as np

from datamodules.mini_world import materials
from datamodules.mini_world import scene as sc

CONDITIONS = ("day", "night", "fog", "rain", "snow")
STYLES = ("game", "real")
SKIES = {  # colour at the top, colour at the horizon
    "day": ((0.2, 0.44, 0.86), (0.72, 0.84, 0.95)), "night": ((0.02, 0.03, 0.09), (0.07, 0.08, 0.16)),
    "fog": ((0.74, 0.75, 0.77), (0.76, 0.77, 0.78)), "rain": ((0.4, 0.43, 0.48), (0.56, 0.58, 0.61)),
    "snow": ((0.68, 0.71, 0.76), (0.82, 0.84, 0.87)),
}  # fmt: skip
AMBIENT = {
    "day": (1.0, 0.98, 0.93),
    "fog": (0.86, 0.87, 0.88),
    "rain": (0.62, 0.64, 0.69),
    "snow": (0.9, 0.92, 0.97),
}


def shade(scene: sc.Scene, surface: dict, size: int, condition: str, rng: np.random.Generator) -> dict:
    """Light a scene without grain.

    Returns:
        intensity float32 [N, 3] of about 0..1, before precipitation and camera (the event camera sees it);
        direct, the share [N] of it that grain can change (surface light that fog lets through).
    """
    look = materials.structure(scene, surface)
    albedo, window, z = look["albedo"], look["window"], surface["z"]
    ground = surface["face"] == sc.FACE_GROUND
    if condition == "snow":
        _lay_snow(albedo, surface, ground, rng)
    side = float(rng.choice([-1, 1])) * (0.2 if condition == "day" else 0.06)
    faces = np.array([1, 1, 1 - side, 1 + side, 1], dtype=np.float32)
    dark = 0.45 if condition == "day" else 0.7
    light = faces.take(surface["face"]) * (1 - (1 - dark) * surface["shadow"])
    if condition == "night":
        lit = _night(scene, surface, albedo, window, light, rng)
    else:
        if condition == "rain":
            albedo[ground] *= 0.72  # wet ground is darker
        lit = albedo * (light[:, None] * np.array(AMBIENT[condition], dtype=np.float32))
        # Only lamps that shine on their own, not signs, glow by day.
        lit += albedo * np.where(surface["glow"] > 0.5, 0.35 * surface["glow"], 0)[:, None]
    density = {"fog": rng.uniform(0.035, 0.07), "rain": 0.012, "snow": 0.014, "day": 0.0015, "night": 0.002}[
        condition
    ]
    top, bottom = (np.array(color, dtype=np.float32) for color in SKIES[condition])
    through = np.exp(np.float32(-density) * z)
    intensity = lit * through[:, None] + bottom * (1 - through)[:, None]
    sky = np.flatnonzero(surface["label"] == sc.SKY)
    climb = np.clip(1 - sc.pixel_grid(size)[1].take(sky) / np.float32(scene.horizon), 0, 1)[:, None]
    intensity[sky] = top * climb + bottom * (1 - climb)
    through[sky] = 0
    return {"intensity": intensity, "direct": through}


def _lay_snow(albedo, surface, ground, rng):
    _, smooth = materials.noise_bank()
    shift = float(rng.uniform(0, 90))
    drift = materials.noise_at(smooth, 3, surface["x"] + shift, surface["z"], 24.0)
    depth = np.where(surface["label"] == sc.ROAD, 0.25, 0.9) + 0.45 * drift  # cars have swept the road
    cover = np.clip(depth, 0, 0.92) * ground
    leaves = surface["material"] == sc.FOLIAGE
    cover += 0.35 * leaves * np.clip(drift + 0.4, 0, 1)
    cover = cover[:, None].astype(np.float32)
    albedo *= 1 - cover
    albedo += cover * np.array([0.9, 0.92, 0.95], dtype=np.float32)


def _night(scene, surface, albedo, window, light, rng):
    """Faint sky light, our headlights, street lamps, and what shines by itself."""
    x, height, z = surface["x"], surface["height"], surface["z"]
    total = np.float32(rng.uniform(0.26, 0.36)) * light
    beam = np.exp(-((x / (1.6 + 0.3 * z)) ** 2)) * np.exp(-z / 13) * (1 - 0.75 * np.clip(height / 2.6, 0, 1))
    color = total[:, None] * np.array([0.75, 0.85, 1.2], dtype=np.float32)
    color = color + (0.75 * beam)[:, None] * np.array([1.0, 0.96, 0.85], dtype=np.float32)
    pool = np.zeros_like(z)
    for lamp_x, lamp_z in scene.lamps:
        pool += np.exp(-((x - lamp_x) ** 2 + (z - lamp_z) ** 2) / 7)
    color += (0.6 * np.minimum(pool, 1))[:, None] * np.array([1.0, 0.85, 0.55], dtype=np.float32)
    lit = albedo * color + albedo * (surface["glow"] * np.float32(1.1))[:, None]
    panes = np.flatnonzero(window > 0.55)
    lit[panes] = np.array([0.98, 0.8, 0.42], dtype=np.float32) * (0.25 + 0.75 * window[panes])[:, None]
    return lit


def finish(
    shaded: dict, surface: dict, size: int, condition: str, style: str, rng: np.random.Generator
) -> np.ndarray:
    """Turn light into a picture of this style, uint8 [size, size, 3]."""
    image = shaded["intensity"]
    if style == "real":
        texture = (materials.grain(surface, rng) - 1) * shaded["direct"]
        image = image * (1 + texture)[:, None]
    image = image.reshape(size, size, 3)
    if style == "real" and condition != "night":
        image = _clouds(image, surface, size, condition, rng)
    if condition == "night":
        image = image + _bloom(image, surface["glow"].reshape(size, size), size)
    if condition in ("rain", "snow"):
        veil = _precipitation(size, condition, rng)[:, :, None]
        image = image + veil * ((0.78 if condition == "rain" else 0.97) - image)
    image = _game(image, condition) if style == "game" else _real(image, size, condition, rng)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _clouds(image, surface, size, condition, rng):
    _, smooth = materials.noise_bank()
    top, left = (int(n) for n in rng.integers(0, 384, 2))
    crop = cv2.resize(
        smooth[0, top : top + 64, left : left + 128], (size, size), interpolation=cv2.INTER_LINEAR
    )
    amount, tone = {"day": (0.65, 0.95), "rain": (0.35, 0.7), "fog": (0.1, 0.85), "snow": (0.3, 0.95)}[
        condition
    ]
    cover = np.clip(crop * 0.7 + 0.1, 0, 1) * amount * (surface["label"].reshape(size, size) == sc.SKY)
    return image + cover[:, :, None] * (np.float32(tone) - image)


def _bloom(image, glow, size):
    """Light that strays around lamps and lit windows; at a quarter of the side, which is smooth enough."""
    bright = image * np.clip(glow + (image.max(axis=2) > 0.75), 0, 1)[:, :, None]
    quarter = cv2.resize(bright, (size // 4, size // 4), interpolation=cv2.INTER_AREA)
    blurred = cv2.GaussianBlur(quarter, (0, 0), 2.0 * size / 128)
    return 0.5 * cv2.resize(blurred, (size, size), interpolation=cv2.INTER_LINEAR)


def _precipitation(size, condition, rng):
    """Opacity of streaks of rain or flakes of snow, float32 [size, size]; the same at every size."""
    veil = np.zeros((size, size), dtype=np.uint8)
    scale = size / 128
    if condition == "rain":
        slant = rng.uniform(-0.3, 0.3)
        for x, y, length in rng.uniform((0, -8, 4), (128, 120, 13), (46, 3)):
            start, end = (x * scale, y * scale), ((x + slant * length) * scale, (y + length) * scale)
            cv2.line(
                veil,
                *(tuple(int(n * 16) for n in p) for p in (start, end)),
                100,
                max(1, round(scale)),
                cv2.LINE_AA,
                4,
            )
    else:
        for x, y, radius in rng.uniform((0, 0, 0.35), (128, 128, 1.2), (80, 3)):
            center = (int(x * scale * 16), int(y * scale * 16))
            cv2.circle(veil, center, int(radius * scale * 16), 225, -1, cv2.LINE_AA, 4)
    return veil.astype(np.float32) / 255


def _game(image, condition):
    """Saturated colours and steep contrast."""
    gray = image.mean(axis=2, keepdims=True)
    image = gray + (1.35 if condition in ("day", "night") else 1.2) * (image - gray)
    return image * 1.08


def _real(image, size, condition, rng):
    """Lens, exposure, white balance and sensor noise."""
    fine, _ = materials.noise_bank()
    gray = image.mean(axis=2, keepdims=True)
    image = gray + np.float32(rng.uniform(0.6, 0.85)) * (image - gray)
    gain = np.float32(rng.uniform(0.78, 1.2)) * (1 + np.array([1, 0, -1]) * rng.normal(0, 0.06)).astype(
        np.float32
    )
    image = cv2.GaussianBlur(image * gain, (0, 0), float(rng.uniform(0.45, 0.75)) * size / 128)
    image *= vignette(size)
    top, left = (int(n) for n in rng.integers(0, materials.BANK - 64, 2))
    rows, columns = (np.arange(n, n + size) & (materials.BANK - 1) for n in (top, left))
    noise = fine[:3].take(rows, axis=1).take(columns, axis=2).transpose(1, 2, 0)
    return image + np.float32(0.026 if condition == "night" else 0.014) * noise


@lru_cache(maxsize=8)
def vignette(size: int) -> np.ndarray:
    """Fall of brightness towards the corners, float32 [size, size, 1]."""
    x, y = sc.pixel_grid(size)
    radius = ((x - 64) ** 2 + (y - 64) ** 2) / (2 * 64**2)
    return (1 - 0.28 * radius).reshape(size, size, 1)
