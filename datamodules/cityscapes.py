"""Cityscapes: street scenes of 50 cities, fine labels in 19 train ids."""

from datamodules.files import FileDataModule, Layout
from datamodules.label_maps import CITYSCAPES_STREET, TRAIN_IDS


class CityscapesDataModule(FileDataModule):
    """Cityscapes: 2975 training and 500 validation images of 2048x1024, which serve as test set as well.

    Layout: leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and gtFine/SPLIT/CITY/*_gtFine_labelTrainIds.png; the
    labels are made by createTrainIdLabelImgs.py of cityscapesScripts or scripts/convert_labels.py.
    """

    layout = Layout(
        title="Cityscapes",
        images={split: f"leftImg8bit/{split}/*/*_leftImg8bit.png" for split in ("train", "val")},
        labelled=("train", "val"),
        stored_names={"deliver11": CITYSCAPES_STREET, "fmb9": CITYSCAPES_STREET, "cityscapes19": TRAIN_IDS},
        counts={"train": {"train": 2975}, "val": {"val": 500}},
        size=(1024, 2048),
        list_keys=("source_data", "RGB"),
    )

    def label_of(self, image: str) -> str:
        stem = image.removeprefix("leftImg8bit/").removesuffix("_leftImg8bit.png")
        return f"gtFine/{stem}_gtFine_labelTrainIds.png"
