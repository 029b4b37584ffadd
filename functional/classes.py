"""Every class table of the project (ids are positions), with names and display colours, written once."""

from dataclasses import dataclass

IGNORE_INDEX = 255


@dataclass(frozen=True)
class ClassTable:
    """Names and RGB colours (0..255) of the classes; the id of a class is its position."""

    name: str
    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]

    def __post_init__(self):
        if len(self.names) != len(self.colors) or len(set(self.names)) != len(self.names):
            raise ValueError(
                f"Class table {self.name!r} needs one colour per name and no name twice: found "
                f"{len(self.names)} names ({len(set(self.names))} different) and {len(self.colors)} colours."
            )

    def __len__(self) -> int:
        return len(self.names)


def _table(name: str, classes: dict[str, tuple[int, int, int]]) -> ClassTable:
    return ClassTable(name, tuple(classes), tuple(classes.values()))


# MADM's 11 street classes; the colours are those of its palette regression, where traffic sign
# has the colour that Cityscapes gives to traffic lights.
DELIVER11 = _table(
    "deliver11",
    {
        "sky": (70, 130, 180),
        "building": (70, 70, 70),
        "fence": (190, 153, 153),
        "person": (220, 20, 60),
        "pole": (153, 153, 153),
        "road": (128, 64, 128),
        "sidewalk": (244, 35, 232),
        "vegetation": (107, 142, 35),
        "car": (0, 0, 142),
        "wall": (102, 102, 156),
        "traffic sign": (250, 170, 30),
    },
)

# The same without fence and wall, which the infrared set FMB does not label.
FMB9 = _table(
    "fmb9",
    {
        name: color
        for name, color in zip(DELIVER11.names, DELIVER11.colors, strict=True)
        if name not in ("fence", "wall")
    },
)

# The train ids of Cityscapes, which the other street sets use too.
CITYSCAPES19 = _table(
    "cityscapes19",
    {
        "road": (128, 64, 128),
        "sidewalk": (244, 35, 232),
        "building": (70, 70, 70),
        "wall": (102, 102, 156),
        "fence": (190, 153, 153),
        "pole": (153, 153, 153),
        "traffic light": (250, 170, 30),
        "traffic sign": (220, 220, 0),
        "vegetation": (107, 142, 35),
        "terrain": (152, 251, 152),
        "sky": (70, 130, 180),
        "person": (220, 20, 60),
        "rider": (255, 0, 0),
        "car": (0, 0, 142),
        "truck": (0, 0, 70),
        "bus": (0, 60, 100),
        "train": (0, 80, 100),
        "motorcycle": (0, 0, 230),
        "bicycle": (119, 11, 32),
    },
)

# The classes on which models trained on SYNTHIA are scored: it labels no terrain, truck or train; the smaller
# subset of older papers leaves out three thin or rare classes as well.
SYNTHIA16 = tuple(name for name in CITYSCAPES19.names if name not in ("terrain", "truck", "train"))
SYNTHIA13 = tuple(name for name in SYNTHIA16 if name not in ("wall", "fence", "pole"))

# The object scenes of the mini world: background, then the categories.
MINI_OBJECTS = _table(
    "mini_objects",
    {
        "background": (0, 0, 0),
        "car": (0, 0, 142),
        "house": (178, 34, 34),
        "tree": (34, 139, 34),
        "fish": (0, 206, 209),
        "mug": (255, 140, 0),
        "star": (255, 215, 0),
        "heart": (220, 20, 60),
        "umbrella": (138, 43, 226),
        "mushroom": (210, 105, 30),
        "boat": (70, 130, 180),
        "key": (184, 134, 11),
        "flower": (255, 105, 180),
        "bottle": (0, 128, 128),
        "cat": (105, 105, 105),
        "arrow": (30, 144, 255),
        "cross": (205, 92, 92),
        "moon": (240, 230, 140),
        "bell": (160, 82, 45),
        "ladder": (188, 143, 143),
        "bird": (65, 105, 225),
        "apple": (154, 205, 50),
        "lamp": (238, 130, 238),
        "chair": (139, 69, 19),
        "anchor": (47, 79, 79),
        "butterfly": (199, 21, 133),
        "rocket": (176, 196, 222),
    },
)


def class_table(name: str) -> ClassTable:
    """Return the table of this name.

    Raises:
        ValueError: no table has this name; the message lists those that exist.
    """
    tables = {table.name: table for table in (DELIVER11, FMB9, CITYSCAPES19, MINI_OBJECTS)}
    if name not in tables:
        raise ValueError(f"No class table is named {name!r}: choose one of {', '.join(sorted(tables))}.")
    return tables[name]


def class_subset(name: str) -> tuple[str, ...]:
    """Return the names of the classes in a subset on which scores are published.

    Raises:
        ValueError: no subset has this name; the message lists those that exist.
    """
    subsets = {"synthia16": SYNTHIA16, "synthia13": SYNTHIA13}
    if name not in subsets:
        raise ValueError(f"No subset of classes is named {name!r}: choose one of {', '.join(subsets)}.")
    return subsets[name]
