"""What each part of DiffSegmenter adds on the mini world, next to maps that have not seen the image: a table.

    python -m scripts.report_diffsegmenter --seeds 0 1 2 --output work/diffsegmenter

Each row is scored with the classes of the label as candidates and with all classes. Where there is a
background, the threshold of a row is the best on 50 scenes of the split val. Results are kept in the output
folder as they come, so that the same command goes on where it was stopped; at the end there are table.md and
a picture for each title of the plan.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from callbacks.pictures import to_uint8
from callbacks.run_record import write_atomically
from cli import SegmentationCLI, build
from config_files import UsageError, short_errors
from datamodules.base import EvaluationSamples, SegmentationDataModule
from functional.attention_maps import stretch
from functional.classes import ClassTable
from functional.noise import named_generator
from functional.palette import colorize, heat
from lightning_modules.diffsegmenter import DiffSegmenterPrediction
from lightning_modules.metrics import ConfusionMatrix, ThresholdSweep
from models.candidates import AllCandidates, LabelCandidates
from models.diffsegmenter import best_class, label_map
from scripts.experiments import Plan, read_plan
from scripts.gallery import enlarge, grid
from scripts.table import table

CANDIDATES = {"labels": LabelCandidates(), "all": AllCandidates()}
VAL_SCENES = 50  # of a set, on which thresholds are chosen
THRESHOLDS = [percent / 100 for percent in range(2, 100, 2)]


class Chance(nn.Module):
    """Maps of uniform noise: each candidate is as likely as any other, everywhere."""

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed

    def score_maps(self, image: Tensor, name: str, words: Sequence[str]) -> Tensor:
        return torch.rand((len(words), *image.shape[-2:]), generator=named_generator(name, self.seed))


class PositionPrior(nn.Module):
    """How often each pixel is of a class in training scenes; with a background, stretched by class."""

    def __init__(self, datamodule: SegmentationDataModule, classes: ClassTable):
        super().__init__()
        labels, words = datamodule.train_dataset(), classes.words
        counts = torch.zeros(len(words), *labels[0]["label"].shape)
        for i in tqdm(range(len(labels)), desc="position prior", unit="scene"):
            label = torch.from_numpy(labels.read_label(i)).long()
            counts += torch.nn.functional.one_hot(label, len(words)).permute(2, 0, 1)
        maps = stretch(counts) if classes.has_background else counts / len(labels)
        self.maps = dict(zip(words, maps, strict=True))

    def score_maps(self, image: Tensor, name: str, words: Sequence[str]) -> Tensor:
        return torch.stack([self.maps[word] for word in words])


def score(
    model: DiffSegmenterPrediction, datamodule: SegmentationDataModule, split: str, thresholds: dict
) -> dict:
    """Metrics of a split by candidates and set; the maps of all classes are computed once for both.

    Args:
        thresholds: by candidates, that at which the scores are taken.
    """
    classes, found = model.classes, {}
    every = CANDIDATES["all"]({"name": [""]}, classes)[0]
    words = [classes.words[i] for i in every]
    for set_name, dataset in datamodule.eval_datasets(split).items():
        metrics = {
            kind: ThresholdSweep(len(classes), thresholds[kind], THRESHOLDS)
            if classes.has_background
            else ConfusionMatrix(len(classes))
            for kind in CANDIDATES
        }
        samples = EvaluationSamples(dataset)
        count = min(len(samples), VAL_SCENES) if split == "val" else len(samples)
        for i in tqdm(range(count), desc=f"{split} {set_name}", unit="scene"):
            sample = samples[i]
            maps = model.network.score_maps(sample["image"], sample["name"], words)
            batch = {"label": sample["label"][None], "name": [sample["name"]]}
            for kind, candidates in CANDIDATES.items():
                ids = candidates(batch, classes)[0]
                own = maps[[every.index(i) for i in ids]]
                best, label = best_class(own, ids, classes)
                predicted = (best, label) if classes.has_background else (label,)
                metrics[kind].update(*predicted, sample["label"])
        for kind, metric in metrics.items():
            found.setdefault(kind, {})[set_name] = metric.compute()
    return found


def measure(model: DiffSegmenterPrediction, datamodule: SegmentationDataModule) -> dict[str, dict]:
    """Scores of the test split by candidates: mIoU by set and "mean", the threshold, mIoU_oracle."""
    thresholds = dict.fromkeys(CANDIDATES, THRESHOLDS[0])
    if model.classes.has_background:
        chosen = score(model, datamodule, "val", thresholds)
        thresholds = {
            kind: float(next(iter(sets.values()))["threshold_oracle"]) for kind, sets in chosen.items()
        }
    result = {}
    for kind, sets in score(model, datamodule, "test", thresholds).items():
        means = {name: float(scores["mIoU"]) for name, scores in sets.items()}
        result[kind] = {"mIoU": means | {"mean": float(np.mean(list(means.values())))}}
        if model.classes.has_background:
            best = [float(scores["mIoU_oracle"]) for scores in sets.values()]
            result[kind] |= {"threshold": thresholds[kind], "mIoU_oracle": float(np.mean(best))}
    return result


def rows_of(plan: Plan, title: str) -> dict[str, str]:
    """The rows of a title behind those that have not seen the image, which share the last row's options."""
    last = list(plan[title].values())[-1]
    return {"chance": last, "position prior": last} | plan[title]


def build_row(words: str, row: str, seed: int) -> tuple[DiffSegmenterPrediction, SegmentationDataModule]:
    """Model and data of a row; the position prior learns from 500 scenes."""
    words = f"{words.format(seed=seed)} --model.network.seed {seed} --data.train_length 500"
    model, datamodule = build(SegmentationCLI(words.split(), build=False).resolved())
    if row == "chance":
        model.network = Chance(seed)
    if row == "position prior":
        model.network = PositionPrior(datamodule, model.classes)
    return model, datamodule


def scene_picture(plan: Plan, title: str, count: int, seed: int) -> np.ndarray:
    """Scenes in columns: image, truth, the largest class by cross-attention, its refined map, the mask."""
    words = list(plan[title].values())[-2:]
    (plain, _), (full, datamodule) = (build_row(line, "", seed) for line in words)
    dataset, table = next(iter(datamodule.eval_datasets("test").values())), full.classes
    count = min(count, len(dataset))
    rows = [[] for _ in range(5)]
    for sample in (EvaluationSamples(dataset)[i] for i in range(count)):
        label = sample["label"]
        ids = CANDIDATES["labels"]({"label": label[None], "name": [sample["name"]]}, table)[0]
        largest = max(range(len(ids)), key=lambda i: int((label == ids[i]).sum()))
        arguments = sample["image"], sample["name"], [table.words[i] for i in ids]
        cross, maps = (model.network.score_maps(*arguments) for model in (plain, full))
        mask = label_map(maps, ids, table, full.threshold)
        labels = [colorize(one.numpy().astype(np.uint8), table.colors) for one in (label, mask)]
        heats = [heat(one[largest].numpy()) for one in (cross, maps)]
        for row, tile in zip(rows, (to_uint8(sample["image"]), labels[0], *heats, labels[1]), strict=True):
            row.append(tile)
    return enlarge(grid([tile for row in rows for tile in row], count, gap=2), 2)


def markdown(results: dict[str, dict[str, dict[int, dict]]]) -> str:
    """Tables of {title: {row: {seed: result}}}, one for each choice of candidates."""
    parts = []
    for title, rows in results.items():
        for kind in CANDIDATES:
            scores = {row: [found[kind]["mIoU"] for found in seeds.values()] for row, seeds in rows.items()}
            oracle = " (oracle)" if kind == "labels" else ""
            parts.append(f"### {title}, candidates: {kind}{oracle}\n\n{table(scores)}")
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", type=Path, default=Path("conf/mini/tables/diffsegmenter.yaml"))
    parser.add_argument("--only", nargs="+", default=[], metavar="TITLE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True, help="folder")
    args = parser.parse_args(argv)
    plan = read_plan(args.plan, args.only)
    args.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict] = {}
    for seed in args.seeds:
        for title in plan:
            for row, words in rows_of(plan, title).items():
                file = args.output / f"{title}-{row}-{seed}.json"
                if not file.is_file():
                    found = {"words": words} | measure(*build_row(words, row, seed))
                    write_atomically(file, json.dumps(found, indent=1))
                found = json.loads(file.read_text("utf-8"))
                if found["words"] != words:
                    raise UsageError(
                        f"{file} was made with other options than the plan's:\n{found['words']}\n"
                        "Delete it, or give another --output."
                    )
                results.setdefault(title, {}).setdefault(row, {})[seed] = found
    write_atomically(args.output / "table.md", markdown(results))
    for title in plan:
        Image.fromarray(scene_picture(plan, title, 6, args.seeds[0])).save(args.output / f"{title}.png")
    print(markdown(results))


if __name__ == "__main__":
    with short_errors():
        main()
