"""Training batches do not depend on workers; evaluation sets come in order, each image once."""

from itertools import islice

import pytest
import torch

from datamodules.base import SegmentationDataModule, TrainingSamples
from tests.tiny_training import TinyDataModule, TinyDataset


def first_batches(data: SegmentationDataModule, count: int = 6) -> list[dict]:
    return list(islice(data.train_dataloader(), count))


def assert_same(a: list[dict], b: list[dict]):
    for x, y in zip(a, b, strict=True):
        assert x["name"] == y["name"]
        assert torch.equal(x["image"], y["image"]) and torch.equal(x["label"], y["label"])


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_are_the_same_for_any_number_of_workers(workers):
    assert_same(first_batches(TinyDataModule()), first_batches(TinyDataModule(num_workers=workers)))


def test_a_batch_holds_float_images_and_integer_labels():
    batch = first_batches(TinyDataModule(), 1)[0]
    assert batch["image"].shape == (2, 3, 16, 16) and batch["image"].dtype == torch.float32
    assert batch["image"].min() >= 0 and 0.5 < batch["image"].max() <= 1 and batch["image"].is_contiguous()
    assert batch["label"].shape == (2, 16, 16) and batch["label"].dtype == torch.int64
    assert isinstance(batch["name"], list) and len(batch["name"]) == 2


def test_a_sample_drawn_again_is_augmented_anew():
    data = TinyDataModule()
    samples = TrainingSamples(data.train_dataset(), data.transform, seed=0)
    first, again, later = samples[3, 3], samples[3, 3], samples[3, 10]
    assert first["name"] == later["name"]
    assert torch.equal(first["image"], again["image"]) and not torch.equal(first["image"], later["image"])


def test_seed_and_batch_size_change_the_batches():
    assert first_batches(TinyDataModule(seed=1))[0]["name"] != first_batches(TinyDataModule())[0]["name"]
    assert len(first_batches(TinyDataModule(batch_size=3))[0]["name"]) == 3


def test_without_a_transform_training_sees_the_samples_as_they_are():
    data = TinyDataModule()
    data.transform = None
    batch = first_batches(data, 1)[0]
    index = int(batch["name"][0].split("-")[-1])
    assert (batch["label"][0] == torch.from_numpy(TinyDataset(7)[index]["label"])).all()


def test_training_goes_on_after_the_batches_of_its_state():
    data = TinyDataModule()
    data.load_state_dict({"batches_drawn": 4})
    assert data.state_dict() == {"batches_drawn": 4, "replaced": 0}
    assert_same(first_batches(data, 2), first_batches(TinyDataModule())[4:])


def test_evaluation_has_one_loader_for_each_set_in_order_and_reads_each_image_once():
    data = TinyDataModule()
    assert data.val_set_names == data.test_set_names == ["day", "night"]
    names = [[name for batch in loader for name in batch["name"]] for loader in data.val_dataloader()]
    assert names == [["tiny-1-0", "tiny-1-1", "tiny-1-2"], ["tiny-2-0", "tiny-2-1"]]
    assert [batch["name"] for batch in data.test_dataloader()[0]] == [
        ["tiny-11-0", "tiny-11-1"],
        ["tiny-11-2"],
    ]


def test_processes_share_the_images_of_an_evaluation_set_between_them(monkeypatch):
    names = []
    for rank in (0, 1):
        data = TinyDataModule()
        monkeypatch.setattr(data, "rank_and_world_size", lambda rank=rank: (rank, 2))
        names.append([name for batch in data.val_dataloader()[0] for name in batch["name"]])
    assert names == [["tiny-1-0", "tiny-1-2"], ["tiny-1-1"]]


def test_a_set_with_fewer_images_than_processes_is_an_error_that_names_it(monkeypatch):
    data = TinyDataModule()
    monkeypatch.setattr(data, "rank_and_world_size", lambda: (0, 3))
    with pytest.raises(ValueError, match="val set 'night' is too small: found 2 images for 3 processes"):
        data.val_dataloader()


def test_loaders_leave_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    data = TinyDataModule()
    first_batches(data, 1)
    [list(loader) for loader in data.val_dataloader()]
    assert torch.equal(before, torch.get_rng_state())


def test_a_hung_worker_is_noticed():
    assert TinyDataModule(num_workers=1).train_dataloader().timeout == 300
    assert TinyDataModule().train_dataloader().timeout == 0
