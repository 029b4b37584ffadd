"""Depth, infrared and event pictures of a painted street. None depends on the style of the colour image."""

import cv2
import numpy as np

from datamodules.mini_world import materials
from datamodules.mini_world import scene as sc

AIR = {"day": 18.0, "night": 8.0, "fog": 10.0, "rain": 9.0, "snow": -3.0}  # degrees Celsius
COLDEST, SPAN = -20.0, 65.0  # degrees at grey value 0, and from there to 255
EVENT_STEP = 0.2  # change of log intensity that fires one event


def depth_image(surface: dict, size: int) -> np.ndarray:
    """Metres, float32 [size, size]; the sky is 200."""
    return surface["z"].reshape(size, size).astype(np.float32)


def infrared_image(surface: dict, size: int, condition: str, rng: np.random.Generator) -> np.ndarray:
    """Surface temperature from -20 to 45 degrees Celsius as grey 0..255, uint8 [size, size].

    Sunshine warms ground and walls by day; persons, engines and wheels are warm in every condition.
    """
    _, smooth = materials.noise_bank()
    label, z = surface["label"], surface["z"]
    air = AIR[condition] + float(rng.uniform(-4, 4))
    sun = np.float32(1.0 if condition == "day" else 0.4)
    warm = np.where(label == sc.CAR, 1, sun)
    temperature = air + surface["heat"] * warm
    temperature += np.float32(0.5) * materials.noise_at(smooth, 0, surface["u"], surface["v"], 30.0)
    person = label == sc.PERSON
    temperature[person] = surface["heat"][person]  # a body keeps its own temperature
    through = np.exp(np.float32(-0.006) * z)
    temperature = temperature * through + (air - 2) * (1 - through)
    sky = label == sc.SKY
    temperature[sky] = -15.0
    image = (temperature.reshape(size, size).astype(np.float32) - COLDEST) * np.float32(255 / SPAN)
    image = cv2.GaussianBlur(image, (0, 0), 0.6 * size / 128)
    fine, _ = materials.noise_bank()
    rows, columns = (
        np.arange(n, n + size) & (materials.BANK - 1) for n in (int(m) for m in rng.integers(0, 512, 2))
    )
    image += fine[3].take(rows, axis=0).take(columns, axis=1)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def event_image(
    scene: sc.Scene, surface: dict, intensity: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Brightness changes under a small move of the camera, uint8 [S, S, 3]: red up, blue down, white none.

    Args:
        intensity: light without grain, float32 [size * size, 3]; grain would fire all over the near ground.
    """
    grey = intensity @ np.array([0.3, 0.59, 0.11], dtype=np.float32)
    log = cv2.GaussianBlur(np.log(0.06 + np.clip(grey, 0, 1.2)).reshape(size, size), (0, 0), 0.5 * size / 128)
    forward, yaw = float(rng.uniform(0.12, 0.3)), float(rng.uniform(-0.012, 0.012))
    forward, yaw = np.float32(forward), np.float32(yaw * sc.FOCAL)
    x, y = sc.pixel_grid(size)
    step = forward / np.maximum(surface["z"], 2)
    unit = np.float32(size / 128)
    from_x = ((x + (x - np.float32(scene.vanish_x)) * -step - yaw) * unit - 0.5).reshape(size, size)
    from_y = ((y + (y - np.float32(scene.horizon)) * -step) * unit - 0.5).reshape(size, size)
    change = cv2.remap(log, from_x, from_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE) - log
    count = np.clip(np.trunc(change / np.float32(EVENT_STEP)), -3, 3).astype(np.int8)
    fine, _ = materials.noise_bank()
    top, left = (int(n) for n in rng.integers(0, 512, 2))
    rows, columns = (np.arange(n, n + size) & (materials.BANK - 1) for n in (top, left))
    stray = fine[2].take(rows, axis=0).take(columns, axis=1)
    count += (stray > 2.8).astype(np.int8)
    count -= (stray < -2.8).astype(np.int8)
    level = np.rint(255 * (1 - np.sqrt(np.arange(4) / 3))).astype(
        np.uint8
    )  # what is left of the other channels
    out = np.full((size, size, 3), 255, dtype=np.uint8)
    faded = level[np.minimum(np.abs(count), 3)]
    out[:, :, 0] = np.where(count < 0, faded, 255)
    out[:, :, 1] = faded
    out[:, :, 2] = np.where(count > 0, faded, 255)
    return out
