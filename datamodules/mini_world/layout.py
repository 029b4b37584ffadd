"""Lays out a street scene at random: ground, rows of buildings, walls and fences, and what stands between.

Each class has a switch per scene, so that the classes present differ from scene to scene and a caption that
names them carries information.
"""

import numpy as np

from datamodules.mini_world import scene as sc
from datamodules.mini_world.scene import Scene, generator

SWITCHES = {
    "building": 0.75, "wall": 0.62, "fence": 0.66, "vegetation": 0.72, "pole": 0.68,
    "traffic sign": 0.66, "person": 0.68, "car": 0.7, "sidewalk": 0.85,
}  # fmt: skip
PAINTS = {
    "red": (0.75, 0.09, 0.07), "blue": (0.1, 0.2, 0.72), "white": (0.86, 0.86, 0.86),
    "black": (0.09, 0.09, 0.1), "yellow": (0.88, 0.72, 0.1), "green": (0.1, 0.5, 0.18),
    "gray": (0.48, 0.5, 0.52),
}  # fmt: skip
CLOTHES = PAINTS | {"orange": (0.92, 0.45, 0.08), "purple": (0.5, 0.16, 0.58)}
FACADES = {
    "brick": (0.56, 0.24, 0.17), "stone": (0.5, 0.49, 0.46), "white": (0.8, 0.78, 0.72),
    "yellow": (0.78, 0.62, 0.32),
}  # fmt: skip
WALLS = {"stone": (0.62, 0.55, 0.44), "concrete": (0.66, 0.65, 0.66), "clay": (0.7, 0.45, 0.3)}
FENCES = {"wooden": (0.56, 0.36, 0.16), "white": (0.9, 0.9, 0.88), "metal": (0.1, 0.32, 0.24)}
SKIN = ((0.85, 0.62, 0.48), (0.62, 0.42, 0.3), (0.4, 0.26, 0.18))
CIRCLE = [(float(np.cos(t)), float(np.sin(t))) for t in np.linspace(0, 2 * np.pi, 14, endpoint=False)]


def _box(x0, x1, y0, y1):
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def _disc(x, y, radius, stretch=1.0):
    return [(x + radius * c, y + radius * stretch * s) for c, s in CIRCLE]


def _pick(rng, table: dict) -> tuple[str, tuple]:
    name = list(table)[int(rng.integers(len(table)))]
    return name, table[name]


def build_scene(split: str, index: int) -> Scene:
    """The geometry of scene `index` of a split: the same for every style, condition and size.

    Raises:
        ValueError: no such split, or a negative index.
    """
    if split not in sc.SPLITS or index < 0:
        raise ValueError(
            f"A street scene needs a split and an index from 0 up: found {split!r}, {index}. "
            f"Choose a split of {', '.join(sc.SPLITS)}."
        )
    rng = generator(split, index, "geometry")
    switches = {name: bool(rng.random() < chance) for name, chance in SWITCHES.items()}
    if not switches["vegetation"]:
        switches["sidewalk"] = True  # the ground beside the road has to be something
    crossing = None
    if rng.random() < 0.4:
        start = float(rng.uniform(8, 18))
        crossing = (start, start + float(rng.uniform(4.5, 7)))
    road = (-float(rng.uniform(1.5, 3.3)), float(rng.uniform(1.5, 3.3)))
    scene = Scene(
        camera_height=float(rng.uniform(1.3, 2.3)),
        vanish_x=float(64 + rng.uniform(-24, 24)),
        horizon=float(128 * rng.uniform(0.4, 0.58)),
        road=road, crossing=crossing, switches=switches,
    )  # fmt: skip
    _ground_and_backdrop(scene, rng)
    pavement = [float(rng.uniform(1.1, 2.6)) for _ in range(2)]
    _pavements(scene, pavement)
    kinds = [kind for kind in ("wall", "fence") if switches[kind]]
    if rng.random() < 0.5:
        kinds = kinds[::-1]
    sides = (0, 1) if rng.random() < 0.5 else (1, 0)
    for i, side in enumerate(sides):  # walls and fences stand near, or they would cover few pixels
        _row(scene, rng, side, pavement[side], kinds[i] if i < len(kinds) else None)
    _street_objects(scene, rng, pavement)
    return scene


def _ground_and_backdrop(scene, rng):
    # Layer 0 is the sky and also what lies where nothing else is painted.
    scene._add([(0, 0, 1)] * 3, (0, 0, 1 / 200), sc.SKY, sc.FACE_SKY, sc.AIR, (0.5, 0.6, 0.8), 0, 0, 0)
    if scene.switches["vegetation"]:
        scene.ground(-900, 900, 0.6, 900, sc.VEGETATION, (0.28, 0.44, 0.14), sc.GRASS, heat=0)
    else:
        scene.ground(-900, 900, 0.6, 900, sc.SIDEWALK, (0.62, 0.57, 0.52), sc.PAVING, heat=5)
    skyline, trees = rng.random() < 0.45, rng.random() < 0.5
    if scene.switches["building"] and skyline:
        for x in rng.uniform(-70, 70, 7):
            _, color = _pick(rng, FACADES)
            height = rng.uniform(8, 22)
            scene.front(95, _box(x - 9, x + 9, 0, height), sc.BUILDING, color, sc.FACADE, 3, variant=x)
    if scene.switches["vegetation"] and trees:
        tops = [
            (float(x), float(y)) for x, y in zip(np.linspace(-90, 90, 46), rng.uniform(3, 9, 46), strict=True)
        ]
        outline = [(-90.0, 0.0), *tops, (90.0, 0.0)]
        scene.front(85, outline, sc.VEGETATION, (0.14, 0.32, 0.12), sc.FOLIAGE, -1)


def _pavements(scene, pavement):
    left, right = scene.road
    stone, asphalt = (0.62, 0.57, 0.52), (0.27, 0.27, 0.29)
    if scene.switches["sidewalk"]:
        scene.ground(left - pavement[0], right + pavement[1], 0.6, 900, sc.SIDEWALK, stone, sc.PAVING, heat=5)
        if scene.crossing:
            z0, z1 = scene.crossing
            scene.ground(-900, 900, z0 - 1.4, z1 + 1.4, sc.SIDEWALK, stone, sc.PAVING, heat=5)
    if scene.crossing:
        scene.ground(-900, 900, *scene.crossing, sc.ROAD, asphalt, sc.ASPHALT, heat=8)
    scene.ground(left, right, 0.6, 900, sc.ROAD, asphalt, sc.ASPHALT, heat=8)


def _row(scene, rng, side, pavement, first):
    """One side of the street: segments along the road, each with what stands behind it, far to near."""
    sign = -1 if side == 0 else 1
    edge = abs(scene.road[side]) + (pavement if scene.switches["sidewalk"] else 0.5)
    gap = (scene.crossing[0] - 1.5, scene.crossing[1] + 1.5) if scene.crossing else None
    chances = {"building": 0.46, "wall": 0.15, "fence": 0.15, "vegetation": 0.12, "open": 0.1}
    kinds = [kind for kind in chances if scene.switches.get(kind, True)]
    weights = np.cumsum([chances[kind] for kind in kinds])
    segments, z = [], 1.2
    while z < 60:
        kind = kinds[int(np.searchsorted(weights, rng.random() * weights[-1]))]
        end = z + rng.uniform(4, 8) * (1 + z / 25)
        if z == 1.2:
            end = 2.2 + scene.nearest_visible(edge, 0) + rng.uniform(2.5, 6)
            kind = first or kind
        if gap and z < gap[1] and end > gap[0]:
            if z >= gap[0] - 1:
                z = gap[1]
                continue
            end = gap[0]
        segments.append((kind, z, end))
        z = end
    for kind, z0, z1 in reversed(segments):
        _segment(scene, rng, kind, sign * edge, z0, z1)


def _segment(scene, rng, kind, x, z0, z1):
    sign = 1 if x > 0 else -1
    behind, variant = (z0 + z1) / 2 + 0.5, float(rng.uniform(1, 9))
    house, tree = rng.random() < 0.45, rng.random() < 0.45
    if kind != "building":
        if house and scene.switches["building"]:
            _house(scene, rng, x + sign * rng.uniform(5, 8), behind + 2)
        if tree and scene.switches["vegetation"]:
            _tree(scene, rng, x + sign * rng.uniform(1.2, 2.5), behind)
    if kind == "building":
        x += sign * rng.uniform(0, 1)
        word, color = _pick(rng, FACADES)
        height = rng.uniform(4.5, 13)
        scene.front(z0, _box(x, x + sign * 9, 0, height), sc.BUILDING, color, sc.FACADE, 3, variant=variant)
        scene.side(x, _box(z0, z1, 0, height), sc.BUILDING, color, sc.FACADE, 3, variant=variant + 0.5)
        scene.describe("building", word)
    elif kind == "wall":
        word, color = _pick(rng, WALLS)
        height = rng.uniform(1.5, 2.5)
        end_color = tuple(0.8 * c for c in color)
        scene.front(z0, _box(x, x + sign * 0.4, 0, height), sc.WALL, end_color, sc.BLOCKS, 4, variant=height)
        scene.side(x, _box(z0, z1, 0, height), sc.WALL, color, sc.BLOCKS, 4, variant=height)
        scene.describe("wall", word)
    elif kind == "fence":
        word, color = _pick(rng, FENCES)
        height = rng.uniform(1.5, 2.2)
        material = sc.BARS if word == "metal" else sc.PICKETS
        tips = 0.0 if word == "metal" else 0.2
        steps = np.arange(z0, z1, 0.25 if z1 < 25 else 1.0)
        top = [(float(z), height - tips * (i % 2 == 0)) for i, z in enumerate(steps)]
        outline = [(z0, 0.0), *top, (z1, height), (z1, 0.0)]
        scene.side(x, outline, sc.FENCE, color, material, 0.5, variant=height)
        scene.describe("fence", word)
    elif kind == "vegetation":
        height, color = rng.uniform(0.9, 2.0), (0.16, 0.38, 0.12)
        scene.front(z0, _box(x, x + sign * 1.2, 0, height), sc.VEGETATION, color, sc.FOLIAGE, -1)
        scene.side(x, _box(z0, z1, 0, height), sc.VEGETATION, color, sc.FOLIAGE, -1)


def _house(scene, rng, x, z):
    word, color = _pick(rng, FACADES)
    half, height = rng.uniform(2.5, 4), rng.uniform(3, 5.5)
    scene.front(z, _box(x - half, x + half, 0, height), sc.BUILDING, color, sc.FACADE, 3, variant=float(half))
    roof = [(x - half - 0.4, height), (x + half + 0.4, height), (x, height + half * rng.uniform(0.6, 0.9))]
    scene.front(z, roof, sc.BUILDING, (0.4, 0.15, 0.12), sc.ROOF, 1)
    scene.describe("building", word)


def _tree(scene, rng, x, z):
    height, crown = rng.uniform(2.6, 4.2), rng.uniform(0.8, 1.3)
    trunk = _box(x - 0.14, x + 0.14, 0, height - crown * 0.5)
    scene.front(z, trunk, sc.VEGETATION, (0.3, 0.2, 0.12), sc.PLAIN, -0.5)
    tone = rng.uniform(0.8, 1.25)
    for i, (dx, dy) in enumerate(
        ((-0.6, 0.0), (0.6, 0.05), (0.0, 0.55), (-0.35, -0.35), (0.35, -0.3), (0.0, 0.1))
    ):
        shade = tone * (0.75 + 0.1 * (i % 4))
        disc = _disc(x + dx * crown, height + dy * crown, crown * 0.68)
        scene.front(z, disc, sc.VEGETATION, (0.15 * shade, 0.4 * shade, 0.1 * shade), sc.FOLIAGE, -1)
    scene.shadows.append((x, z, 0.8, 0.4))


def _street_objects(scene, rng, pavement):
    """Trees, poles, signs, persons and cars, sorted by depth; kerb is where things stand beside the road."""
    on, todo = scene.switches, []

    def beside(inner, outer):  # a lateral position beside the road, as (X, side)
        side = int(rng.integers(2))
        return (-1 if side == 0 else 1) * (abs(scene.road[side]) + rng.uniform(inner, outer)), side

    def put(draw, x, near, far, margin):
        near = max(near, scene.nearest_visible(x, margin))
        todo.append((near + (far - near) * rng.random() ** 1.6 if far > near else near, x, draw))

    if on["vegetation"]:
        for _ in range(int(rng.integers(0, 4))):
            x, _ = beside(pavement[0] * 0.7, pavement[0] + 0.6)
            put(_tree, x, 7, 22, 4)
    if on["pole"]:
        for i in range(int(rng.integers(2, 5))):
            x, _ = beside(0.15, 0.5)
            put(_sign_on_pole if on["traffic sign"] and i < 2 else _lamp_post, x, 3, 8 if i < 2 else 13, 13)
    elif on["traffic sign"]:
        for _ in range(int(rng.integers(1, 4))):
            x, _ = beside(-0.5, 0.5)
            put(_standing_sign, x, 3.4, 7, 14)
    if on["person"]:
        crowd = rng.random() < 0.22
        for _ in range(int(rng.integers(4, 8) if crowd else rng.integers(1, 4))):
            x, _ = beside(-0.9, 1.0)
            put(_person, x, 3.4, 11 if crowd else 7, 10)
    if on["car"]:
        for i in range(int(rng.integers(1, 4))):
            if scene.crossing and rng.random() < 0.35:
                todo.append((float(np.mean(scene.crossing)), rng.uniform(-4, 4), _side_car))
            else:
                x = rng.uniform(scene.road[0] + 0.9, scene.road[1] - 0.9) if i else beside(-1.2, -0.8)[0]
                put(_car, x, 5, 16, -8)
    cars = []
    for z, x, draw in todo:  # the later of two cars in one place is left out
        if draw in (_car, _side_car):
            room = 1.9 if draw is _car else 4.0
            if all(abs(x - other_x) > room or abs(z - other_z) > 4.6 for other_z, other_x, _ in cars):
                cars.append((z, x, draw))
    todo = [entry for entry in todo if entry[2] not in (_car, _side_car)] + cars
    for z, x, draw in sorted(todo, key=lambda entry: -entry[0]):
        draw(scene, rng, float(x), float(z))


def _lamp_post(scene, rng, x, z):
    height, half = rng.uniform(3.2, 4.5), rng.uniform(0.13, 0.19)
    tone = rng.uniform(0.3, 0.55)
    color, arm = (tone, tone, tone * 1.05), (0.9 if x < 0 else -0.9)
    scene.front(z, _box(x - half, x + half, 0, height), sc.POLE, color, heat=2)
    scene.front(
        z, _box(x - half * 1.7, x + half * 1.7, 0, 0.5), sc.POLE, tuple(0.7 * c for c in color), heat=2
    )
    scene.front(z, _box(*sorted((x, x + arm)), height - 0.16, height), sc.POLE, color, heat=2)
    lamp = _box(x + arm - 0.28, x + arm + 0.28, height - 0.3, height - 0.08)
    scene.front(z, lamp, sc.POLE, (0.9, 0.88, 0.75), heat=12, glow=1.0)
    scene.lamps.append((x + arm, z))
    scene.shadows.append((x, z, 0.4, 0.3))
    scene.describe("pole", "tall")


def _sign_on_pole(scene, rng, x, z):
    radius, half = rng.uniform(0.46, 0.62), rng.uniform(0.1, 0.15)
    middle = rng.uniform(2.1, 2.7)
    scene.front(z, _box(x - half, x + half, 0, middle), sc.POLE, (0.5, 0.5, 0.53), heat=2)
    scene.shadows.append((x, z, 0.35, 0.25))
    scene.describe("pole", "short")
    _sign_face(scene, rng, x, middle, z - 0.02, radius)


def _standing_sign(scene, rng, x, z):
    radius = rng.uniform(0.46, 0.62)
    for dx in (-0.7, 0.7):
        foot = _box(x + dx * radius - 0.05, x + dx * radius + 0.05, 0, radius)
        scene.front(z, foot, sc.SIGN, (0.25, 0.25, 0.27), heat=2)
    scene.shadows.append((x, z, 0.6, 0.3))
    _sign_face(scene, rng, x, radius + 0.3, z - 0.02, radius)


def _sign_face(scene, rng, x, y, z, radius):
    red, white, blue, yellow = (0.8, 0.06, 0.06), (0.94, 0.94, 0.92), (0.08, 0.22, 0.75), (0.95, 0.75, 0.08)
    word = ("round", "triangular", "square")[int(rng.integers(3))]
    small = radius * 0.6
    if word == "round":
        shapes = [
            (_disc(x, y, radius), red),
            (_box(x - small, x + small, y - 0.22 * radius, y + 0.22 * radius), white),
        ]
    elif word == "triangular":
        triangle = [(-1.1, -0.8), (1.1, -0.8), (0.0, 1.1)]
        shapes = [
            ([(x + radius * s * a, y + radius * s * b) for a, b in triangle], c)
            for s, c in ((1, red), (0.62, yellow))
        ]
        shapes.append(
            (_box(x - 0.1 * radius, x + 0.1 * radius, y - 0.3 * radius, y + 0.3 * radius), (0.1, 0.1, 0.1))
        )
    else:
        shapes = [(_box(x - radius * s, x + radius * s, y - radius * s, y + radius * s), c)
                  for s, c in ((0.95, white), (0.85, blue))]  # fmt: skip
        shapes.append((_disc(x, y, small * 0.8), white))
    for outline, color in shapes:
        scene.front(z, outline, sc.SIGN, color, heat=2, glow=0.12)  # signs reflect headlights
    scene.describe("traffic sign", word)


def _person(scene, rng, x, z):
    h = rng.uniform(1.6, 1.95)
    swing = rng.uniform(0.02, 0.22) * h
    word, color = _pick(rng, CLOTHES)
    _, trousers = _pick(rng, {k: tuple(0.6 * c for c in PAINTS[k]) for k in ("blue", "black", "gray")})
    skin, body = SKIN[int(rng.integers(3))], float(rng.uniform(31, 35))
    for s in (-1, 1):
        leg = [(x + s * 0.02, 0.5 * h), (x + s * 0.13 * h, 0.5 * h),
               (x + s * (0.06 + swing), 0.0), (x + s * (swing - 0.12), 0.0)]  # fmt: skip
        scene.front(z, leg, sc.PERSON, trousers, heat=body - 4)
        hand = 0.13 * h + 0.4 * swing
        arm = [(0.13 * h, 0.83 * h), (0.165 * h, 0.78 * h), (hand + 0.05 * h, 0.46 * h), (hand, 0.46 * h)]
        arm = [(x + s * a, b) for a, b in arm]
        scene.front(z, arm, sc.PERSON, tuple(0.75 * c for c in color), heat=body - 3)
    torso = [
        (x - 0.12 * h, 0.46 * h),
        (x + 0.12 * h, 0.46 * h),
        (x + 0.145 * h, 0.83 * h),
        (x - 0.145 * h, 0.83 * h),
    ]
    scene.front(z, torso, sc.PERSON, color, heat=body - 3)
    scene.front(z, _disc(x, 0.92 * h, 0.075 * h, 1.2), sc.PERSON, skin, heat=body)
    hair = [(x + 0.078 * h * c, 0.935 * h + 0.09 * h * max(s, 0)) for c, s in CIRCLE]
    scene.front(z, hair, sc.PERSON, (0.13, 0.09, 0.06), heat=body - 2)
    scene.shadows.append((x, z, 0.45, 0.22))
    scene.describe("person", word)


def _car(scene, rng, x, z):
    """A car along the street: the side that the camera sees, then its rear (or front, on the other lane)."""
    word, color = _pick(rng, PAINTS)
    half, warm = 0.9, float(rng.uniform(14, 25))
    scene.shadows.append((x, z + 1.9, 1.15, 2.2))
    glass, dark = (0.16, 0.22, 0.28), (0.05, 0.05, 0.06)
    inner = x - half if x > 0 else x + half
    if abs(x) > half + 0.3:
        shaded = tuple(0.82 * c for c in color)
        scene.side(inner, _box(z, z + 4.1, 0.3, 0.95), sc.CAR, shaded, heat=6)
        cabin = [(z + 0.3, 0.95), (z + 3.0, 0.95), (z + 2.4, 1.48), (z + 0.5, 1.48)]
        scene.side(inner, cabin, sc.CAR, shaded, heat=5)
        pane = [(z + 0.6, 1.0), (z + 2.7, 1.0), (z + 2.25, 1.4), (z + 0.7, 1.4)]
        scene.side(inner, pane, sc.CAR, glass, heat=4)
        for middle in (0.8, 3.3):
            scene.side(inner, _disc(z + middle, 0.32, 0.33), sc.CAR, dark, heat=20)
    for s in (-1, 1):
        scene.front(z, _box(x + s * 0.62 - 0.15, x + s * 0.62 + 0.15, 0, 0.4), sc.CAR, dark, heat=20)
    scene.front(z, _box(x - half, x + half, 0.25, 0.98), sc.CAR, color, heat=warm)
    roof = [(x - 0.82, 0.98), (x + 0.82, 0.98), (x + 0.62, 1.5), (x - 0.62, 1.5)]
    scene.front(z, roof, sc.CAR, color, heat=6)
    pane = [(x - 0.7, 1.02), (x + 0.7, 1.02), (x + 0.55, 1.42), (x - 0.55, 1.42)]
    scene.front(z, pane, sc.CAR, glass, heat=4)
    lights = (0.85, 0.08, 0.05) if x > -0.3 else (0.97, 0.95, 0.8)
    for s in (-1, 1):
        scene.front(
            z, _box(*sorted((x + s * 0.84, x + s * 0.54)), 0.66, 0.85), sc.CAR, lights, heat=warm, glow=0.9
        )
    scene.front(z, _box(x - 0.26, x + 0.26, 0.42, 0.58), sc.CAR, (0.85, 0.85, 0.8), heat=warm)
    scene.describe("car", word)


def _side_car(scene, rng, x, z):
    """A car that crosses the street, seen from its side."""
    word, color = _pick(rng, PAINTS)
    scene.shadows.append((x, z, 2.2, 0.8))
    body = [
        (-2.1, 0.3),
        (2.1, 0.3),
        (2.1, 0.85),
        (1.2, 0.98),
        (0.7, 1.48),
        (-1.3, 1.48),
        (-1.9, 0.98),
        (-2.1, 0.9),
    ]
    scene.front(z, [(x + a, b) for a, b in body], sc.CAR, color, heat=6)
    for pane in (
        [(-1.6, 1.0), (-0.35, 1.0), (-0.35, 1.4), (-1.2, 1.4)],
        [(-0.2, 1.0), (0.95, 1.0), (0.6, 1.4), (-0.2, 1.4)],
    ):
        scene.front(z, [(x + a, b) for a, b in pane], sc.CAR, (0.16, 0.22, 0.28), heat=4)
    for middle in (-1.25, 1.25):
        scene.front(z, _disc(x + middle, 0.34, 0.36), sc.CAR, (0.05, 0.05, 0.06), heat=20)
        scene.front(z, _disc(x + middle, 0.34, 0.17), sc.CAR, (0.6, 0.6, 0.62), heat=20)
    scene.front(z, _box(x + 1.6, x + 2.1, 0.35, 0.85), sc.CAR, color, heat=22)
    scene.front(z, _box(x + 1.9, x + 2.1, 0.62, 0.8), sc.CAR, (0.97, 0.95, 0.8), heat=15, glow=0.9)
    scene.describe("car", word)
