"""GTA5: streets of a computer game with labels (Playing for Data, arXiv 1608.02192)."""

from datamodules.files import FileDataModule, Layout


class GTA5DataModule(FileDataModule):
    """GTA5: 24966 labelled images, mostly 1914x1052, all for training; 19 classes.

    Layout: images/NNNNN.png and labels/NNNNN_labelTrainIds.png, which scripts/convert_labels.py makes of the
    published labels/NNNNN.png. Some labels differ from their image by a few pixels.
    """

    layout = Layout(
        title="GTA5",
        images={"train": "images/*.png"},
        labelled=("train",),
        counts={"train": {"images": 24966}},
        size=(1052, 1914),
        same_size=False,
    )

    def label_of(self, image: str) -> str:
        return f"labels/{image.removeprefix('images/').removesuffix('.png')}_labelTrainIds.png"
