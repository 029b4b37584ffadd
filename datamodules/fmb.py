"""FMB: registered visible and infrared street images; here the infrared ones."""

from datamodules.files import FileDataModule, Layout
from datamodules.label_maps import FMB_STREET


class FMBDataModule(FileDataModule):
    """FMB infrared: 1220 training images without labels, 280 labelled test images, 800x600.

    Layout: train/Infrared/NNNNN.png, test/Infrared/NNNNN.png and test/Label/NNNNN.png.
    """

    layout = Layout(
        title="FMB",
        images={split: f"{split}/Infrared/*.png" for split in ("train", "test")},
        labelled=("test",),
        stored_names={"fmb9": FMB_STREET},
        counts={"train": {"Infrared": 1220}, "test": {"Infrared": 280}},
        size=(600, 800),
    )

    def label_of(self, image: str) -> str:
        return image.replace("/Infrared/", "/Label/")
