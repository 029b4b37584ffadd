"""PASCAL-5i: the 20 objects of PASCAL VOC 2012 in four folds of five (OSLSM, arXiv 1709.03410)."""

from functools import cached_property

from datamodules.few_shot_files import FileFewShotDataModule, FileImages, Listed, read_list
from datamodules.files import Pair
from datamodules.label_maps import lookup_table
from functional.classes import FOLDS, VOC21

# What prompts call the classes 1..20 (the words of DifFSS's code).
NAMES = (
    *("airplane", "bicycle", "bird", "boat", "bottle"),
    *("bus", "car", "cat", "chair", "cow"),
    *("dining table", "dog", "horse", "motorbike", "person"),
    *("potted plant", "sheep", "sofa", "train", "television"),
)


class Pascal5iDataModule(FileFewShotDataModule):
    """PASCAL-5i: 5953 training and 1449 validation images of many sizes; 5 novel and 15 base classes a fold.

    Layout: below VOCdevkit/VOC2012 (or VOC2012), JPEGImages/ID.jpg, SegmentationClassAug/ID.png (ids 0..20,
    255 ignored) and ImageSets/Segmentation/val.txt; and voc_sbd_merge_noduplicate.txt, the published training
    list. HSNet's lists, of lines ID__CLASS, give the (image, class) pairs themselves.
    """

    @cached_property
    def folder(self) -> str:
        """Folder of the set below the root."""
        return "VOC2012" if (self.root / "VOC2012").is_dir() else "VOCdevkit/VOC2012"

    def lines(self, split: str) -> list[Listed]:
        """Read the list of a split's images."""
        option, own = "test_list", self.root / self.folder / "ImageSets/Segmentation/val.txt"
        if split == "train":
            option, own = "train_list", self.root / "voc_sbd_merge_noduplicate.txt"
        return read_list(self.list_path(option, own), option)

    def load_images(self, split: str) -> FileImages:
        if split == "test":
            return self.images("val")
        stems = list(dict.fromkeys(line.name for line in self.lines(split)))
        folders = ("JPEGImages/{}.jpg", "SegmentationClassAug/{}.png")
        pairs = [Pair(*(f"{self.folder}/{file.format(stem)}" for file in folders)) for stem in stems]
        names = dict(enumerate(NAMES, 1))
        table = lookup_table(VOC21.names, "voc21")
        return FileImages(self.root, "pascal", names, pairs, stems, table, self.num_workers)

    def listed_pairs(self, split: str) -> list[tuple[int, int]] | None:
        lines, images = self.lines(split), self.images(split)
        if all(line.class_id is None for line in lines):
            return None
        index = {stem: i for i, stem in enumerate(images.stems)}
        pairs = [(index[line.name], line.class_id) for line in lines]
        if wrong := [line for line, (i, c) in zip(lines, pairs, strict=True) if c not in images.areas[i]]:
            raise ValueError(
                f"The list of {split} images does not fit the labels: found {wrong[0].name} with class "
                f"{wrong[0].class_id}, which its label does not show. Check the list and the labels."
            )
        return pairs

    def novel_ids(self, split: str) -> list[int]:
        return list(FOLDS["pascal5i"][1][self.fold])
