"""BDD100K: street scenes of the USA in all weathers; here the 10,000 images with semantic labels."""

from pathlib import PurePosixPath

from datamodules.files import FileDataModule, Layout


class BDD100KDataModule(FileDataModule):
    """BDD100K: 1000 labelled validation images of 1280x720, for scoring only; 19 classes.

    Layout: images/10k/val/*.jpg and labels/sem_seg/masks/val/*.png, or that of the older release,
    seg/images/val/*.jpg and seg/labels/val/*_train_id.png; published in train ids.
    """

    layout = Layout(
        title="BDD100K",
        images={"val": "images/10k/val/*.jpg"},
        other_images={"val": "seg/images/val/*.jpg"},
        labelled=("val",),
        counts={"val": {"10k": 1000}},
        size=(720, 1280),
    )

    def label_of(self, image: str) -> str:
        stem = PurePosixPath(image).stem
        older = image.startswith("seg/")
        return f"seg/labels/val/{stem}_train_id.png" if older else f"labels/sem_seg/masks/val/{stem}.png"
