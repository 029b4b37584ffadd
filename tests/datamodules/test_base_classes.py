"""Images of base classes for a base learner: its numbers, what is background, and folds that do not fit."""

import numpy as np
import pytest

from datamodules.base_classes import BaseClassesDataModule
from datamodules.pascal5i import Pascal5iDataModule
from functional.classes import class_table
from tests.fake_few_shot import write_pascal5i


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voc")
    write_pascal5i(folder)
    return folder


def test_base_classes_are_numbered_in_order_and_novel_ones_are_background(root):
    few_shot = Pascal5iDataModule(root, fold=1)
    data = BaseClassesDataModule(few_shot, "pascal5i_base1")
    samples = data.train_dataset()
    assert len(samples) == 60  # images with novel classes are kept
    for i in range(20):
        found = set(np.unique(samples[i]["label"])) - {255}
        own = i + 1
        expected = {0} if 6 <= own <= 10 else {0, own if own < 6 else own - 5}
        assert found == expected | ({1} if i == 6 else set())
    names = class_table("pascal5i_base1").names
    assert len(names) == 16 and names[6] == "diningtable"
    assert list(data.eval_datasets("test")) == ["base"] and len(data.eval_datasets("val")["base"]) == 40


def test_the_table_of_another_fold_is_refused(root):
    with pytest.raises(ValueError, match="not that of fold 0"):
        BaseClassesDataModule(Pascal5iDataModule(root, fold=0), "pascal5i_base1")
