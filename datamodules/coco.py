"""COCO-Object: photographs in which the things of 80 categories are labelled, all else being background."""

from datamodules.files import FileDataModule, FileDataset, Layout
from datamodules.pascal_voc import IdLists
from functional.classes import COCO81, IGNORE_INDEX

THINGS, STUFF = COCO81.names[1:], ("background",) * 91  # the train ids of COCO-Stuff


class COCODataModule(IdLists, FileDataModule):
    """COCO-Object of COCO 2017: 118287 training and 5000 validation images of many sizes; 81 classes.

    Layout: images/SPLIT2017/NNNNNNNNNNNN.jpg and, of COCO-Stuff, annotations/SPLIT2017/*_labelTrainIds.png,
    which mmsegmentation's coco_stuff164k.py makes of the published files. Things, 0..79 there, are 1..80
    here; stuff and what has no label, 255, are background, as in GroupViT (arXiv 2202.11094), so that nothing
    is ignored. Images keep their size: eval_batch_size 1.
    """

    layout = Layout(
        title="COCO",
        images={split: f"images/{split}2017/*.jpg" for split in ("train", "val")},
        labelled=("train", "val"),
        counts={"train": {"train2017": 118287}, "val": {"val2017": 5000}},
        size=None,
        stored_names={"coco81": THINGS + STUFF},
    )

    def label_of(self, image: str) -> str:
        return f"annotations/{image.removeprefix('images/').removesuffix('.jpg')}_labelTrainIds.png"

    def find(self, split: str) -> FileDataset:
        dataset = super().find(split)
        dataset.label_map[IGNORE_INDEX] = 0
        return dataset


class COCO2014DataModule(IdLists, FileDataModule):
    """COCO-Object in the layout of DiffSegmenter's authors: 5000 validation images of COCO 2014; 81 classes.

    Layout: below COCO2014, images/val2014/COCO_val2014_NNNNNNNNNNNN.jpg, coco_seg_anno/NNNNNNNNNNNN.png (ids
    0..80, 255 ignored) and val_5k_id.txt, the names of the images: the same 5000 photographs. For scoring.
    """

    layout = Layout(
        title="COCO 2014",
        images={"val": "COCO2014/images/val2014/*.jpg"},
        labelled=("val",),
        counts={"val": {"images": 5000}},
        size=None,
        stored_names={"coco81": COCO81.names},
    )
    id_list = "COCO2014/val_5k_id.txt"

    def label_of(self, image: str) -> str:
        return f"COCO2014/coco_seg_anno/{image.rpartition('_')[2].removesuffix('.jpg')}.png"
