"""The silhouettes of the object scenes: each category is a list of parts, drawn one over the other in order.

A part is (tone, contours). Contours are [N, 2] arrays in the object's own frame, x to the right and y down,
in about [-1, 1]; two contours in one part leave a hole. A tone below 1 darkens the object's colour and one
above 1 lightens it, so that a category never decides a colour.
"""

import numpy as np

Part = tuple[float, list[np.ndarray]]


def _ellipse(x: float, y: float, rx: float, ry: float | None = None, turn: float = 0.0) -> np.ndarray:
    return _arc(x, y, rx, rx if ry is None else ry, 0, 2 * np.pi, turn)


def _arc(x, y, rx, ry, start, stop, turn=0.0) -> np.ndarray:
    """Points of an elliptic arc, closed by its chord; angles in radians from +x to +y, which points down."""
    angle = np.linspace(start, stop, 28)
    points = np.stack([rx * np.cos(angle), ry * np.sin(angle)], 1)
    cos, sin = np.cos(turn), np.sin(turn)
    return points @ np.array([[cos, sin], [-sin, cos]]) + (x, y)


def _band(x, y, radius, width, start, stop) -> np.ndarray:
    """A bent bar: the part of a ring between two angles."""
    outer = _arc(x, y, radius + width / 2, radius + width / 2, start, stop)
    return np.concatenate([outer, _arc(x, y, radius - width / 2, radius - width / 2, stop, start)])


def _box(x0, y0, x1, y1) -> np.ndarray:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], float)


def _bar(x0, y0, x1, y1, width) -> np.ndarray:
    start, stop = np.array((x0, y0), float), np.array((x1, y1), float)
    side = np.array([y0 - y1, x1 - x0]) / np.hypot(x1 - x0, y1 - y0) * width / 2
    return np.array([start + side, stop + side, stop - side, start - side])


def _points(*pairs) -> np.ndarray:
    return np.array(pairs, float)


def _part(tone: float, *contours: np.ndarray) -> Part:
    return tone, list(contours)


def _star() -> list[Part]:
    angle = np.arange(10) * np.pi / 5 - np.pi / 2
    radius = np.where(np.arange(10) % 2, 0.42, 1.0)
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
    facets = [_part(0.72, np.array([points[i], points[(i + 1) % 10], (0, 0)])) for i in range(0, 10, 2)]
    return [_part(1.0, points), *facets]


def _heart() -> list[Part]:
    t = np.linspace(0, 2 * np.pi, 48)
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 17
    heart = np.stack([16 * np.sin(t) ** 3 / 17, y], 1)
    return [_part(1.0, heart), _part(1.45, _ellipse(-0.45, -0.4, 0.2, 0.13, -0.6))]


def _moon() -> list[Part]:
    outer = _arc(0, 0, 1, 1, np.pi * 0.3, np.pi * 1.7)
    tip, radius = outer[0], 0.9
    centre = tip[0] + np.sqrt(radius**2 - tip[1] ** 2)
    angle = np.arctan2(tip[1], tip[0] - centre)
    inner = _arc(centre, 0, radius, radius, 2 * np.pi - angle, angle)
    crescent = np.concatenate([outer, inner]) + np.array([0.25, 0])
    return [
        _part(1.0, crescent),
        _part(0.75, _ellipse(-0.5, 0.3, 0.13)),
        _part(0.75, _ellipse(-0.5, -0.3, 0.1)),
    ]


def _tree() -> list[Part]:
    """A conifer, so that no other category shares its outline."""
    layers = [_points((-w, y), (0, y - 0.75), (w, y)) for y, w in ((0.62, 0.78), (0.18, 0.64), (-0.25, 0.48))]
    return [
        _part(0.4, _box(-0.14, 0.55, 0.14, 1.0)),
        *(_part(tone, layer) for tone, layer in zip((0.72, 0.9, 1.1), layers, strict=True)),
    ]


def _flower() -> list[Part]:
    petals = [_ellipse(0.46 * np.cos(a), -0.35 + 0.46 * np.sin(a), 0.27) for a in np.arange(6) * np.pi / 3]
    return [
        _part(0.5, _bar(0, -0.2, 0, 1.0, 0.15)),
        _part(0.5, _ellipse(0.3, 0.6, 0.32, 0.13, -0.5)),
        *(_part(1.0, petal) for petal in petals),
        _part(1.7, _ellipse(0, -0.35, 0.26)),
    ]


def _butterfly() -> list[Part]:
    parts = []
    for side in (-1, 1):
        parts += [
            _part(0.8, _ellipse(side * 0.45, 0.42, 0.38, 0.42)),
            _part(1.0, _ellipse(side * 0.55, -0.3, 0.5, 0.42, side * -0.6)),
            _part(1.6, _ellipse(side * 0.62, -0.34, 0.2)),
            _part(1.6, _ellipse(side * 0.48, 0.46, 0.15)),
            _part(0.35, _bar(side * 0.03, -0.5, side * 0.28, -0.95, 0.09)),
        ]
    return [*parts, _part(0.35, _ellipse(0, 0, 0.12, 0.68))]


def _umbrella() -> list[Part]:
    scallops = [(0.86, 0.2), (0.5, 0.04), (0.3, 0.18), (0, 0.04), (-0.3, 0.18), (-0.5, 0.04), (-0.86, 0.2)]
    dome = np.concatenate([_arc(0, 0.12, 1, 0.95, np.pi, 2 * np.pi), _points(*scallops)])
    middle = np.concatenate([_arc(0, 0.12, 0.42, 0.95, np.pi, 2 * np.pi), _points((0.3, 0.18), (0, 0.04))])
    return [
        _part(0.35, _bar(0, -0.95, 0, 0.8, 0.13)),
        _part(0.35, _band(0.18, 0.78, 0.18, 0.13, 0, np.pi)),
        _part(1.0, dome),
        _part(1.35, middle),
    ]


SHAPES: dict[str, list[Part]] = {
    "car": [
        _part(0.8, _points((-0.55, -0.05), (-0.35, -0.48), (0.3, -0.48), (0.6, -0.05))),
        _part(1.75, _points((-0.42, -0.08), (-0.29, -0.38), (-0.06, -0.38), (-0.06, -0.08))),
        _part(1.75, _points((0.04, -0.08), (0.04, -0.38), (0.25, -0.38), (0.44, -0.08))),
        _part(1.0, _points((-1, 0.3), (-0.97, -0.02), (-0.6, -0.1), (0.6, -0.1), (0.97, 0.06), (1, 0.3))),
        *(_part(0.25, _ellipse(x, 0.3, 0.25)) for x in (-0.52, 0.55)),
        *(_part(1.6, _ellipse(x, 0.3, 0.1)) for x in (-0.52, 0.55)),
    ],
    "house": [
        _part(0.55, _box(0.32, -0.85, 0.54, -0.3)),
        _part(1.0, _box(-0.68, -0.2, 0.68, 0.85)),
        _part(0.6, _points((-0.95, -0.15), (0, -0.95), (0.95, -0.15))),
        _part(0.3, _box(-0.45, 0.2, -0.08, 0.85)),
        _part(1.75, _box(0.14, 0.08, 0.5, 0.44)),
    ],
    "tree": _tree(),
    "fish": [
        _part(0.7, _points((0.45, 0), (1, -0.45), (0.86, 0), (1, 0.45))),
        _part(0.75, _points((-0.3, -0.3), (0.15, -0.68), (0.35, -0.2))),
        _part(1.0, _ellipse(-0.2, 0, 0.76, 0.42)),
        _part(1.3, _ellipse(-0.2, 0.17, 0.5, 0.17)),
        _part(0.65, _points((-0.1, -0.05), (0.2, -0.18), (0.2, 0.18))),
        _part(1.9, _ellipse(-0.64, -0.1, 0.14)),
        _part(0.15, _ellipse(-0.66, -0.1, 0.08)),
    ],
    "mug": [
        _part(0.75, _ellipse(0.5, 0.05, 0.46, 0.5), _ellipse(0.5, 0.05, 0.25, 0.29)),
        _part(1.0, _points((-0.75, -0.65), (0.5, -0.65), (0.42, 0.8), (-0.67, 0.8))),
        _part(1.35, _points((-0.66, -0.3), (-0.42, -0.3), (-0.38, 0.7), (-0.6, 0.7))),
        _part(0.75, _ellipse(-0.125, -0.65, 0.63, 0.2)),
        _part(0.3, _ellipse(-0.125, -0.63, 0.52, 0.13)),
    ],
    "star": _star(),
    "heart": _heart(),
    "umbrella": _umbrella(),
    "mushroom": [
        _part(1.65, _points((-0.24, 0), (0.24, 0), (0.34, 0.95), (-0.34, 0.95))),
        _part(
            1.0,
            np.concatenate([_arc(0, 0.12, 0.98, 0.98, np.pi, 2 * np.pi), _arc(0, 0.1, 0.98, 0.16, 0, np.pi)]),
        ),
        _part(1.75, _ellipse(-0.45, -0.3, 0.2, 0.17)),
        _part(1.75, _ellipse(0.12, -0.52, 0.19, 0.15)),
        _part(1.75, _ellipse(0.52, -0.15, 0.17, 0.16)),
    ],
    "boat": [
        _part(0.4, _bar(-0.05, -1, -0.05, 0.5, 0.1)),
        _part(1.1, _points((0.04, -0.92), (0.04, 0.3), (0.78, 0.3))),
        _part(1.55, _points((-0.14, -0.75), (-0.14, 0.3), (-0.75, 0.3))),
        _part(0.75, _points((-0.95, 0.42), (0.98, 0.42), (0.62, 0.9), (-0.65, 0.9))),
    ],
    "key": [
        _part(0.85, _box(-0.25, -0.12, 1.0, 0.12)),
        _part(0.7, _box(0.48, 0.08, 0.64, 0.42)),
        _part(0.7, _box(0.82, 0.08, 1.0, 0.48)),
        _part(1.0, _ellipse(-0.55, 0, 0.45), _ellipse(-0.58, 0, 0.2)),
    ],
    "flower": _flower(),
    "bottle": [
        _part(0.5, _box(-0.16, -1, 0.16, -0.78)),
        _part(
            1.0,
            _points(
                (-0.13, -0.8),
                (0.13, -0.8),
                (0.15, -0.4),
                (0.42, -0.1),
                (0.42, 0.95),
                (-0.42, 0.95),
                (-0.42, -0.1),
                (-0.15, -0.4),
            ),
        ),
        _part(1.7, _box(-0.42, 0.15, 0.42, 0.6)),
    ],
    "cat": [
        *(_part(0.75, _points((s * 0.85, -0.1), (s * 0.8, -1), (s * 0.2, -0.55))) for s in (-1, 1)),
        *(_part(1.5, _points((s * 0.7, -0.35), (s * 0.7, -0.75), (s * 0.4, -0.55))) for s in (-1, 1)),
        _part(1.0, _ellipse(0, 0.12, 0.88, 0.75)),
        *(_part(1.9, _ellipse(s * 0.36, 0.0, 0.19, 0.2)) for s in (-1, 1)),
        *(_part(0.1, _ellipse(s * 0.36, 0.0, 0.08, 0.18)) for s in (-1, 1)),
        _part(1.6, _ellipse(0, 0.5, 0.32, 0.22)),
        _part(0.2, _points((-0.13, 0.34), (0.13, 0.34), (0, 0.5))),
    ],
    "arrow": [
        _part(0.8, _box(-1, -0.2, 0.2, 0.2)),
        _part(1.0, _points((0.1, -0.62), (1, 0), (0.1, 0.62))),
    ],
    "cross": [
        _part(0.75, _box(-0.9, -0.3, 0.9, 0.3)),
        _part(1.0, _box(-0.3, -0.9, 0.3, 0.9)),
    ],
    "moon": _moon(),
    "bell": [
        _part(0.6, _ellipse(0, -0.85, 0.17)),
        _part(0.35, _ellipse(0, 0.78, 0.22)),
        _part(
            1.0,
            np.concatenate(
                [
                    _arc(0, -0.2, 0.52, 0.6, np.pi, 2 * np.pi),
                    _points((0.6, 0.35), (0.88, 0.62), (-0.88, 0.62), (-0.6, 0.35)),
                ]
            ),
        ),
        _part(0.65, _points((-0.66, 0.42), (0.66, 0.42), (0.9, 0.64), (-0.9, 0.64))),
        _part(1.5, _points((-0.36, -0.35), (-0.2, -0.5), (-0.28, 0.25), (-0.42, 0.25))),
    ],
    "ladder": [
        *(_part(0.7, _bar(-0.45, y, 0.45, y, 0.15)) for y in (-0.68, -0.23, 0.23, 0.68)),
        *(_part(1.0, _box(x - 0.1, -1, x + 0.1, 1)) for x in (-0.45, 0.45)),
    ],
    "bird": [
        _part(0.35, _bar(-0.02, 0.4, -0.08, 0.9, 0.09)),
        _part(0.35, _bar(0.2, 0.4, 0.16, 0.9, 0.09)),
        _part(0.7, _points((0.3, 0.05), (1, -0.2), (0.95, 0.22), (0.4, 0.4))),
        _part(1.0, _ellipse(0.08, 0.15, 0.58, 0.4, 0.1)),
        _part(1.0, _ellipse(-0.45, -0.32, 0.33)),
        _part(0.6, _ellipse(0.22, 0.08, 0.4, 0.2, 0.25)),
        _part(0.4, _points((-0.72, -0.45), (-1.05, -0.25), (-0.72, -0.18))),
        _part(1.9, _ellipse(-0.52, -0.38, 0.11)),
        _part(0.1, _ellipse(-0.53, -0.38, 0.06)),
    ],
    "apple": [
        _part(0.3, _bar(0, -0.4, 0.12, -0.95, 0.13)),
        _part(0.6, _ellipse(0.42, -0.72, 0.32, 0.14, -0.35)),
        *(_part(1.0, _ellipse(s * 0.32, 0.15, 0.55, 0.72)) for s in (-1, 1)),
        _part(1.5, _ellipse(-0.48, -0.1, 0.13, 0.24, 0.3)),
    ],
    "lamp": [
        _part(0.45, _box(-0.09, 0, 0.09, 0.85)),
        _part(0.6, np.concatenate([_arc(0, 0.95, 0.5, 0.22, np.pi, 2 * np.pi)])),
        _part(1.0, _points((-0.36, -0.95), (0.36, -0.95), (0.8, 0.15), (-0.8, 0.15))),
        _part(1.6, _points((-0.1, -0.95), (0.12, -0.95), (0.25, 0.15), (-0.22, 0.15))),
    ],
    "chair": [
        *(_part(0.6, _bar(x, 0.15, x + lean, 1.0, 0.15)) for x, lean in ((-0.42, -0.06), (0.55, 0.06))),
        *(_part(0.45, _bar(x, 0.1, x, 0.8, 0.12)) for x in (-0.18, 0.36)),
        _part(1.0, _box(-0.6, -1, -0.38, 0.2)),
        _part(0.85, _points((-0.6, 0.0), (0.7, 0.0), (0.7, 0.24), (-0.6, 0.24))),
    ],
    "anchor": [
        _part(1.0, _ellipse(0, -0.76, 0.25), _ellipse(0, -0.76, 0.1)),
        _part(0.85, _box(-0.45, -0.48, 0.45, -0.28)),
        _part(0.85, _box(-0.11, -0.55, 0.11, 0.85)),
        _part(1.0, _band(0, 0.1, 0.72, 0.22, 0.1, np.pi - 0.1)),
        *(_part(1.0, _points((s * 0.44, 0.2), (s * 0.98, 0.34), (s * 0.8, -0.25))) for s in (-1, 1)),
    ],
    "butterfly": _butterfly(),
    "rocket": [
        _part(1.8, _points((-0.22, 0.55), (0.22, 0.55), (0, 1.05))),
        *(_part(0.6, _points((s * 0.3, 0.0), (s * 0.72, 0.7), (s * 0.28, 0.6))) for s in (-1, 1)),
        _part(
            1.0,
            np.concatenate([_arc(0, -0.2, 0.36, 0.8, np.pi, 2 * np.pi), _points((0.3, 0.62), (-0.3, 0.62))]),
        ),
        _part(0.55, _arc(0, -0.2, 0.36, 0.8, 1.19 * np.pi, 1.81 * np.pi)),
        _part(1.8, _ellipse(0, -0.15, 0.19)),
        _part(0.3, _ellipse(0, -0.15, 0.11)),
    ],
}
