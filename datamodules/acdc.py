"""ACDC: street scenes in fog, at night, in rain and in snow."""

from collections import defaultdict

from torch.utils.data import Dataset, Subset

from datamodules.files import FileDataModule, Layout


class ACDCDataModule(FileDataModule):
    """ACDC: labelled training images and 406 validation images of 1920x1080; 19 classes.

    Layout: rgb_anon/CONDITION/SPLIT/SEQUENCE/*_rgb_anon.png and the same with gt for rgb_anon and
    *_gt_labelTrainIds.png, published in train ids. Each condition is an evaluation set of its own: acdc-fog,
    acdc-night, acdc-rain, acdc-snow. Where there is only DAFormer's layout without conditions,
    rgb_anon/SPLIT/*_rgb_anon.png, there is one set, acdc.
    """

    layout = Layout(
        title="ACDC",
        images={split: f"rgb_anon/*/{split}/*/*_rgb_anon.png" for split in ("train", "val")},
        other_images={split: f"rgb_anon/{split}/*_rgb_anon.png" for split in ("train", "val")},
        labelled=("train", "val"),
        counts={"val": {"fog": 100, "night": 106, "rain": 100, "snow": 100}},
        size=(1080, 1920),
    )

    def label_of(self, image: str) -> str:
        return f"gt/{image.removeprefix('rgb_anon/').removesuffix('_rgb_anon.png')}_gt_labelTrainIds.png"

    def eval_datasets(self, split: str) -> dict[str, Dataset]:
        (dataset,) = super().eval_datasets(split).values()
        indices = defaultdict(list)
        for index, pair in enumerate(dataset.pairs):
            folder = pair.image.split("/")[1]
            indices["acdc" if folder == self.eval_split else f"acdc-{folder}"].append(index)
        return {name: Subset(dataset, own) for name, own in indices.items()}
