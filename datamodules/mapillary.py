"""Mapillary Vistas: street scenes of the whole world, taken by many cameras."""

from datamodules.files import FileDataModule, Layout


class MapillaryDataModule(FileDataModule):
    """Mapillary Vistas 1.2: 2000 labelled validation images of many sizes, for scoring only; 19 classes.

    Layout: validation/images/*.jpg and validation/labels/*_labelTrainIds.png, which scripts/convert_labels.py
    makes of the published validation/labels/*.png.
    """

    layout = Layout(
        title="Mapillary",
        images={"val": "validation/images/*.jpg"},
        labelled=("val",),
        counts={"val": {"images": 2000}},
        size=None,
    )

    def label_of(self, image: str) -> str:
        return image.replace("/images/", "/labels/").replace(".jpg", "_labelTrainIds.png")
