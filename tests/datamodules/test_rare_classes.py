"""Which source images and crops are drawn, and the files of counts that say so."""

import json

import numpy as np
import pytest
import torch

from datamodules.adaptation import AdaptationDataModule
from datamodules.cityscapes import CityscapesDataModule
from datamodules.fmb import FMBDataModule
from datamodules.rare_classes import (
    RareClassSamples,
    RareClassSampling,
    class_probabilities,
    count_pixels,
    counts_document,
    read_counts,
)
from datamodules.transforms import ResizeCropFlip
from tests.fake_data import write_cityscapes, write_fmb
from tests.label_files import LENGTH, RARE, SIZE, LabelFiles, adaptation, assert_same, first_batches


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


def rare_samples(transform=None, options: RareClassSampling = RARE) -> RareClassSamples:
    return RareClassSamples(LabelFiles(), transform, 0, options, count_pixels(LabelFiles()))


def source_names(data: AdaptationDataModule, draws: int) -> list[str]:
    samples = data.train_dataset().source
    return [samples[i % LENGTH, i]["name"] for i in range(draws)]


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
    with pytest.warns(match=rf"leaves classes out: .* than {second} pixels .*5\]\. Set .* below 16 to draw"):
        samples = RareClassSamples(LabelFiles(), None, 0, options, pixels)
    assert (
        1 in samples.classes and 5 not in samples.classes and samples.probabilities.sum() == pytest.approx(1)
    )
    with pytest.raises(ValueError, match=r"nothing to draw: .*below 16"):
        RareClassSamples(LabelFiles(), None, 0, RareClassSampling(min_pixels=SIZE * SIZE), pixels)
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
    monkeypatch.setattr("datamodules.rare_classes.count_pixels", None)
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


# Of GTA5 in train ids: shares of the pixels, and the probabilities that DIFF's released logs print for them.
GTA5_SHARES = {
    18: 0.00006, 12: 0.00034, 17: 0.00035, 16: 0.00073, 7: 0.00091, 6: 0.00151, 11: 0.00408, 15: 0.00415,
    4: 0.00713, 5: 0.01193, 14: 0.01268, 3: 0.02078, 9: 0.02413, 13: 0.02827, 8: 0.08554, 1: 0.09329,
    10: 0.15232, 2: 0.19034, 0: 0.36144,
}  # fmt: skip
GTA5_PROBABILITIES = [
    *(0.119714, 0.116375, 0.116250, 0.111966, 0.109988, 0.103560, 0.080077, 0.079574, 0.059053, 0.036531),
    *(0.033881, 0.015085, 0.010784, 0.0071281, 2.3209e-5, 1.0694e-5, 2.9212e-8, 6.5199e-10, 2.4191e-17),
]


def test_the_probabilities_of_gta5_are_those_of_the_published_run():
    found = class_probabilities(np.array(list(GTA5_SHARES.values())), 0.01)
    assert len(found) == 19 and found.sum() == pytest.approx(1)
    assert (np.diff(found) < 0).all()
    # Shares are known to 1e-5, which the temperature turns into 5e-4 of a probability.
    np.testing.assert_allclose(found, GTA5_PROBABILITIES, rtol=2e-3)
