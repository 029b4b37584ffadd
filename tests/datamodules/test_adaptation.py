"""Two data sets in one batch: which source images and crops are drawn, and what a target sample may tell."""

import json
from itertools import islice

import numpy as np
import pytest
import torch

from cli import build
from datamodules.adaptation import (
    AdaptationDataModule,
    RareClassSamples,
    RareClassSampling,
    class_probabilities,
    count_pixels,
    counts_document,
    read_counts,
)
from datamodules.base import SegmentationDataModule
from datamodules.cityscapes import CityscapesDataModule
from datamodules.fmb import FMBDataModule
from datamodules.mini_world.datamodule import MiniStreetDataModule
from datamodules.transforms import RandomCropFlipJitter, ResizeCropFlip
from lightning_modules.supervised import Supervised
from tests.fake_data import write_cityscapes, write_fmb
from tests.tiny_training import TinyDataModule, TinyDataset, TinyNetwork, tiny_trainer

SIZE, LENGTH = 16, 12
RARE = RareClassSampling(min_pixels=0, min_crop_pixels=0, temperature=0.5)


class LabelFiles(torch.utils.data.Dataset):
    """Labels in ids 0..5 of their own: 5 in image 3 only, 4 ignored by the class table."""

    def __init__(self, length: int = LENGTH):
        self.label_names = [f"gtFine/train/city/{i:06d}_labelTrainIds.png" for i in range(length)]
        self.label_map = np.arange(256, dtype=np.uint8)
        self.label_map[:6] = [3, 0, 1, 2, 255, 7]

    def __len__(self) -> int:
        return len(self.label_names)

    def read_label(self, index: int) -> np.ndarray:
        label = np.random.default_rng(index).integers(0, 5, (SIZE, SIZE), dtype=np.uint8)
        label[0] = 255
        if index == 3:
            label[8:12, 8:12] = 5
        return label

    def __getitem__(self, index: int) -> dict:
        image = np.random.default_rng([1, index]).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        label = self.label_map[self.read_label(index)]
        return {"image": image, "label": label, "name": f"source-{index}"}


class Source(SegmentationDataModule):
    classes = "deliver11"

    def __init__(self, length: int = LENGTH):
        super().__init__(transform=RandomCropFlipJitter((SIZE, SIZE)))
        self.length = length

    def train_dataset(self):
        return LabelFiles(self.length)

    def eval_datasets(self, split: str):
        raise AssertionError("the source is not evaluated")


class Cutouts:
    """Shows as many pixels of class 2 as it is told, attempt by attempt, and keeps the seeds it was given."""

    def __init__(self, counts: list[int]):
        self.counts, self.seeds, self.images = iter(counts), [], []

    def __call__(self, image, label, seed):
        self.seeds.append(seed)
        self.images.append(image)
        crop = np.zeros(4000, np.uint8)
        crop[: next(self.counts)] = 2
        return image, crop.reshape(50, 80)


def adaptation(target: SegmentationDataModule | None = None, **options) -> AdaptationDataModule:
    options = {"rare_class_sampling": RARE, "batch_size": 2} | options
    return AdaptationDataModule(Source(), target or TinyDataModule(), **options)


def first_batches(data: AdaptationDataModule, count: int = 5) -> list[dict]:
    return list(islice(data.train_dataloader(), count))


def assert_same(a: list[dict], b: list[dict]):
    for x, y in zip(a, b, strict=True):
        for part in ("source", "target"):
            assert x[part]["name"] == y[part]["name"] and torch.equal(x[part]["image"], y[part]["image"])
        assert torch.equal(x["source"]["label"], y["source"]["label"])


def rare_samples(transform=None, options: RareClassSampling = RARE) -> RareClassSamples:
    return RareClassSamples(LabelFiles(), transform, 0, options, count_pixels(LabelFiles()))


def source_names(data: AdaptationDataModule, draws: int) -> list[str]:
    samples = data.train_dataset().source
    return [samples[i % LENGTH, i]["name"] for i in range(draws)]


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


def forget_labels(monkeypatch, dataset: type):
    original = dataset.__getitem__
    monkeypatch.setattr(
        dataset,
        "__getitem__",
        lambda self, index: {k: v for k, v in original(self, index).items() if k != "label"},
    )


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
    assert data.state_dict() == {"batches_drawn": 3}


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


# --- rare class sampling


def test_probabilities_are_the_softmax_of_one_minus_the_frequencies():
    found = class_probabilities(np.array([30, 33, 37]), 0.01)
    np.testing.assert_allclose(found, [0.951747, 0.047385, 0.000868], atol=5e-7)
    assert class_probabilities(np.array([100, 400, 500]), 0.01)[0] == pytest.approx(1, abs=1e-12)


def test_classes_are_drawn_by_their_probabilities_and_images_with_the_class_uniformly():
    samples = rare_samples(options=RareClassSampling(min_pixels=0, min_crop_pixels=0, temperature=0.1))
    pixels = count_pixels(LabelFiles()).sum(0)[:6]
    wanted = class_probabilities(pixels, 0.1)
    assert samples.classes == [0, 1, 2, 3, 4, 5] and np.allclose(samples.probabilities, wanted)
    names = [samples[0, draw]["name"] for draw in range(600)]
    # Image 3 is drawn for its class 5, and as one of twelve for the others.
    expected = wanted[5] + (1 - wanted[5]) / LENGTH
    assert names.count("source-3") / 600 == pytest.approx(expected, abs=0.06)
    assert set(names) == {f"source-{i}" for i in range(LENGTH)}


def test_without_rare_class_sampling_each_source_image_comes_once_in_a_pass():
    names = source_names(adaptation(rare_class_sampling=None), LENGTH)
    assert sorted(names) == sorted(f"source-{i}" for i in range(LENGTH))
    assert source_names(adaptation(), LENGTH) != names


def test_labels_are_those_of_the_class_table_and_crops_are_judged_before_the_map():
    sample = rare_samples()[0, 7]
    index = int(sample["name"].split("-")[1])
    assert torch.equal(sample["label"], torch.from_numpy(LabelFiles()[index]["label"]).long())


@pytest.mark.parametrize(
    ("counts", "attempts"), [([1501], 1), ([1500, 1501], 2), ([1500] * 20, 11), ([1500] * 10 + [1501], 11)]
)
def test_a_crop_of_1500_pixels_is_drawn_again_and_one_of_1501_kept_ten_recrops_at_most(counts, attempts):
    transform = Cutouts(counts)
    samples = rare_samples(transform, RareClassSampling(min_pixels=0))
    samples.classes, samples.probabilities = [2], np.ones(1)
    samples.images, samples.pixels = samples.images[2:3], samples.pixels[:, 2:3]
    sample = samples[0, 0]
    assert len(transform.seeds) == len(set(transform.seeds)) == attempts
    assert all(np.array_equal(image, transform.images[0]) for image in transform.images)
    # Class 2 of the files is class 1 of the table: the last crop is the one that is kept.
    assert (sample["label"] == 1).sum() == counts[:attempts][-1]


def test_an_image_needs_more_than_min_pixels_of_the_class():
    pixels = count_pixels(LabelFiles())
    most, second = sorted(pixels[:, 1])[::-1][:2]
    options = RareClassSampling(min_pixels=int(second), min_crop_pixels=0)
    with pytest.raises(ValueError, match=rf"than {second} pixels of the classes .*5\]: .*below 16\."):
        RareClassSamples(LabelFiles(), None, 0, options, pixels)
    only_one = pixels * (np.arange(255) == 1)
    samples = RareClassSamples(LabelFiles(), None, 0, options, only_one)
    richest = {f"source-{i}" for i in np.flatnonzero(pixels[:, 1] > second)}
    assert most > second and {samples[0, draw]["name"] for draw in range(20)} == richest


def test_ignored_classes_are_drawn_unless_they_are_to_be_skipped():
    assert 4 in rare_samples().classes
    skipping = RareClassSampling(min_pixels=0, min_crop_pixels=0, temperature=0.5, skip_ignored_classes=True)
    samples = rare_samples(options=skipping)
    assert samples.classes == [0, 1, 2, 3, 5] and samples.probabilities.sum() == pytest.approx(1)
    kept = rare_samples().probabilities[[0, 1, 2, 3, 5]]
    assert np.allclose(samples.probabilities, kept / kept.sum())


def test_classes_of_cityscapes_are_drawn_by_its_train_ids_and_given_in_those_of_the_target(tmp_path):
    write_cityscapes(tmp_path / "cityscapes")
    write_fmb(tmp_path / "fmb")
    source = CityscapesDataModule(tmp_path / "cityscapes", "fmb9", transform=ResizeCropFlip((16, 16)))
    target = FMBDataModule(tmp_path / "fmb", transform=ResizeCropFlip((16, 16)))
    options = RareClassSampling(min_pixels=0, min_crop_pixels=0, temperature=1.0)
    data = AdaptationDataModule(source, target, options)
    assert data.train_dataset().source.classes == list(range(19))
    batches = first_batches(data, 8)
    assert {255, *range(9)} == {i for batch in batches for i in batch["source"]["label"].unique().tolist()}
    assert all(set(batch["target"]) == {"image", "name"} for batch in batches)
    assert data.val_set_names == ["fmb"]


def test_temperature_is_checked():
    with pytest.raises(ValueError, match="temperature=0"):
        RareClassSampling(temperature=0)


# --- class counts


def write(path, content) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_counts_are_the_pixels_of_each_id_without_the_ignored():
    pixels = count_pixels(LabelFiles(), num_workers=2)
    assert pixels.shape == (LENGTH, 255) and (pixels.sum(1) == SIZE * SIZE - SIZE).all()
    assert pixels[3, 5] == 16 and pixels[:, 5].sum() == 16
    assert np.array_equal(pixels, count_pixels(LabelFiles()))


def test_counts_written_before_give_the_same_batches_and_are_not_counted_again(tmp_path, monkeypatch):
    data = LabelFiles()
    path = write(tmp_path / "counts.json", counts_document(data, count_pixels(data)))
    expected = first_batches(adaptation(), 3)
    monkeypatch.setattr("datamodules.adaptation.count_pixels", None)
    options = RareClassSampling(path, min_pixels=0, min_crop_pixels=0, temperature=0.5)
    assert_same(first_batches(adaptation(rare_class_sampling=options), 3), expected)


def test_both_files_of_daformers_tools_load(tmp_path):
    data = LabelFiles()
    pixels = count_pixels(data)
    stats = [
        {**{str(c): int(n) for c, n in enumerate(row) if n}, "file": f"/their/root/{name}"}
        for row, name in zip(pixels, data.label_names, strict=True)
    ]
    with_class = {
        str(c): [[entry["file"], entry[str(c)]] for entry in stats if str(c) in entry] for c in range(6)
    }
    for name, content in (("sample_class_stats", stats[::-1]), ("samples_with_class", with_class)):
        assert np.array_equal(read_counts(write(tmp_path / f"{name}.json", content), data), pixels)
    with pytest.raises(ValueError, match=r"1 of 13 are missing, such as gtFine/train/city/000012"):
        read_counts(tmp_path / "sample_class_stats.json", LabelFiles(LENGTH + 1))


@pytest.mark.parametrize("change", ["other ids", "fewer labels", "another name"])
def test_counts_of_other_labels_are_refused(tmp_path, change, monkeypatch):
    data = LabelFiles()
    path = write(tmp_path / "counts.json", counts_document(data, count_pixels(data)))
    assert np.array_equal(read_counts(path, data), count_pixels(data))
    if change == "other ids":
        read = LabelFiles.read_label
        monkeypatch.setattr(LabelFiles, "read_label", lambda s, i: read(s, i) % 7 if i == 7 else read(s, i))
    elif change == "fewer labels":
        data = LabelFiles(LENGTH - 1)
    else:
        data.label_names[5] = "gtFine/train/city/other.png"
    with pytest.raises(ValueError, match=r"counts\.json are not of these labels.*python -m scripts\.count_c"):
        read_counts(path, data)


def test_a_label_that_changed_after_it_was_counted_is_noticed_when_it_is_drawn():
    pixels = count_pixels(LabelFiles())
    pixels[:, 2] += 1
    samples = RareClassSamples(LabelFiles(), None, 0, RARE, pixels)
    with pytest.raises(ValueError, match=r"pixels of class 2 in gtFine/train/city/.*Count again"):
        [samples[0, draw] for draw in range(50)]


@pytest.mark.parametrize("content", [[1], {"0": 3}, {"sha256": "x"}, [{"0": 1}], "counts"])
def test_a_foreign_file_of_counts_is_an_error_that_names_it(tmp_path, content):
    with pytest.raises(ValueError, match=r"foreign\.json holds no class counts"):
        read_counts(write(tmp_path / "foreign.json", content), LabelFiles())


@pytest.mark.parametrize("wrong", [-1, 255, 300])
def test_counts_of_ids_that_no_label_can_hold_are_refused(tmp_path, wrong):
    document = counts_document(LabelFiles(), count_pixels(LabelFiles()))
    document["samples"][LabelFiles().label_names[2]][str(wrong)] = 5
    with pytest.raises(
        ValueError, match=rf"counts\.json holds no class counts .*\[{wrong}\] outside 0\.\.254"
    ):
        read_counts(write(tmp_path / "counts.json", document), LabelFiles())


def test_a_missing_file_of_counts_says_how_to_write_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m scripts\.count_classes"):
        read_counts(tmp_path / "none.json", LabelFiles())
