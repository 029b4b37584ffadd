"""Training samples whose files cannot be read, and what was asked for last (F17, F19)."""

from itertools import islice

import pytest

from datamodules.adaptation import AdaptationDataModule
from datamodules.base import ALWAYS_ALLOWED
from datamodules.generalization import GeneralizationDataModule
from datamodules.reading import UnreadableFile
from tests.fake_few_shot import FakeFewShot, FakeImages
from tests.faulty_data import DamagedFiles
from tests.label_files import RARE, LabelFiles, Source
from tests.tiny_training import TinyDataModule, assert_equal, tiny_module, tiny_trainer

pytestmark = pytest.mark.filterwarnings("ignore:Another training sample")


def first_batches(data, count: int = 6) -> list[dict]:
    return list(islice(data.train_dataloader(), count))


def names(batches) -> list[str]:
    return [name for batch in batches for name in batch["name"]]


# --- unreadable files


def test_by_default_an_unreadable_file_is_an_error_that_names_it_also_from_a_worker(tmp_path):
    for workers in (0, 1):
        data = DamagedFiles(tmp_path, [5], unreadable="error", num_workers=workers)
        with pytest.raises(UnreadableFile, match=r"5\.png cannot be read"):
            first_batches(data)
    assert DamagedFiles.unreadable == "error"


def test_the_next_sample_takes_the_place_of_one_that_cannot_be_read_and_is_counted(tmp_path):
    with_damage = first_batches(DamagedFiles(tmp_path, [5, 6, 11]))
    order = [int(name) for name in names(first_batches(DamagedFiles(tmp_path)))]
    replaced = {5: 7, 6: 7, 11: 0}
    assert names(with_damage) == [str(replaced.get(index, index)) for index in order]
    numbers = [n for batch in with_damage for n in batch["replaced"].tolist()]
    assert numbers == [{5: 2, 6: 1, 11: 1}.get(index, 0) for index in order]


def test_a_replaced_file_is_warned_of_by_name(tmp_path):
    with pytest.warns(UserWarning, match=r"takes the place of one: .*5\.png cannot be read"):
        first_batches(DamagedFiles(tmp_path, [5]))


def test_replacements_are_the_same_for_any_number_of_workers_and_after_a_resume(tmp_path):
    expected = first_batches(DamagedFiles(tmp_path, [5, 6]))
    for workers in (1, 2):
        assert_equal(first_batches(DamagedFiles(tmp_path, [5, 6], num_workers=workers)), expected)
    resumed = DamagedFiles(tmp_path, [5, 6])
    resumed.load_state_dict({"batches_drawn": 2})
    assert_equal(first_batches(resumed, 4), expected[2:])


def test_skipping_changes_nothing_where_all_files_are_whole(tmp_path):
    plain = first_batches(DamagedFiles(tmp_path, unreadable="error"))
    skipping = first_batches(DamagedFiles(tmp_path))
    assert all(batch.pop("replaced").tolist() == [0, 0] for batch in skipping)
    assert_equal(skipping, plain)


def test_a_hundred_unreadable_samples_in_a_row_are_replaced_and_more_are_an_error(tmp_path):
    assert len(first_batches(DamagedFiles(tmp_path, range(100), length=101), 50)) == 50
    with pytest.raises(UnreadableFile, match=r"More than 100 training samples in a row.*check_data"):
        first_batches(DamagedFiles(tmp_path, range(101), length=102), 51)


def test_the_composed_data_modules_skip_in_all_their_parts(tmp_path):
    class LabelsToo(DamagedFiles):
        def eval_datasets(self, split):
            raise AssertionError

    for part in ("source", "target"):
        (tmp_path / part).mkdir()
    parts = [LabelsToo(tmp_path / "source", [3], unreadable="error"), DamagedFiles(tmp_path / "target", [4])]
    data = AdaptationDataModule(*parts, batch_size=2)
    data.unreadable = "skip"
    batches = first_batches(data)
    for part in ("source", "target"):
        assert sum(batch[part]["replaced"].sum() for batch in batches) == 1
    data = GeneralizationDataModule(parts[0], parts[1:], batch_size=2)
    data.unreadable = "skip"
    assert sum(batch["replaced"].sum() for batch in first_batches(data)) == 1


def test_rare_class_sampling_draws_another_image_for_one_that_cannot_be_read(monkeypatch):
    whole, damaged = LabelFiles.__getitem__, []

    def read(self, index):
        if index in damaged:
            raise UnreadableFile(f"{index} is damaged")
        return whole(self, index)

    monkeypatch.setattr(LabelFiles, "__getitem__", read)
    data = AdaptationDataModule(Source(), TinyDataModule(), RARE, batch_size=2)
    data.unreadable = "skip"
    before = [name for batch in first_batches(data) for name in batch["source"]["name"]]
    damaged.append(int(before[1].split("-")[1]))
    batches = first_batches(data)
    after = [name for batch in batches for name in batch["source"]["name"]]
    numbers = [n for batch in batches for n in batch["source"]["replaced"].tolist()]
    assert numbers[1] > 0 and before[1] not in after
    assert all((a == b) == (n == 0) for a, b, n in zip(after, before, numbers, strict=True))


def test_an_episode_with_an_unreadable_support_or_query_gives_way_to_another(monkeypatch):
    whole, damaged = FakeImages.read, []

    def read(self, index):
        if index in damaged:
            raise UnreadableFile(f"{index} is damaged")
        return whole(self, index)

    data = FakeFewShot(size=32, batch_size=2)
    monkeypatch.setattr(FakeImages, "read", read)
    data.unreadable = "skip"
    before = names(first_batches(data))
    damaged.append(int(before[0].split("-")[1]))
    batches = first_batches(data)
    numbers = [n for batch in batches for n in batch["replaced"].tolist()]
    assert numbers[0] > 0 and before[0] not in names(batches)


def test_evaluation_never_skips(tmp_path):
    with pytest.raises(UnreadableFile, match=r"5\.png cannot be read"):
        [list(loader) for loader in DamagedFiles(tmp_path, [5]).val_dataloader()]


def fit(data, folder, steps: int):
    module = tiny_module()
    tiny_trainer(folder, steps, enable_checkpointing=False).fit(module, datamodule=data)


def test_training_counts_what_it_replaced_and_stops_when_it_is_more_than_one_percent(tmp_path):
    data = DamagedFiles(tmp_path, [5], batch_size=12)
    fit(data, tmp_path, ALWAYS_ALLOWED)
    assert data.state_dict() == {"batches_drawn": ALWAYS_ALLOWED, "replaced": ALWAYS_ALLOWED}
    with pytest.raises(UnreadableFile, match="found 11 among 132 draws, and 1% are allowed"):
        fit(data, tmp_path, 20)
    rare = DamagedFiles(tmp_path, [5], batch_size=12)
    rare.load_state_dict({"batches_drawn": 1000, "replaced": 100})
    fit(rare, tmp_path, 2)
    assert rare.replaced == 102


def test_a_state_of_before_there_was_a_count_can_be_loaded(tmp_path):
    data = DamagedFiles(tmp_path)
    data.load_state_dict({"batches_drawn": 3})
    assert data.replaced == 0


# --- what was asked for last


def test_the_samples_that_were_asked_for_and_not_used_yet_are_known_by_name(tmp_path):
    data = DamagedFiles(tmp_path)
    assert data.asked_last() == []
    order = names(first_batches(data, 3))
    assert data.asked_last() == [f"{name}.png" for name in order]
    data.batches_drawn = 2
    assert data.asked_last() == [f"{name}.png" for name in order[4:]]
    data = TinyDataModule()
    numbers = [name.split("-")[2] for name in names(first_batches(data, 1))]
    assert data.asked_last() == [f"sample {number} (draw {draw})" for draw, number in enumerate(numbers)]


def test_of_an_adaptation_both_parts_are_named_and_of_an_episode_all_its_images():
    data = AdaptationDataModule(Source(), TinyDataModule(), batch_size=1)
    first_batches(data, 1)
    assert [title.split(" sample")[0] for title in data.asked_last()] == ["source", "target"]
    data.batches_drawn = 1
    assert data.asked_last() == []
    episodes = FakeFewShot(size=32)
    (name,) = names(first_batches(episodes, 1))
    (title,) = episodes.asked_last()
    assert title.startswith(f"{name} (supports image-")
