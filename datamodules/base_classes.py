"""The base classes of a few-shot fold as one segmentation task: what BAM's base learner is trained on."""

import numpy as np
from torch.utils.data import Dataset

from datamodules.auxiliary import FewShotImages
from datamodules.base import SegmentationDataModule
from datamodules.few_shot import FewShotDataModule
from datamodules.transforms import Transform
from functional.classes import IGNORE_INDEX, class_table


class BaseClassImages(Dataset):
    """Images with labels in a base learner's numbers; all else, novel classes too, is background.

    Args:
        images: in the data set's own ids.
        base_ids: of the base classes, in the order of their numbers, which start at 1.
    """

    def __init__(self, images: FewShotImages, base_ids: list[int]):
        self.images = images
        self.numbers = np.zeros(256, np.uint8)
        self.numbers[base_ids] = np.arange(1, 1 + len(base_ids))
        self.numbers[IGNORE_INDEX] = IGNORE_INDEX

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        image, label = self.images.read(index)
        return {"image": image, "label": self.numbers[label], "name": self.images.name(index)}


class BaseClassesDataModule(SegmentationDataModule):
    """All training images of a few-shot data set, those with novel classes too; scored on its test images.

    Args:
        few_shot: the data set; its fold says which classes are novel.
        classes: name of the class table of the fold's base classes, such as pascal5i_base0.
        batch_size, eval_batch_size, num_workers, seed, transform: see SegmentationDataModule.

    Raises:
        ValueError: the table is of another fold.
    """

    def __init__(
        self,
        few_shot: FewShotDataModule,
        classes: str,
        batch_size: int = 12,
        eval_batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        transform: Transform | None = None,
    ):
        super().__init__(batch_size, eval_batch_size, num_workers, seed, transform)
        self.few_shot, self.classes = few_shot, classes
        base_ids, table = few_shot.base_learner_ids(), class_table(classes)
        if not classes.endswith(f"_base{few_shot.fold}") or len(table) != 1 + len(base_ids):
            raise ValueError(
                f"The class table {classes!r} is not that of fold {few_shot.fold}: found {len(table)} classes"
                f" in it, the fold has background and {len(base_ids)}. Set the same fold in both, as in "
                "pascal5i_base0 and fold 0."
            )
        self.sets = {
            split: BaseClassImages(few_shot.images(split), base_ids) for split in ("train", "val", "test")
        }

    def train_dataset(self) -> Dataset:
        return self.sets["train"]

    def eval_datasets(self, split: str) -> dict[str, Dataset]:
        return {"base": self.sets[split]}
