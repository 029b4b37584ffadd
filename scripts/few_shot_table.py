"""Compare the sets of few-shot runs episode by episode: table by fold, paired bootstrap of differences.

    python -m scripts.few_shot_table --fold runs/fold-0-*/test/own-last --fold runs/fold-1-*/test/own-last

Each --fold names the tests of one fold's runs, one per seed; the sets of a test are of the same episodes.
Commas join tests whose sets are to be compared (with/test/own-last,without/test/own-last). Lists of several
seeds (1-shot seed 510, 1-shot seed 365) count like runs of several seeds. Episodes of a fold are drawn with
replacement, the same for all sets and seeds; a run's mIoU is that of the pixels drawn.
"""

import argparse
import csv
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from callbacks.run_record import write_atomically
from config_files import UsageError, short_errors

Episodes = dict[str, np.ndarray]  # by set: [episodes, 6], see lightning_modules.metrics.FewShotScores


def read_episodes(folder: Path) -> Episodes:
    """Counted pixels of each episode of each set of a test.

    Raises:
        UsageError: the folder has none.
    """
    path = folder / "episodes.csv"
    if not path.is_file():
        raise UsageError(f"{path} is missing: give folders that test.py wrote for few-shot runs.")
    found: dict[str, list] = {}
    with open(path, newline="") as file:
        for name, *values in list(csv.reader(file))[1:]:
            found.setdefault(name, []).append([int(value) for value in values])
    return {name: np.array(rows) for name, rows in found.items()}


def read_tests(folders: str) -> list[Episodes]:
    """Sets of one run, joined from folders with commas between; one entry for each seed of its episode lists.

    Raises:
        UsageError: a folder has no episodes, two have a set of the same name, or sets have other seeds.
    """
    found: Episodes = {}
    for folder in folders.split(","):
        own = read_episodes(Path(folder))
        if twice := own.keys() & found.keys():
            raise UsageError(f"{folders} has the set {min(twice)!r} twice: join tests of different settings.")
        found |= own
    seeds: dict[str, Episodes] = {}
    for name, rows in found.items():
        setting, _, seed = name.partition(" seed ")
        seeds.setdefault(seed, {})[setting] = rows
    if len({tuple(sets) for sets in seeds.values()}) > 1:
        raise UsageError(f"{folders} has not all settings with the same seeds: found {', '.join(found)}.")
    return list(seeds.values())


def check_paired(tests: Sequence[Episodes]) -> None:
    """Raise a UsageError unless a fold's tests have the same sets, each of the same episodes."""
    for test in tests:
        first, expected = next(iter(test.values()))[:, :2], len(next(iter(tests[0].values())))
        if len(first) != expected:
            raise UsageError(f"Tests of one fold have {len(first)} and {expected} episodes: score the same.")
        if list(test) != list(tests[0]):
            raise UsageError(f"Tests of one fold scored different sets: {list(tests[0])} and {list(test)}.")
        if different := [name for name, rows in test.items() if not np.array_equal(rows[:, :2], first)]:
            raise UsageError(
                f"The set {different[0]!r} has other episodes than the first: score all on the same."
            )


def mious(rows: np.ndarray, times: np.ndarray) -> np.ndarray:
    """mIoU in percent of resampled episodes.

    Args:
        rows: [episodes, 6].
        times: how often each episode is drawn, [draws, episodes].

    Returns:
        [draws].
    """
    ious = []
    for class_id in np.unique(rows[:, 1]):
        own = rows[:, 1] == class_id
        _, wrong_object, missed, correct = (times[:, own] @ rows[own, 2:]).T
        ious.append(correct / np.maximum(wrong_object + missed + correct, 1))
    return 100 * np.mean(ious, axis=0)


def compare(folds: Sequence[Sequence[Episodes]], draws: int, seed: int = 0) -> tuple[dict, dict]:
    """mIoU of each set by fold and in the mean, and the differences between sets.

    Returns:
        Scores in percent by set, [seeds, folds]; and by pair of sets (later, earlier) their difference in the
        mean over folds and seeds, with the ends of its 95 % interval.
    """
    generator, names = np.random.default_rng(seed), list(folds[0][0])
    scores: dict[str, list] = {name: [] for name in names}
    resampled = {name: np.zeros(draws) for name in names}
    for tests in folds:
        check_paired(tests)
        count = len(tests[0][names[0]])
        times = generator.multinomial(count, np.full(count, 1 / count), size=draws)
        for name in names:
            scores[name].append([float(mious(t[name], np.ones((1, count), int))[0]) for t in tests])
            resampled[name] += np.mean([mious(t[name], times) for t in tests], axis=0) / len(folds)
    found = {name: np.array(values).T for name, values in scores.items()}
    differences = {}
    for before, after in combinations(names, 2):
        low, high = np.percentile(resampled[after] - resampled[before], [2.5, 97.5])
        differences[after, before] = (found[after].mean() - found[before].mean(), low, high)
    return found, differences


def markdown(found: dict, differences: dict) -> str:
    """Two tables: scores by fold with the deviation of their mean over seeds, and differences."""
    folds = next(iter(found.values())).shape[1]
    lines = [
        f"| mIoU (%) | {' | '.join(f'fold {i}' for i in range(folds))} | mean |",
        "|--" * (folds + 2) + "|",
    ]
    for name, values in found.items():
        means = values.mean(1)
        spread = f" ± {means.std(ddof=1):.1f}" if len(means) > 1 else ""
        cells = " | ".join(f"{value:.1f}" for value in values.mean(0))
        lines.append(f"| {name} | {cells} | {means.mean():.1f}{spread} |")
    lines += ["", "| difference of means | points | 95 % interval |", "|--|--|--|"]
    for (after, before), (value, low, high) in differences.items():
        lines.append(f"| {after}, against {before} | {value:+.2f} | {low:+.2f} to {high:+.2f} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fold", nargs="+", action="append", required=True, help="tests of one fold")
    parser.add_argument("--draws", type=int, default=2000, help="bootstrap samples")
    parser.add_argument("--output", type=Path, help="Markdown file, also printed")
    args = parser.parse_args(argv)
    with short_errors():
        folds = [[test for folders in fold for test in read_tests(folders)] for fold in args.fold]
        if len({(len(fold), *fold[0]) for fold in folds}) > 1:
            found = "; ".join(f"{len(fold)} of {', '.join(fold[0])}" for fold in folds)
            raise UsageError(f"Each --fold needs as many tests, of the same sets: found {found}.")
        text = markdown(*compare(folds, args.draws))
        print(text)
        if args.output is not None:
            write_atomically(args.output, text)


if __name__ == "__main__":
    main()
