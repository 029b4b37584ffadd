"""DiffSegmenter on data sets: what it refuses, whom it asks, what it scores and logs."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from datamodules.base import SegmentationDataModule
from functional.sliding_window import segment_image
from lightning_modules.diffsegmenter import DiffSegmenterPrediction
from lightning_modules.metrics import SWEEP, ConfusionMatrix, ThresholdSweep, matrix_scores
from models.diffsegmenter import DiffSegmenter
from models.diffusion.attention import attention_layers
from models.diffusion.stable_diffusion import StableDiffusion
from tests.tiny_training import tiny_trainer

WORDS = ["car", "dog", "tree", "sky"]
EMPTY = 3  # of the scenes, the one without any class


class Scenes(Dataset):
    """Images of 24 x 24 with labels of `size`; the scenes of `order` in this order."""

    def __init__(self, order, size=(24, 24), ids=(0, 1, 2, 4)):
        self.order, self.size, self.ids = list(order), size, ids

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        scene = self.order[index]
        rng = np.random.default_rng(scene)
        image = rng.integers(0, 256, (4, 4, 3), np.uint8).repeat(6, 0).repeat(6, 1)
        some = np.array([self.ids[0]] if scene == EMPTY else rng.permutation(self.ids)[:3], np.uint8)
        height, width = self.size
        label = rng.choice(some, (4, 4)).repeat(height // 4, 0).repeat(width // 4, 1)
        label[:2] = 255
        return {"image": image, "label": label, "name": f"scene-{scene}"}


class SceneData(SegmentationDataModule):
    classes = "open"

    def __init__(self, order=range(5), eval_batch_size=2, num_workers=0, **options):
        super().__init__(eval_batch_size=eval_batch_size, num_workers=num_workers)
        self.order, self.options = order, options

    def train_dataset(self):
        raise AssertionError("nothing is trained")

    def eval_datasets(self, split):
        return {"day": Scenes(self.order, **self.options)}

    def batches(self):
        return list(self.test_dataloader()[0])


@pytest.fixture
def build(model_folder):
    """Build the same module at each call; options of the network as a dict."""

    def build(network=None, classes=WORDS, **options):
        diffusion = StableDiffusion(str(model_folder))
        with torch.no_grad():  # sharper attention, so that what is stretched is no rounding error
            for layer in attention_layers(diffusion.unet, "self") + attention_layers(diffusion.unet, "cross"):
                attn = diffusion.unet.get_submodule(layer)
                attn.to_q.weight *= 4
                attn.to_k.weight *= 4
        model = DiffSegmenter(diffusion, **{"size": (32, 32), **(network or {})})
        return DiffSegmenterPrediction(model, classes, **{"candidates": "labels", **options}).eval()

    return build


def maps_by_name(module, data):
    found = {}
    for batch in data.batches():
        found |= dict(zip(batch["name"], module.score_maps(batch), strict=True))
    return found


def run_test(folder, module, data, **options):
    trainer = tiny_trainer(folder, 1, enable_checkpointing=False, **options)
    trainer.test(module, data, verbose=False)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize(
    "other",
    [
        {"order": range(4, -1, -1)},
        {"order": [2]},
        {"eval_batch_size": 1},
        {"eval_batch_size": 5},
        {"num_workers": 1},
    ],
    ids=str,
)
def test_the_maps_of_an_image_are_the_same_bit_for_bit_in_any_order_batch_and_worker(build, other):
    plain, found = maps_by_name(build(), SceneData()), maps_by_name(build(), SceneData(**other))
    assert set(found) == {f"scene-{i}" for i in other.get("order", range(5))}
    for name, (ids, maps) in found.items():
        assert ids == plain[name][0] and torch.equal(maps, plain[name][1])


def test_the_maps_of_an_image_do_not_depend_on_the_candidates_of_others(build):
    found = []
    for others in ([3], [1, 2, 3, 4], []):
        module = build(
            candidates=lambda batch, _, ids=others: [[1, 4] if n == "scene-2" else ids for n in batch["name"]]
        )
        found.append(maps_by_name(module, SceneData())["scene-2"][1])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_training_is_refused_before_any_data_is_asked_for(build, tmp_path):
    trainer = tiny_trainer(tmp_path, 1, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"nothing to train: found a call of fit\..*test\.py --config FILE"):
        trainer.fit(build(), SceneData())
    assert trainer.global_step == 0


@pytest.mark.parametrize("options", [{"window": (8, 8)}, {"scales": [0.5, 1]}, {"flip": True}], ids=str)
@pytest.mark.parametrize("use", ["test", "validate"])
def test_windows_scales_and_mirror_images_are_refused(build, tmp_path, use, options):
    module = build()
    module.protocol = partial(segment_image, **options)
    trainer = tiny_trainer(tmp_path, 1, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"found one of --window, --scales and --flip\. Leave them out"):
        getattr(trainer, use)(module, SceneData(), verbose=False)


def asked_words(module, monkeypatch):
    """The words that are asked for, by image."""
    asked, free = {}, module.network.score_maps

    def score_maps(image, name, words, *rest):
        asked[name] = words
        return free(image, name, words, *rest)

    monkeypatch.setattr(module.network, "score_maps", score_maps)
    return asked


@pytest.mark.parametrize("candidates", ["all", "labels"])
def test_candidates_are_all_classes_or_those_of_the_label_and_never_the_background(
    build, monkeypatch, candidates
):
    module = build(candidates=candidates)
    asked = asked_words(module, monkeypatch)
    for batch in SceneData().batches():
        prediction = module.predict_step(batch, 0)
        for name, label, found in zip(batch["name"], batch["label"], prediction, strict=True):
            shown = sorted({*label.unique().tolist()} - {0, 255})
            ids = [1, 2, 3, 4] if candidates == "all" else shown
            assert asked[name] == [WORDS[i - 1] for i in ids]
            assert set(found.unique().tolist()) <= {0, *ids}
    assert len(asked) == 5 and (candidates == "all" or not asked[f"scene-{EMPTY}"])


def test_classes_are_asked_for_by_the_words_of_their_prompts(build, monkeypatch):
    module = build(classes="voc21", candidates=lambda batch, table: [[table.names.index("aeroplane")]])
    asked = asked_words(module, monkeypatch)
    module.predict_step(SceneData([0]).batches()[0], 0)
    assert asked == {"scene-0": ["plane"]}


def test_an_image_without_candidates_is_background_everywhere_and_scored_so(build, tmp_path):
    module, data = build(threshold=0.0), SceneData([EMPTY])
    assert (module.predict_step(data.batches()[0], 0) == 0).all()
    logged = run_test(tmp_path, module, data)
    assert logged["test/day/IoU/background"] == 100 and logged["test/day/aAcc"] == 100
    matrix = module.matrices["day"].compute()["matrix"]
    assert matrix[0, 0] == matrix.sum() == 24 * 22


def test_maps_have_the_size_of_the_label_and_without_one_of_the_image(build):
    module, data = build(), SceneData([0, 1], size=(48, 64))
    batch = data.batches()[0]
    for i, (ids, maps) in enumerate(module.score_maps(batch)):
        words, image, name = [WORDS[k - 1] for k in ids], batch["image"][i], batch["name"][i]
        assert maps.shape == (len(ids), 48, 64) and len(ids) > 0
        assert torch.equal(maps, module.network.score_maps(image, name, words, size=(48, 64)))
    assert module.predict_step(batch, 0).shape == (2, 48, 64)
    module = build(candidates="all")
    del batch["label"]
    assert module.score_maps(batch)[0][1].shape == (4, 24, 24)
    assert module.predict_step(batch, 0).shape == (2, 24, 24)


def test_a_captioner_is_asked_once_for_the_classes_of_an_image_and_what_it_writes_counts(build):
    calls = []

    def captioner(image, name, prefixes):
        calls.append((image, name, list(prefixes)))
        return [f"{prefix} flying on grass" for prefix in prefixes]

    module, data = build(captioner=captioner), SceneData([0, EMPTY])
    batch = data.batches()[0]
    (ids, maps), (none, _) = module.score_maps(batch)
    words = [WORDS[i - 1] for i in ids]
    assert none == [] and len(calls) == 1 and torch.equal(calls[0][0], batch["image"][0])
    assert calls[0][1:] == ("scene-0", [f"a photograph of {word}" for word in words])
    captions = [f"a photograph of {word} flying on grass" for word in words]
    assert torch.equal(maps, module.network.score_maps(batch["image"][0], "scene-0", words, captions))
    assert (maps - build().score_maps(batch)[0][1]).abs().max() > 1e-3


def matrices_by_hand(module, data, num_classes=5, thresholds=SWEEP):
    matrices = {t: torch.zeros(num_classes, num_classes, dtype=torch.int64) for t in thresholds}
    for batch in data.batches():
        for (ids, maps), label in zip(module.score_maps(batch), batch["label"], strict=True):
            all_maps = torch.zeros(num_classes, *label.shape)
            all_maps[ids] = maps
            for threshold, matrix in matrices.items():
                all_maps[0] = threshold
                prediction = all_maps.argmax(0)  # the first of equals
                for true in label.unique().tolist():
                    if true != 255:
                        matrix[true] += torch.bincount(prediction[label == true], minlength=num_classes)
    return matrices


@pytest.mark.parametrize("absent", ["skip", "zero"])
def test_scores_are_logged_at_the_threshold_and_at_the_best_one_of_45(build, tmp_path, absent):
    module, data = build(threshold=0.4, absent=absent), SceneData(size=(28, 32))
    logged = run_test(tmp_path, module, data)
    by_hand = {t: matrix_scores(m, absent) for t, m in matrices_by_hand(module, data).items()}
    own = by_hand[0.4]
    means = {t: scores["mIoU"].item() for t, scores in by_hand.items()}
    best = max(means, key=means.get)
    for key in ("mIoU", "fwIoU", "aAcc", "mAcc", "FP", "FN"):
        assert logged[f"test/day/{key}"] == pytest.approx(own[key].item(), rel=1e-5)
    for name, iou in zip(("background", *WORDS), own["IoU"].tolist(), strict=True):
        assert logged[f"test/day/IoU/{name}"] == pytest.approx(iou, rel=1e-5, nan_ok=True)
    assert logged["test/mIoU"] == logged["test/day/mIoU"]
    assert logged["test/day/mIoU_oracle"] == pytest.approx(means[best], rel=1e-5)
    assert logged["test/day/threshold_oracle"] == pytest.approx(best)
    assert math.isnan(logged["test/day/IoU/tree"]) == (absent == "skip")  # which no scene shows
    assert isinstance(module.matrices["day"], ThresholdSweep) and len(set(means.values())) > 10


def test_the_threshold_changes_labels_and_scores_and_not_what_is_best(build, tmp_path):
    data, logged, areas = SceneData(), [], []
    for threshold in (0.3, 0.7):
        module = build(threshold=threshold)
        areas.append(sum(int((module.predict_step(batch, 0) > 0).sum()) for batch in data.batches()))
        logged.append(run_test(tmp_path, module, data))
    assert areas[0] > areas[1] > 0
    assert logged[0]["test/day/aAcc"] != logged[1]["test/day/aAcc"]
    for key in ("mIoU_oracle", "threshold_oracle"):
        assert logged[0][f"test/day/{key}"] == logged[1][f"test/day/{key}"]


@pytest.mark.parametrize("absent", ["skip", "zero"])
def test_a_table_without_background_has_one_confusion_matrix_and_no_threshold(build, tmp_path, absent):
    data = SceneData(ids=(0, 1, 3, 5, 8))  # sky, building, person, road, car
    module = build(classes="deliver11", threshold=0.99, absent=absent)
    logged = run_test(tmp_path, module, data)
    assert type(module.matrices["day"]) is ConfusionMatrix
    assert not any("oracle" in name for name in logged) and {"test/day/FP", "test/day/FN"} <= set(logged)
    matrix = torch.zeros(11, 11, dtype=torch.int64)
    for batch in data.batches():
        for (shown, maps), label in zip(module.score_maps(batch), batch["label"], strict=True):
            prediction = torch.tensor(shown)[maps.argmax(0)]
            matrix.index_put_(
                (label[label != 255], prediction[label != 255]), torch.tensor(1), accumulate=True
            )
    assert torch.equal(module.matrices["day"].matrix, matrix)
    assert logged["test/day/mIoU"] == pytest.approx(matrix_scores(matrix, absent)["mIoU"].item(), rel=1e-5)


def test_without_candidates_and_background_prediction_is_an_error(build):
    module = build(classes="deliver11", candidates=lambda batch, _: [[] for _ in batch["name"]])
    with pytest.raises(ValueError, match="no candidate class, and the class table 'deliver11' no background"):
        module.predict_step(SceneData().batches()[0], 0)


def test_two_processes_score_the_same_as_one(build, tmp_path):
    one = run_test(tmp_path, build(), SceneData())
    two = run_test(tmp_path, build(), SceneData(), devices=2, strategy="ddp_fork")
    assert len(one) == 14 and one == pytest.approx(two, nan_ok=True)


def test_candidates_that_nobody_knows_are_an_error(build):
    with pytest.raises(ValueError, match="candidates: 'label' is not known"):
        build(candidates="label")


def test_the_scores_say_where_the_candidates_come_from(build):
    assert build(candidates="labels").terms == {"candidates": "labels (oracle)"}
    assert build(candidates="all").terms == {"candidates": "all"}


def test_a_captioner_of_the_same_model_serves_the_candidates_too(build):
    class Candidates:
        def __init__(self, captioner):
            self.captioner = captioner

    own = SimpleNamespace(path="blip")
    for path, shared in (("blip", True), ("other", False)):
        candidates = Candidates(SimpleNamespace(path=path))
        module = build(candidates=candidates, captioner=own)
        assert (module.candidates.captioner is own) == shared and module.captioner is own
    assert build(candidates=Candidates(None), captioner=own).candidates.captioner is None
