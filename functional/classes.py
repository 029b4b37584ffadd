"""Every class table of the project (ids are positions), with names and display colours, written once."""

from collections.abc import Sequence
from dataclasses import dataclass

IGNORE_INDEX = 255


@dataclass(frozen=True)
class ClassTable:
    """Names and RGB colours (0..255) of the classes; the id of a class is its position.

    Args:
        prompts: by id, the word or words by which a text-to-image model is asked for a class; empty where
            these are the names.
    """

    name: str
    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    prompts: tuple[str, ...] = ()

    def __post_init__(self):
        if len(self.names) != len(self.colors) or len(set(self.names)) != len(self.names):
            raise ValueError(
                f"Class table {self.name!r} needs one colour per name and no name twice: found "
                f"{len(self.names)} names ({len(set(self.names))} different) and {len(self.colors)} colours."
            )
        if self.prompts and not len(self.prompts) == len(set(self.prompts)) == len(self.names):
            raise ValueError(
                f"Class table {self.name!r} needs one prompt per name and no prompt twice: found "
                f"{len(self.prompts)} prompts ({len(set(self.prompts))} different) for {len(self.names)} "
                "names. Leave prompts out to ask by the names."
            )

    @property
    def words(self) -> tuple[str, ...]:
        """By id, how a class is called in a prompt."""
        return self.prompts or self.names

    @property
    def has_background(self) -> bool:
        """Whether id 0 is whatever belongs to no other class; it is never asked for in a prompt."""
        return self.names[0] == "background"

    def __len__(self) -> int:
        return len(self.names)


def _table(name: str, classes: dict[str, tuple[int, int, int]]) -> ClassTable:
    return ClassTable(name, tuple(classes), tuple(classes.values()))


def voc_color(class_id: int) -> tuple[int, int, int]:
    """Colour of an id 0..255 in the colour map of PASCAL VOC.

    The lowest three bits of the id are the highest bits of red, green and blue, the next three their second
    highest, and so on.
    """
    return tuple(
        sum((class_id >> (3 * level + channel) & 1) << (7 - level) for level in range(3))
        for channel in range(3)
    )


def _object_table(name: str, classes: str) -> ClassTable:
    """Table in VOC's colours of names with commas between; "bus=buses" is asked for as "buses"."""
    entries = [entry.strip().partition("=") for entry in classes.split(",")]
    names, prompts = zip(*((name, prompt or name) for name, _, prompt in entries), strict=True)
    return ClassTable(name, names, tuple(map(voc_color, range(len(names)))), prompts)


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

# What a mask of one class says: the object that an episode asks for, and all else.
FEW_SHOT = _table("few_shot", {"background": (0, 0, 0), "object": (220, 20, 60)})

# The object sets of open-vocabulary segmentation: official names and, where they are others, the words with
# which DiffSegmenter's code asks for them (arXiv 2309.02773). PASCAL VOC 2012:
VOC21 = _object_table(
    "voc21",
    """
    background, aeroplane=plane, bicycle, bird, boat, bottle, bus=buses, car, cat, chair, cow,
    diningtable=table, dog, horse, motorbike, person=people, pottedplant=plant, sheep, sofa, train,
    tvmonitor=monitor
    """,
)

# PASCAL Context: its 59 frequent classes, by the alphabet; what is none of them is background.
CONTEXT60 = _object_table(
    "context60",
    """
    background, aeroplane=airplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building,
    bus, cabinet, car, cat, ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor,
    flower, food, grass, ground, horse, keyboard, light, motorbike, mountain, mouse, person, plate, platform,
    pottedplant=plant, road, rock, sheep, shelves, sidewalk, sign, sky, snow, sofa, table, track, train, tree,
    truck, tvmonitor=monitor, wall, water, window, wood
    """,
)

# The 80 categories of COCO by their published ids. The released code asks for "toothbrus", by mistake.
COCO81 = _object_table(
    "coco81",
    """
    background, person, bicycle, car, motorcycle=motorbike, airplane=aeroplane, bus, train, truck, boat,
    traffic light, fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
    bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball,
    kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork,
    knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair,
    couch=sofa, potted plant=pottedplant, bed, dining table=diningtable, toilet, tv=tvmonitor, laptop, mouse,
    remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
    teddy bear, hair drier, toothbrush
    """,
)

# Four folds of the mini world's categories for few-shot work; no episode asks for the reserve.
MINI_FOLDS: tuple[tuple[str, ...], ...] = (
    ("car", "tree", "star", "bottle", "bird"),
    ("house", "fish", "key", "cross", "lamp"),
    ("mug", "heart", "cat", "ladder", "rocket"),
    ("umbrella", "boat", "flower", "arrow", "apple"),
)
MINI_RESERVE: tuple[str, ...] = ("mushroom", "moon", "bell", "chair", "anchor", "butterfly")

# The ids that few-shot benchmarks hold out of training, by benchmark and fold: five in a row of PASCAL VOC,
# every fourth of COCO, and the mini world's folds.
FOLDS: dict[str, tuple[ClassTable, tuple[tuple[int, ...], ...]]] = {
    "pascal5i": (VOC21, tuple(tuple(range(5 * fold + 1, 5 * fold + 6)) for fold in range(4))),
    "coco20i": (COCO81, tuple(tuple(range(fold + 1, 81, 4)) for fold in range(4))),
    "mini20i": (
        MINI_OBJECTS,
        tuple(tuple(sorted(map(MINI_OBJECTS.names.index, names))) for names in MINI_FOLDS),
    ),
}


def base_table(benchmark: str, fold: int) -> ClassTable:
    """Return what a base learner knows: background and the classes that the fold does not hold out, by id.

    The mini world's reserve, of which there are no episodes, comes last.
    """
    table, folds = FOLDS[benchmark]
    base = [name for i, name in enumerate(table.names) if i not in folds[fold]]
    base.sort(key=lambda name: benchmark == "mini20i" and name in MINI_RESERVE)
    colors = tuple(table.colors[table.names.index(name)] for name in base)
    return ClassTable(f"{benchmark}_base{fold}", tuple(base), colors)


def class_table(name: str | Sequence[str]) -> ClassTable:
    """Return the table of this name; or of these words and a background, in VOC's colours.

    Raises:
        ValueError: no table has this name (the message lists those that exist), or a word is empty or double.
    """
    if not isinstance(name, str):
        return open_table(name)
    tables = (DELIVER11, FMB9, CITYSCAPES19, MINI_OBJECTS, FEW_SHOT, VOC21, CONTEXT60, COCO81)
    bases = (base_table(benchmark, fold) for benchmark in FOLDS for fold in range(4))
    known = {table.name: table for table in (*tables, *bases)}
    if name not in known:
        raise ValueError(f"No class table is named {name!r}: choose one of {', '.join(sorted(known))}.")
    return known[name]


def open_table(words: Sequence[str]) -> ClassTable:
    """Return a table of words that a user has chosen, after a background.

    Raises:
        ValueError: there is no word, more than the 254 that a label can hold, an empty one or one twice.
    """
    names = ("background", *(" ".join(word.split()) for word in words))
    if not 1 < len(names) <= IGNORE_INDEX or "" in names or len(set(names)) < len(names):
        raise ValueError(
            f"Classes are 1 to {IGNORE_INDEX - 1} different words, none empty and none called background: "
            f'found {list(words)}. Name what to look for, such as --classes "dog, bench, grass".'
        )
    return ClassTable("open", names, tuple(voc_color(i) for i in range(len(names))))


def class_subset(name: str) -> tuple[str, ...]:
    """Return the names of the classes in a subset on which scores are published.

    Raises:
        ValueError: no subset has this name; the message lists those that exist.
    """
    subsets = {"synthia16": SYNTHIA16, "synthia13": SYNTHIA13}
    if name not in subsets:
        raise ValueError(f"No subset of classes is named {name!r}: choose one of {', '.join(subsets)}.")
    return subsets[name]
