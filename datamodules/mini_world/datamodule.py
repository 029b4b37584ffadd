"""The mini world as DataModules: nothing to download, drawn on the fly and kept in memory."""

from torch.utils.data import Dataset

from datamodules.base import SegmentationDataModule
from datamodules.mini_world.dataset import MiniObjectsDataset, MiniStreetDataset
from datamodules.mini_world.objects import CATEGORIES
from datamodules.mini_world.street import CONDITIONS
from datamodules.transforms import Transform

EVALUATION_SPLITS = ("val", "test")


class MiniStreetDataModule(SegmentationDataModule):
    """Street scenes; one evaluation set per condition, named by it, all of the same scenes.

    Args:
        train_style, eval_style: "game" or "real"; different ones make a domain gap.
        train_conditions: what training scenes take in turn; None leaves each its own (day 40 %, others 15 %).
        modality: sensor of the training images: "rgb", "depth", "infrared" or "event".
        eval_modality: sensor of the evaluation images; None for the same.
        eval_conditions: conditions of which there is an evaluation set; None for all five.
        size: side in pixels, 64..512.
        eval_size: that of the evaluation scenes; None for the same.
        train_length: number of training scenes.
        train_offset: index of the first of them, so that source and target need not show the same scenes.
        eval_length: number of scenes of each evaluation set.
        classes: name of the class table; street scenes have deliver11 only.
        batch_size, eval_batch_size, num_workers, seed, transform: see SegmentationDataModule.
    """

    def __init__(
        self,
        train_style: str = "real",
        eval_style: str = "real",
        train_conditions: list[str] | None = None,
        modality: str = "rgb",
        eval_modality: str | None = None,
        eval_conditions: list[str] | None = None,
        size: int = 128,
        eval_size: int | None = None,
        train_length: int = 2000,
        train_offset: int = 0,
        eval_length: int = 50,
        classes: str = "deliver11",
        batch_size: int = 8,
        eval_batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        transform: Transform | None = None,
    ):
        super().__init__(batch_size, eval_batch_size, num_workers, seed, transform)
        self.classes = _only_table(classes, "deliver11")
        self.train_set = MiniStreetDataset(
            "train", train_length, train_style, train_conditions, modality, size, train_offset
        )
        # Built here, not when a loader asks: a wrong value is an error at once, and drawn scenes stay.
        self.eval_sets = {
            split: {
                condition: MiniStreetDataset(
                    split, eval_length, eval_style, [condition], eval_modality or modality, eval_size or size
                )
                for condition in eval_conditions or CONDITIONS
            }
            for split in EVALUATION_SPLITS
        }

    def train_dataset(self) -> Dataset:
        return self.train_set

    def eval_datasets(self, split: str) -> dict[str, Dataset]:
        return self.eval_sets[split]


class MiniObjectsDataModule(SegmentationDataModule):
    """Object scenes; one evaluation set, "objects".

    Args:
        categories: what may be drawn; None for all. The ids stay those of the whole table.
        size: side in pixels, 64..512.
        train_length, eval_length: numbers of scenes.
        classes: name of the class table; object scenes have mini_objects only.
        batch_size, eval_batch_size, num_workers, seed, transform: see SegmentationDataModule.
    """

    def __init__(
        self,
        categories: list[str] | None = None,
        size: int = 64,
        train_length: int = 2000,
        eval_length: int = 200,
        classes: str = "mini_objects",
        batch_size: int = 16,
        eval_batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        transform: Transform | None = None,
    ):
        super().__init__(batch_size, eval_batch_size, num_workers, seed, transform)
        self.classes = _only_table(classes, "mini_objects")
        drawn = CATEGORIES if categories is None else categories
        self.train_set = MiniObjectsDataset("train", train_length, size, drawn)
        self.eval_sets = {
            split: {"objects": MiniObjectsDataset(split, eval_length, size, drawn)}
            for split in EVALUATION_SPLITS
        }

    def train_dataset(self) -> Dataset:
        return self.train_set

    def eval_datasets(self, split: str) -> dict[str, Dataset]:
        return self.eval_sets[split]


def _only_table(given: str, own: str) -> str:
    if given != own:
        raise ValueError(
            f"These scenes are labelled with the class table {own!r} only: found {given!r}. "
            f"Set data.init_args.classes to {own} or leave it out."
        )
    return own
