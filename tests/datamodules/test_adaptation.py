"""Two data sets in one batch, and what a target sample may tell."""

import pytest
import torch

from cli import build
from datamodules.adaptation import AdaptationDataModule
from datamodules.mini_world.datamodule import MiniStreetDataModule
from lightning_modules.supervised import Supervised
from tests.label_files import RARE, SIZE, LabelFiles, adaptation, assert_same, first_batches, forget_labels
from tests.tiny_training import TinyDataModule, TinyDataset, TinyNetwork, tiny_trainer

# --- a batch


def test_a_batch_holds_labelled_source_and_unlabelled_target_images():
    batch = first_batches(adaptation(), 1)[0]
    assert batch["source"]["image"].shape == batch["target"]["image"].shape == (2, 3, SIZE, SIZE)
    assert batch["source"]["image"].dtype == batch["target"]["image"].dtype == torch.float32
    assert batch["source"]["label"].shape == (2, SIZE, SIZE) and batch["source"]["label"].dtype == torch.int64
    assert set(batch["target"]) == {"image", "name"}
    assert all(name.startswith("source") for name in batch["source"]["name"])
    assert all(name.startswith("tiny-0") for name in batch["target"]["name"])


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_are_the_same_for_any_number_of_workers(workers):
    assert_same(first_batches(adaptation()), first_batches(adaptation(num_workers=workers)))


def test_a_run_that_goes_on_draws_what_it_would_have_drawn():
    data = adaptation()
    data.load_state_dict({"batches_drawn": 3})
    assert_same(first_batches(data, 2), first_batches(adaptation())[3:])


def test_ranks_share_the_batches_of_a_single_process_between_them(monkeypatch):
    alone, shares = first_batches(adaptation(batch_size=4), 3), []
    for rank in (0, 1):
        data = adaptation()
        monkeypatch.setattr(data, "rank_and_world_size", lambda rank=rank: (rank, 2))
        shares.append(first_batches(data, 3))
    for part in ("source", "target"):
        names = [a[part]["name"] + b[part]["name"] for a, b in zip(*shares, strict=True)]
        assert names == [batch[part]["name"] for batch in alone]


def test_seed_changes_both_parts_and_they_are_drawn_independently_of_each_other():
    plain, other = (first_batches(adaptation(seed=seed), 1)[0] for seed in (0, 1))
    assert all(plain[part]["name"] != other[part]["name"] for part in ("source", "target"))
    street = {"size": 64, "train_length": 8, "eval_length": 1}
    data = AdaptationDataModule(MiniStreetDataModule(**street), MiniStreetDataModule(**street), batch_size=8)
    batch = first_batches(data, 1)[0]
    assert sorted(batch["source"]["name"]) == sorted(batch["target"]["name"])
    assert batch["source"]["name"] != batch["target"]["name"]


def test_a_target_sample_is_the_same_whether_it_has_a_label_or_not(monkeypatch):
    with_label = first_batches(adaptation(), 1)[0]["target"]
    forget_labels(monkeypatch, TinyDataset)
    assert torch.equal(with_label["image"], first_batches(adaptation(), 1)[0]["target"]["image"])


def test_the_targets_evaluation_sets_are_scored():
    data = adaptation(eval_batch_size=3)
    assert data.val_set_names == data.test_set_names == ["day", "night"]
    assert [batch["name"] for batch in data.val_dataloader()[0]] == [["tiny-1-0", "tiny-1-1", "tiny-1-2"]]


def test_counting_and_drawing_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    first_batches(adaptation(), 1)
    assert torch.equal(before, torch.get_rng_state())


def test_training_counts_the_batches_that_it_used(tmp_path):
    class SourceOnly(Supervised):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["source"], batch_idx)

    data = adaptation(num_workers=1)
    module = SourceOnly(TinyNetwork(), "deliver11", lr=1e-2)
    tiny_trainer(tmp_path, 3, enable_checkpointing=False).fit(module, datamodule=data)
    assert data.state_dict() == {"batches_drawn": 3, "replaced": 0}


def test_different_class_tables_are_an_error():
    target = TinyDataModule()
    target.classes = "mini_objects"
    with pytest.raises(ValueError, match="found 'deliver11' and 'mini_objects'"):
        adaptation(target)


@pytest.mark.parametrize("options", [None, RARE])
def test_a_source_without_labels_is_an_error_that_names_it(options, monkeypatch):
    forget_labels(monkeypatch, LabelFiles)
    with pytest.raises(ValueError, match="found none in the training set of Source"):
        adaptation(rare_class_sampling=options).train_dataloader()


def test_the_mini_world_adapts_from_plain_config_values_and_counts_its_labels_itself():
    street = "datamodules.mini_world.datamodule.MiniStreetDataModule"
    size = {"size": 64, "train_length": 6, "eval_length": 1}
    options = {
        "source": {"class_path": street, "init_args": size},
        "target": {"class_path": street, "init_args": {**size, "modality": "depth", "train_offset": 6}},
        "rare_class_sampling": {"min_pixels": 2, "min_crop_pixels": 1},
    }
    _, data = build(
        {"data": {"class_path": "datamodules.adaptation.AdaptationDataModule", "init_args": options}}
    )
    batches = first_batches(data, 12)
    numbers = {
        part: {int(b[part]["name"][0].split("-")[2]) for b in batches} for part in ("source", "target")
    }
    assert numbers["source"] <= set(range(6)) and numbers["target"] == set(range(6, 12))
