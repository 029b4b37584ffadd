"""Two files of each split of each data set, in its true layout: random images, labels with ids of its own."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

SIZE = (32, 48)  # height, width


def write_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def noise(path: Path, *shape: int) -> np.ndarray:
    """Random uint8 pixels that depend on the file's name and folders only."""
    seed = list("/".join(path.parts[-4:]).encode())
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def blocks(path: Path, ids: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """Label [H, W] of 4x4 tiles, each of one of the ids."""
    height, width = size
    tiles = np.array(ids, np.uint8)[noise(path, height // 4 + 1, width // 4 + 1) % len(ids)]
    return tiles.repeat(4, 0).repeat(4, 1)[:height, :width]


def write_cityscapes(root: Path, size: tuple[int, int] = SIZE) -> None:
    """RGB images, single-channel labels in train ids."""
    for split, city in (("train", "aachen"), ("val", "lindau")):
        for frame in (1, 2):
            stem = f"{split}/{city}/{city}_{frame:06d}_000019"
            image = root / f"leftImg8bit/{stem}_leftImg8bit.png"
            label = root / f"gtFine/{stem}_gtFine_labelTrainIds.png"
            write_png(image, noise(image, *size, 3))
            write_png(label, blocks(label, [*range(19), 255], size))


def write_deliver(root: Path, size: tuple[int, int] = SIZE) -> None:
    """RGBA depth images; labels in the first channel of RGBA files; the unused split is there too."""
    for split, place in (("train", "MAP_1_point1"), ("val", "MAP_5_point3"), ("test", "MAP_7_point91")):
        for weather in ("cloud", "sun"):
            image = root / f"depth/{weather}/{split}/{place}/000050_depth_front.png"
            label = root / f"semantic/{weather}/{split}/{place}/000050_semantic_front.png"
            write_png(image, noise(image, *size, 4))
            ids = blocks(label, [*range(26), 255], size)
            write_png(label, np.dstack([ids, 0 * ids + 7, 0 * ids + 9, 0 * ids + 255]))


def write_fmb(root: Path, size: tuple[int, int] = SIZE) -> None:
    """Grey infrared images; single-channel labels, which the training images have as well."""
    for split, numbers in (("train", (1, 2)), ("test", (3, 4))):
        for number in numbers:
            image = root / f"{split}/Infrared/{number:05d}.png"
            label = root / f"{split}/Label/{number:05d}.png"
            write_png(image, noise(image, *size))
            write_png(label, blocks(label, range(15), size))


def write_dsec(root: Path, size: tuple[int, int] = SIZE) -> None:
    """Grey event images, of which training takes every second; labels for testing only."""
    for split, sequence, frames in (
        ("train", "zurich_city_00_a", range(1, 5)),
        ("test", "zurich_city_13_a", range(1, 3)),
    ):
        for frame in frames:
            image = root / f"69mask_{split}_edges/{sequence}/{frame:06d}.png"
            write_png(image, noise(image, *size))
            if split == "test":
                label = root / f"test_semantic_labels/{sequence}/11classes/{frame:06d}.png"
                write_png(label, blocks(label, [*range(11), 255], size))


def write_pair(
    image: Path, label: Path, size: tuple[int, int], ids: Sequence[int] = (*range(19), 255)
) -> None:
    """RGB image, single-channel label, by default in the train ids of Cityscapes."""
    write_png(image, noise(image, *size, 3))
    write_png(label, blocks(label, ids, size))


def write_palette(path: Path, ids: np.ndarray) -> None:
    """Label file with a palette, whose colours are not its ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(ids)
    picture.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    picture.save(path)


def write_red_16_bit(path: Path, ids: np.ndarray) -> None:
    """Label file of 16-bit colours: ids in red, other numbers in green and blue."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.dstack([ids + 300, ids + 7, ids]).astype(np.uint16))  # blue, green, red


def write_gta5(root: Path, size: tuple[int, int] = SIZE) -> None:
    """Labels as published and in train ids; the second label has two rows more than its image."""
    for number in (1, 2):
        higher = (size[0] + 2 * number - 2, size[1])
        image, label = root / f"images/{number:05d}.png", root / f"labels/{number:05d}_labelTrainIds.png"
        write_png(image, noise(image, *size, 3))
        write_png(label, blocks(label, [*range(19), 255], higher))
        write_palette(root / f"labels/{number:05d}.png", blocks(label, range(35), higher))


def write_synthia(root: Path, size: tuple[int, int] = SIZE) -> None:
    """Labels as published and in train ids."""
    for number in (0, 1):
        label = root / f"GT/LABELS/{number:07d}_labelTrainIds.png"
        write_pair(root / f"RGB/{number:07d}.png", label, size)
        write_red_16_bit(root / f"GT/LABELS/{number:07d}.png", blocks(label, range(23), size).astype(int))


def write_bdd100k(root: Path, size: tuple[int, int] = SIZE, older: bool = False) -> None:
    """JPEG images, labels in train ids, in the layout of today's release or of the older one."""
    images, labels = ("seg/images", "seg/labels") if older else ("images/10k", "labels/sem_seg/masks")
    for stem in ("7d06fefd-f7be05a6", "b1c66a42-6f7d68ca"):
        write_pair(
            root / f"{images}/val/{stem}.jpg",
            root / f"{labels}/val/{stem}{'_train_id' if older else ''}.png",
            size,
        )


def write_mapillary(root: Path, size: tuple[int, int] = SIZE) -> None:
    """JPEG images of two sizes; labels as published and in train ids."""
    for stem, own in (("_1Gn_xkw7sa_i9GU4mkxxQ", size), ("zzmhFaPJwTQZcSOxYt3p5Q", size[::-1])):
        label = root / f"validation/labels/{stem}_labelTrainIds.png"
        write_pair(root / f"validation/images/{stem}.jpg", label, own)
        write_palette(root / f"validation/labels/{stem}.png", blocks(label, range(66), own))


def write_acdc(root: Path, size: tuple[int, int] = SIZE, flat: bool = False) -> None:
    """Images of four conditions, others for reference, labels in train ids; DAFormer's layout if `flat`."""
    for condition in ("fog", "night", "rain", "snow"):
        for split in ("train", "val", "val_ref"):
            folder = split if flat else f"{condition}/{split}/GOPR0475"
            for frame in (41, 55):
                stem = f"{folder}/GOPR0475_{condition}_frame_{frame:06d}"
                write_pair(
                    root / f"rgb_anon/{stem}_rgb_anon.png", root / f"gt/{stem}_gt_labelTrainIds.png", size
                )


def write_ids(path: Path, ids: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{image_id}\n" for image_id in ids))


def write_pascal_voc(root: Path, size: tuple[int, int] = SIZE) -> None:
    """JPEG images of two sizes; labels with SBD's contours (one is in train_aug alone) and VOC's own."""
    folder = root / "VOCdevkit/VOC2012"
    lists = {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033", "2007_000042"]}
    for split, ids in {**lists, "train_aug": [*lists["train"], "2008_000002"]}.items():
        write_ids(folder / f"ImageSets/Segmentation/{split}.txt", ids)
        for number, image_id in enumerate(ids):
            own = size[::-1] if number == 1 else size
            label = folder / f"SegmentationClassAug/{image_id}.png"
            write_pair(folder / f"JPEGImages/{image_id}.jpg", label, own, [*range(21), 255])
            if number < 2:
                label = folder / f"SegmentationClass/{image_id}.png"
                write_palette(label, blocks(label, [*range(21), 255], own))


def write_pascal_context(root: Path, size: tuple[int, int] = SIZE) -> None:
    """JPEG images of two sizes, labels in which nothing is ignored, and an image that is in no list."""
    folder = root / "VOCdevkit/VOC2010"
    lists = {"train": ["2008_000002", "2008_000003"], "val": ["2008_000009", "2008_000016"]}
    for split, ids in lists.items():
        write_ids(folder / f"ImageSets/SegmentationContext/{split}.txt", ids)
        for image_id, own in zip(ids, (size, size[::-1]), strict=True):
            label = folder / f"SegmentationClassContext/{image_id}.png"
            write_pair(folder / f"JPEGImages/{image_id}.jpg", label, own, range(60))
    write_png(folder / "JPEGImages/2008_000001.jpg", noise(folder, *size, 3))


def write_coco(root: Path, size: tuple[int, int] = SIZE) -> None:
    """JPEG images of two sizes; labels of COCO-Stuff as published and in train ids."""
    for split, numbers in (("train", (9, 25)), ("val", (139, 285))):
        for number, own in zip(numbers, (size, size[::-1]), strict=True):
            label = root / f"annotations/{split}2017/{number:012d}_labelTrainIds.png"
            write_pair(root / f"images/{split}2017/{number:012d}.jpg", label, own, [*range(171), 255])
            write_png(label.with_name(f"{number:012d}.png"), blocks(label, [0, 181, 255], own))


def write_coco_2014(root: Path, size: tuple[int, int] = SIZE) -> None:
    """JPEG images of two sizes, labels in ids 0..80, and an image that is not in the list."""
    folder = root / "COCO2014"
    names = [f"COCO_val2014_{number:012d}" for number in (42, 73, 74)]
    for name, own in zip(names, (size, size[::-1], size), strict=True):
        label = folder / f"coco_seg_anno/{name[-12:]}.png"
        write_pair(folder / f"images/val2014/{name}.jpg", label, own, range(81))
    write_ids(folder / "val_5k_id.txt", names[:2])


def write_dark_zurich(root: Path, size: tuple[int, int] = SIZE) -> None:
    """Images at night with labels in train ids."""
    for frame in (321, 373):
        stem = f"val/night/GOPR0356/GOPR0356_frame_{frame:06d}"
        write_pair(root / f"rgb_anon/{stem}_rgb_anon.png", root / f"gt/{stem}_gt_labelTrainIds.png", size)
