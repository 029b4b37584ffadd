"""DSEC: driving sequences of event cameras; here the grey edge images that MADM's authors made of them."""

from pathlib import PurePosixPath

from datamodules.files import FileDataModule, Layout
from datamodules.label_maps import DSEC_STREET


class DSECDataModule(FileDataModule):
    """DSEC events: 4037 training images without labels, 2806 labelled test images (DSEC-Semantic), 640x440.

    Layout: 69mask_train_edges/SEQUENCE/NNNNNN.png (every second frame, from 2 on, is used),
    69mask_test_edges/SEQUENCE/NNNNNN.png (from 1 on) and test_semantic_labels/SEQUENCE/11classes/NNNNNN.png.
    """

    layout = Layout(
        title="DSEC",
        images={split: f"69mask_{split}_edges/*/" + 6 * "[0-9]" + ".png" for split in ("train", "test")},
        labelled=("test",),
        stored_names={"deliver11": DSEC_STREET},
        counts={
            "train": {
                "zurich_city_00_a": 469,
                "zurich_city_01_a": 340,
                "zurich_city_02_a": 117,
                "zurich_city_04_a": 350,
                "zurich_city_05_a": 876,
                "zurich_city_06_a": 761,
                "zurich_city_07_a": 731,
                "zurich_city_08_a": 393,
            },
            "test": {"zurich_city_13_a": 378, "zurich_city_14_c": 1190, "zurich_city_15_a": 1238},
        },
        size=(440, 640),
    )

    def wanted(self, split: str, image: str) -> bool:
        frame = int(PurePosixPath(image).stem)
        return frame >= 1 and (split == "test" or frame % 2 == 0)

    def label_of(self, image: str) -> str:
        _, sequence, name = image.split("/")
        return f"test_semantic_labels/{sequence}/11classes/{name}"
