"""PASCAL Context: photographs of VOC 2010 in which every pixel is labelled."""

from datamodules.files import FileDataModule, Layout
from datamodules.pascal_voc import IdLists
from functional.classes import CONTEXT60


class PascalContextDataModule(IdLists, FileDataModule):
    """PASCAL Context: 4996 training and 5104 validation images of many sizes; background and 59 classes.

    Layout: below VOCdevkit/VOC2010, JPEGImages/ID.jpg, SegmentationClassContext/ID.png (ids 0..59,
    which mmsegmentation's pascal_context.py makes of the published annotations) and
    ImageSets/SegmentationContext/{train,val}.txt. Id 0, none of the 59 classes, is scored like a class.
    Images keep their size: eval_batch_size 1.
    """

    layout = Layout(
        title="PASCAL Context",
        images=dict.fromkeys(("train", "val"), "VOCdevkit/VOC2010/JPEGImages/*.jpg"),
        labelled=("train", "val"),
        counts={"train": {"VOC2010": 4996}, "val": {"VOC2010": 5104}},
        size=None,
        stored_names={"context60": CONTEXT60.names},
    )
    id_list = "VOCdevkit/VOC2010/ImageSets/SegmentationContext/{split}.txt"

    def label_of(self, image: str) -> str:
        return image.replace("/JPEGImages/", "/SegmentationClassContext/").replace(".jpg", ".png")
