"""PASCAL VOC 2012: photographs of 20 kinds of objects; and the lists of image ids that such sets have."""

import re
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Literal

from datamodules.files import FileDataModule, FileDataset, Layout, Pair
from datamodules.transforms import Transform
from functional.classes import VOC21


class IdLists:
    """Splits by text files of image ids, one a line: file names without suffix. Stands before FileDataModule.

    The options train_list and test_list then name such files too. A class that gives no `id_list` takes,
    without these options, all images in a split's folder.
    """

    id_list: str | None = None  # path of a split's published list below the root, with {split}

    def find(self, split: str) -> FileDataset:
        if self.id_list is not None and self.lists[split] is None:
            self.lists[split] = self.root / self.id_list.format(split=split)
        return super().find(split)

    def listed_pairs(self, split: str, path: Path) -> list[Pair]:
        """Return the images whose ids a file lists, with their labels.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds no ids, another thing than ids, or one twice.
        """
        option = "train_list" if split == "train" else "test_list"
        if not path.is_file():
            raise FileNotFoundError(
                f"{self.layout.title} has no list of {split} images: looked for {path} and found none. "
                f"Set root, or {option} to a text file of one image id a line; see docs/datasets.md."
            )
        lines = path.read_text("utf-8", errors="replace").splitlines()
        ids = Counter(line.strip() for line in lines if line.strip())
        wrong = [line for line, times in ids.items() if times > 1 or not re.fullmatch(r"[\w-]+", line)]
        if wrong or not ids:
            found = f"{wrong[0][:80]!r}, {ids[wrong[0]]} times" if wrong else "none"
            raise ValueError(
                f"{path} is no list of {self.layout.title}'s {split} images: found {found}. Each line must "
                f"hold the name of one image without its suffix, and none comes twice; correct {option}."
            )
        images = [self.layout.images[split].replace("*", image_id) for image_id in ids]
        return [Pair(image, self.label_of(image)) for image in images]


class PascalVOCDataModule(IdLists, FileDataModule):
    """PASCAL VOC 2012: 1464 training and 1449 validation images of many sizes; background and 20 classes.

    Layout: below VOCdevkit/VOC2012, JPEGImages/ID.jpg, SegmentationClassAug/ID.png (ids 0..20, 255 ignored)
    and ImageSets/Segmentation/{train,val}.txt. With train_aug.txt, which has labels in
    SegmentationClassAug alone, as `train_list` training has 10582 images. Images keep their size:
    eval_batch_size 1.

    Args:
        labels: folder of the labels: those with the contours of SBD (Hariharan et al., ICCV 2011) added, or
            VOC's own.
        root, classes, eval_size, eval_fit, rescale_16_bit, batch_size, eval_batch_size, num_workers, seed,
            transform: see FileDataModule.
        train_list, test_list: see IdLists.
    """

    layout = Layout(
        title="PASCAL VOC",
        images=dict.fromkeys(("train", "val"), "VOCdevkit/VOC2012/JPEGImages/*.jpg"),
        labelled=("train", "val"),
        counts={"train": {"VOC2012": 1464}, "val": {"VOC2012": 1449}},
        size=None,
        stored_names={"voc21": VOC21.names},
    )
    id_list = "VOCdevkit/VOC2012/ImageSets/Segmentation/{split}.txt"

    def __init__(
        self,
        root: str | Path,
        classes: str | None = None,
        labels: Literal["SegmentationClassAug", "SegmentationClass"] = "SegmentationClassAug",
        eval_size: tuple[int, int] | None = None,
        eval_fit: tuple[int, int] | None = None,
        train_list: str | Path | None = None,
        test_list: str | Path | None = None,
        rescale_16_bit: bool = False,
        batch_size: int = 1,
        eval_batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        transform: Transform | None = None,
    ):
        files = (root, classes, eval_size, eval_fit, train_list, test_list, rescale_16_bit)
        super().__init__(*files, batch_size, eval_batch_size, num_workers, seed, transform)
        self.labels = labels

    def label_of(self, image: str) -> str:
        return f"VOCdevkit/VOC2012/{self.labels}/{PurePosixPath(image).stem}.png"
