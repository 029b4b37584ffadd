"""Street scenes of the mini world: 11 classes, five conditions, two styles, four sensors.

Everything is a pure function of (split, index, options). Geometry and label depend on (split, index) alone.
"""

from collections.abc import Collection

import numpy as np

from datamodules.mini_world import sensors as sensor_images
from datamodules.mini_world import weather
from datamodules.mini_world.layout import build_scene
from datamodules.mini_world.scene import SPLITS, generator, paint
from datamodules.mini_world.weather import CONDITIONS, STYLES

__all__ = ["CONDITIONS", "MODALITIES", "SPLITS", "STYLES", "render_street"]
MODALITIES = ("rgb", "depth", "infrared", "event")
CONDITION_WEIGHTS = (0.4, 0.15, 0.15, 0.15, 0.15)


def render_street(
    split: str,
    index: int,
    *,
    size: int = 128,
    style: str = "real",
    condition: str | None = None,
    sensors: Collection[str] = ("rgb",),
) -> dict:
    """Draw one street scene.

    Args:
        split, index: name the scene; scenes of different splits are never the same.
        size: side in pixels, 64..512; the geometry is the same at every size.
        style: "game" or "real"; changes the colour image only.
        condition: one of CONDITIONS; None draws it from the scene's seed (day 40 %, the others 15 % each).
        sensors: which of MODALITIES to draw.

    Returns:
        The asked sensors: rgb uint8 [S, S, 3], depth float32 [S, S] in metres (sky 200), infrared uint8
        [S, S] (-20..45 degrees Celsius), event uint8 [S, S, 3] (white where nothing changed). Always: label
        uint8 [S, S] with ids of deliver11, condition, and caption_facts, a dict of plain values: "condition";
        "layout", crossing or straight; "attributes", class name -> word about its nearest instance, or the
        nearest on one side of the street (building: brick, stone, white, yellow; wall: stone, concrete, clay;
        fence: wooden, white, metal; person: colour of the clothes; car: its colour; traffic sign: round,
        triangular, square; pole: tall with a lamp, or short); "numbers", class name -> instances placed, of
        which some may be hidden. An instance in "attributes" may be out of view, so compare with the label.

    Raises:
        ValueError: unknown split, style, condition or sensor, negative index, or a size out of 64..512.
    """
    unknown = [name for name in sensors if name not in MODALITIES]
    if isinstance(sensors, str) or unknown:
        raise ValueError(
            f"Unknown sensors {sensors!r}: give a list with names out of {', '.join(MODALITIES)}."
        )
    if style not in STYLES or condition not in (None, *CONDITIONS) or not 64 <= size <= 512:
        raise ValueError(
            f"A street scene cannot have style {style!r}, condition {condition!r} and size {size}: choose "
            f"a style of {', '.join(STYLES)}, a condition of {', '.join(CONDITIONS)} or None, "
            "and a size of 64..512."
        )
    scene = build_scene(split, index)
    if condition is None:
        edges = np.cumsum(CONDITION_WEIGHTS)[:-1]
        condition = CONDITIONS[int(np.searchsorted(edges, generator(split, index, "condition").random()))]
    surface = paint(scene, size)
    facts = {
        "condition": condition,
        "layout": "crossing" if scene.crossing else "straight",
        "attributes": scene.attributes,
        "numbers": scene.numbers,
    }
    out = {"label": surface["label"].reshape(size, size), "condition": condition, "caption_facts": facts}
    if "rgb" in sensors or "event" in sensors:
        shaded = weather.shade(scene, surface, size, condition, generator(split, index, f"light/{condition}"))
    if "rgb" in sensors:
        rng = generator(split, index, f"camera/{condition}")
        out["rgb"] = weather.finish(shaded, surface, size, condition, style, rng)
    if "depth" in sensors:
        out["depth"] = sensor_images.depth_image(surface, size)
    if "infrared" in sensors:
        rng = generator(split, index, f"infrared/{condition}")
        out["infrared"] = sensor_images.infrared_image(surface, size, condition, rng)
    if "event" in sensors:
        rng = generator(split, index, f"event/{condition}")
        out["event"] = sensor_images.event_image(scene, surface, shaded["intensity"], size, rng)
    return out
