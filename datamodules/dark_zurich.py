"""Dark Zurich: street scenes at night."""

from datamodules.files import FileDataModule, Layout


class DarkZurichDataModule(FileDataModule):
    """Dark Zurich: 50 labelled validation images of 1920x1080, for scoring only; 19 classes.

    Layout: rgb_anon/val/night/SEQUENCE/*_rgb_anon.png and the same with gt for rgb_anon and
    *_gt_labelTrainIds.png, published in train ids. The labels of the test images are withheld.
    """

    layout = Layout(
        title="Dark Zurich",
        images={"val": "rgb_anon/val/night/*/*_rgb_anon.png"},
        labelled=("val",),
        counts={"val": {"val": 50}},
        size=(1080, 1920),
    )

    def label_of(self, image: str) -> str:
        return f"gt/{image.removeprefix('rgb_anon/').removesuffix('_rgb_anon.png')}_gt_labelTrainIds.png"
