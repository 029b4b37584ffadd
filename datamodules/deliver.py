"""DELIVER: rendered streets in five weathers; here its depth images (arXiv 2303.01480)."""

from datamodules.files import FileDataModule, Layout
from datamodules.label_maps import DELIVER_STREET


class DeliverDataModule(FileDataModule):
    """DELIVER depth, front view: 3983 training images without labels, 1897 labelled test images, 1042x1042.

    Layout: depth/WEATHER/SPLIT/MAP_m_pointP/*_depth_front.png and, for the test split, the same with
    `semantic` for `depth`, colour files with the ids in the first channel. The split `val` is not used.
    """

    layout = Layout(
        title="DELIVER",
        images={split: f"depth/*/{split}/*/*_depth_front.png" for split in ("train", "test")},
        labelled=("test",),
        stored_names={"deliver11": DELIVER_STREET},
        counts={
            "train": {"cloud": 794, "fog": 795, "night": 797, "rain": 799, "sun": 798},
            "test": {"cloud": 379, "fog": 379, "night": 379, "rain": 380, "sun": 380},
        },
        size=(1042, 1042),
        first_channel=True,
    )

    def label_of(self, image: str) -> str:
        return f"semantic/{image.removeprefix('depth/').removesuffix('_depth_front.png')}_semantic_front.png"
