"""SYNTHIA (RAND-CITYSCAPES): rendered streets with labels."""

from datamodules.files import FileDataModule, Layout


class SYNTHIADataModule(FileDataModule):
    """SYNTHIA RAND-CITYSCAPES: 9400 labelled images of 1280x760, all for training; 16 of 19 classes.

    Layout: RGB/*.png and GT/LABELS/*_labelTrainIds.png, which scripts/convert_labels.py makes of the
    published GT/LABELS/*.png. There is no terrain, truck or train.
    """

    layout = Layout(
        title="SYNTHIA",
        images={"train": "RGB/*.png"},
        labelled=("train",),
        counts={"train": {"RGB": 9400}},
        size=(760, 1280),
    )

    def label_of(self, image: str) -> str:
        return f"GT/LABELS/{image.removeprefix('RGB/').removesuffix('.png')}_labelTrainIds.png"
