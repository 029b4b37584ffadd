"""Compare runs on one page: python compare.py RUN... [--output compare.html] [--worst N] [--score mIoU].

RUN is a folder that train.py wrote; results that test.py left in it are shown too. Runs whose configs differ
in nothing but seeds and what keeps books are one experiment. The page is one HTML file that asks for nothing.
"""

import argparse
import csv
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from html import escape
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from comparison_page import (
    COLORS,
    STYLE,
    Curve,
    bars,
    chart,
    difference_tables,
    figure,
    key,
    legend,
    mean,
    panels,
    quiet,
    shown,
    thinned,
)
from config_files import UsageError, read_yaml, short_errors
from functional.classes import class_table

POINTS = 60  # of a loss curve at most
# Options by which runs of one experiment may differ, wherever they stand: they change no bit of a training.
LEFT_OUT = (
    *("seed_everything", "seed", "wandb", "progress", "predictions", "num_workers"),
    *("every_n_steps", "keep_last", "log_every_n_steps", "enable_progress_bar", "default_root_dir"),
)


@dataclass
class Run:
    """What a run left in its folder.

    Args:
        config: without seeds and wandb. record: run.json. curves: by logged name. latest: validation.
        tests: scores by folder of test/. images: of these, score by set and image.
    """

    folder: Path
    name: str
    config: dict
    record: dict
    curves: dict[str, Curve]
    latest: dict
    tests: dict[str, dict]
    images: dict[str, dict[tuple[str, str], float]]


class Group(NamedTuple):
    """The runs of one experiment, which differ in their seed."""

    name: str
    color: str
    runs: list[Run]


def read_json(path: Path) -> dict:
    """A JSON file, {} where there is none; a UsageError if it is damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read.\nFound: {error}.\nLeave its run out.") from None


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def number(value) -> float | None:
    """A finite number, else None."""
    try:
        return float(value) if math.isfinite(float(value)) else None
    except (TypeError, ValueError):
        return None


def without_seeds(value):
    """Copy a config without what may differ between runs of one experiment: seeds, and what keeps books."""
    if isinstance(value, list):
        return [without_seeds(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {name: without_seeds(part) for name, part in value.items() if name not in LEFT_OUT}


def read_run(folder: Path, name: str) -> Run:
    """Read a run folder.

    Raises:
        UsageError: it is no run folder, or a file in it is damaged.
    """
    if missing := [file for file in ("config.yaml", "run.json") if not (folder / file).is_file()]:
        found = "no folder of this name"
        if folder.is_dir():
            found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing in it"
        raise UsageError(
            f"{folder} is no folder of a run: it lacks {' and '.join(missing)}.\nFound: {found}.\n"
            "Give folders that train.py wrote (its --output)."
        )
    curves: dict[str, Curve] = {}
    for row in read_rows(folder / "metrics.csv"):
        for column, cell in row.items():
            if (value := number(cell)) is not None and column != "step":
                curves.setdefault(column, {})[int(row["step"])] = value
    tests, images = {}, {}
    for file in sorted((folder / "test").glob("*/metrics.json")):
        if scores := read_json(file).get("test"):
            tests[file.parent.name] = scores
        rows = read_rows(file.parent / "images.csv")
        known = {(row["set"], row["name"]): number(row["mIoU"]) for row in rows}
        images[file.parent.name] = {image: value for image, value in known.items() if value is not None}
    config, record = without_seeds(read_yaml(folder / "config.yaml")), read_json(folder / "run.json")
    latest = read_json(folder / "metrics.json").get("val", {})
    return Run(folder, name, config, record, curves, latest, tests, images)


def read_groups(folders: Sequence[Path]) -> list[Group]:
    """Read runs and put those of one experiment together, in the order of their first runs.

    Raises:
        UsageError: a folder is given twice; see also read_run.
    """
    known = [folder.resolve() for folder in folders]
    if twice := [folder for folder in known if known.count(folder) > 1]:
        raise UsageError(
            f"a run would count as several seeds.\nFound {twice[0]} {known.count(twice[0])} times.\n"
            "Name each folder once."
        )
    shared = os.path.commonpath([folder.parent for folder in known])
    experiments: dict[str, list[Run]] = {}
    for folder in known:
        run = read_run(folder, folder.relative_to(shared).as_posix())
        experiments.setdefault(json.dumps(run.config, sort_keys=True, default=str), []).append(run)
    groups: list[Group] = []
    for runs in experiments.values():
        stems = {re.sub(r"[-_./ ]*(seed)?[-_=. ]*\d+$", "", run.name) for run in runs}
        name = runs[0].name if len(runs) == 1 else stems.pop() if len(stems) == 1 else ""
        name = name or f"{runs[0].name} and others"
        name += "'" * sum(group.name.rstrip("'") == name for group in groups)
        groups.append(Group(name, COLORS[len(groups) % len(COLORS)], runs))
    return groups


def runs_in(groups: list[Group]) -> list[Run]:
    return [run for group in groups for run in group.runs]


def mean_over_sets(scores: dict, score: str) -> float | None:
    """A score's mean over the sets of a validation or test, as logged, else of those that have it."""
    if (logged := number(scores.get("mean", {}).get(score))) is not None:
        return logged
    return mean(number(part.get(score)) for part in scores.get("sets", {}).values())


def validation_curve(run: Run, score: str) -> Curve:
    """A score, mean over sets, by step."""
    if f"val/{score}" in run.curves:
        return run.curves[f"val/{score}"]
    own = [c for name, c in run.curves.items() if re.fullmatch(rf"val/[^/]+/{re.escape(score)}", name)]
    return {step: mean(curve.get(step) for curve in own) for step in sorted(set().union(*own))}


def class_scores(run: Run, source: str | None) -> dict[str, float | None]:
    """IoU by class, mean over the sets that have it, of a folder of test/ or of the last validation."""
    scores = run.tests.get(source, {}) if source else run.latest
    sets = [part["IoU"] for part in scores.get("sets", {}).values() if "IoU" in part]
    return {name: mean(number(ious.get(name)) for ious in sets) for ious in sets for name in ious}


def duration(record: dict) -> float | None:
    """Seconds over all starts of a run; None while it runs or where an end is unknown."""
    try:
        return sum(
            (datetime.fromisoformat(part["ended"]) - datetime.fromisoformat(part["started"])).total_seconds()
            for part in [*record.get("earlier", []), record]
        )
    except (KeyError, TypeError, ValueError):
        return None


def table(groups: list[Group], heads: list[str], cells: Callable[[list[Run]], list[str]]) -> str:
    """A row for each group, and below it one for each of its runs if there are several.

    Lines of the heading and `cells` of one or several runs are HTML.
    """
    rows = []
    for group in groups:
        several = len(group.runs) > 1
        count = f' <span class="quiet">n = {len(group.runs)}</span>' if several else ""
        rows.append(("group", key(*group[:2]) + count, cells(group.runs)))
        rows += [("seed", escape(run.name), cells([run])) for run in group.runs if several]
    lines = [f"<tr>{head}</tr>" for head in heads]
    for kind, name, found in rows:
        lines.append(
            f'<tr class="{kind}"><td>{name}</td>{"".join(f"<td>{cell}</td>" for cell in found)}</tr>'
        )
    return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"


def run_section(groups: list[Group], score: str) -> str:
    """Validation scores, and how far the runs are."""

    def cells(runs: list[Run]) -> list[str]:
        curves = [curve for run in runs if (curve := validation_curve(run, score))]
        best, last = shown(max(c.values()) for c in curves), shown(c[max(c)] for c in curves)
        seconds = [duration(run.record) for run in runs]
        time = "–" if None in seconds else str(timedelta(seconds=round(mean(seconds))))
        facts = []
        for run in runs:
            git = run.record.get("git") or {}
            code = str(git.get("commit") or "–")[:8] + "*" * bool(git.get("dirty"))
            # Also by a killed run; a rate is logged before its step.
            logged = [max(curve) for name, curve in run.curves.items() if not name.startswith("lr-")]
            step = max(run.record.get("step", 0), *logged, 0)
            facts.append([run.record.get("seed", "–"), run.record.get("status", "–"), step, code])
        seed, status, step, code = (
            escape(", ".join(dict.fromkeys(str(value)[:60] for value in column)))
            for column in zip(*facts, strict=True)
        )
        at = ", ".join(dict.fromkeys(f"{max(curve, key=curve.get):,}" for curve in curves))
        return [best, at or "–", last, seed, status, step, time, code]

    best = f"best val {escape(score)}"
    titles = ["run", best, "at step", "last", "seed", "status", "step", "h:min:s", "code"]
    return table(groups, ["".join(f"<th>{title}</th>" for title in titles)], cells)


def test_section(groups: list[Group], score: str) -> str:
    """Test scores by folder and set, and their mean over several sets."""
    columns: dict[str, dict[str, None]] = {}  # sets in order
    for run in runs_in(groups):
        for folder, scores in run.tests.items():
            columns.setdefault(folder, {}).update(dict.fromkeys(scores.get("sets", {})))
    if not columns:
        return quiet("No run has been tested yet: <code>python test.py RUN</code> scores one.")

    def cells(runs: list[Run]) -> list[str]:
        found = []
        for folder, sets in columns.items():
            tests = [run.tests[folder] for run in runs if folder in run.tests]
            found += [shown(number(t["sets"].get(name, {}).get(score)) for t in tests) for name in sets]
            found += [shown(mean_over_sets(t, score) for t in tests)] * (len(sets) > 1)
        return found

    titles = {folder: [*sets, *["mean"] * (len(sets) > 1)] for folder, sets in columns.items()}
    top = "".join(f'<th colspan="{len(sets)}">{escape(f)}</th>' for f, sets in titles.items())
    below = "".join(f"<th>{escape(name)}</th>" for sets in titles.values() for name in sets)
    return table(groups, [f"<td></td>{top}", f"<th>run</th>{below}"], cells)


def curve_section(groups: list[Group], score: str) -> str:
    """Validation score and each training loss over steps."""
    logged = [(name, curve) for run in runs_in(groups) for name, curve in run.curves.items()]
    longest = max((step for _, curve in logged for step in curve), default=1)
    width = max(1, -(-longest // POINTS))

    def drawn(title: str, y_title: str, of: Callable[[Run], Curve]) -> str:
        lines = [(group.color, [c for run in group.runs if (c := of(run))]) for group in groups]
        return chart(title, lines, y_title, longest)

    found = drawn(f"validation {score} (%)", f"{score} (%)", lambda run: validation_curve(run, score))
    for name in sorted({name for name, _ in logged if name.startswith("train/loss")}):
        title = f"training {name.removeprefix('train/')}"
        found += drawn(title, "loss", lambda run, name=name: thinned(run.curves.get(name, {}), width))
    said = "Thick: mean of the runs, thin: each run."
    said += f" A loss is the mean over {width:,} steps." if width > 1 else ""
    parts = f'{legend(groups)}<div class="charts">{found}</div>{quiet(said)}'
    return parts if found else quiet("No run has logged a score or a loss yet.")


def class_section(groups: list[Group], source: str | None) -> str:
    """IoU of each class."""
    parts = [(group.color, [class_scores(run, source) for run in group.runs]) for group in groups]
    names = list(dict.fromkeys(name for _, scores in parts for score in scores for name in score))
    return legend(groups) + bars(names, parts) if names else quiet("No run has scores by class yet.")


def image_section(groups: list[Group], source: str | None, count: int) -> str:
    """The images with the lowest score, mean over groups, of those that each group has a picture of."""
    scores = {run.name: run.images.get(source, {}) for run in runs_in(groups)}
    groups = [group for group in groups if any(scores[run.name] for run in group.runs)]
    if not groups:
        return quiet("No run has scores by image yet: <code>python test.py RUN</code> leaves them.")

    def path(run: Run, image: tuple[str, str]) -> Path:
        name = re.sub(r"[^\w.-]+", "_", "-".join(image))  # as callbacks.pictures.TestPictures names it
        return run.folder / "test" / source / "pictures" / f"{name}.png"

    ranked, everything = [], set().union(*scores.values())
    for image in everything:
        own = [[run for run in group.runs if image in scores[run.name]] for group in groups]
        if all(any(path(run, image).is_file() for run in runs) for runs in own):
            ranked.append((mean(mean(scores[run.name][image] for run in runs) for runs in own), *image))
    parts = [
        quiet(
            f"Each experiment has drawn {len(ranked):,} of the {len(everything):,} images of the test "
            f"{escape(source)}; these have the lowest scores, mean over experiments. Below a prediction: "
            "run and score of the image alone, in percent. <code>test.py --pictures N</code> draws more."
        ),
        class_legend(groups),
    ]
    for value, *names in sorted(ranked)[: max(count, 0)]:
        image, given, predicted = tuple(names), "", ""
        for group in groups:
            for run in (run for run in group.runs if image in scores[run.name]):
                file, cut = path(run, image), []
                if file.is_file():
                    with Image.open(file) as opened:
                        cut = panels(opened.convert("RGB"))
                if cut and not given:
                    given = figure(cut[0], "image", "#bbb", photo=True) + figure(cut[1], "truth", "#bbb")
                caption = f"{escape(run.name)}: <b>{scores[run.name][image]:.1f}</b>"
                caption += "" if cut else " (not drawn)"
                predicted += figure(cut[2] if cut else None, caption, group.color)
        title = f'{escape(": ".join(image))} <span class="quiet">mean {value:.1f}</span>'
        parts.append(f'<h3>{title}</h3>\n<div class="images">{given}{predicted}</div>')
    return "\n".join(parts)


def class_legend(groups: list[Group]) -> str:
    """Colours of the classes, where the project knows their table."""
    colors = {}
    for group in groups:
        try:
            found = class_table(group.runs[0].config["model"]["init_args"]["classes"])
        except (KeyError, TypeError, ValueError):
            continue  # a legend is worth no more than its pictures
        colors |= dict(zip(found.names, found.colors, strict=True))
    return legend((name, f"rgb{tuple(color)}") for name, color in colors.items())


def notes(groups: list[Group], score: str, source: str | None) -> list[str]:
    """What a reader of the page must know about its runs."""
    found, runs, tables = [], runs_in(groups), {}
    if silent := [run.name for run in runs if not validation_curve(run, score)]:
        found.append(f"Without a validation {score} yet: {', '.join(silent)}.")
    if source and (missing := [run.name for run in runs if source not in run.tests]):
        found.append(f"Not tested as {source}: {', '.join(missing)}.")
    for run in runs:
        if names := class_scores(run, source) or class_scores(run, None):
            tables.setdefault(tuple(names), []).append(run.name)
    if len(tables) > 1:
        listed = "; ".join(f"{', '.join(own)}: {', '.join(names)}" for names, own in tables.items())
        found.append(f"The runs were scored on different classes, so their means differ in kind ({listed}).")
    for group in groups:
        seeds = [run.record.get("seed") for run in group.runs]
        if len(set(seeds)) < len(seeds):
            found.append(f"Runs of {group.name} have the same seed: their spread is not that of seeds.")
    return found


def page(groups: list[Group], score: str, worst: int) -> str:
    """The whole page as HTML, with a score as logged after "val/" and a number of the worst images."""
    held = [folder for run in runs_in(groups) for folder in run.tests]
    source = max(sorted(set(held)), key=held.count) if held else None
    amounts = {"run": len(runs_in(groups)), "experiment": len(groups)}
    title = " of ".join(f"{amount} {word}{'s' * (amount != 1)}" for word, amount in amounts.items())
    sections = {
        "Runs": run_section(groups, score),
        f"Test {score}": test_section(groups, score),
        "Curves": curve_section(groups, score),
        f"Classes, {f'test {source}' if source else 'last validation'}": class_section(groups, source),
        "Difference of configs": difference_tables([(*group[:2], group.runs[0].config) for group in groups]),
        "Worst images": image_section(groups, source, worst),
    }
    said = (
        "Runs whose configs differ in seeds alone, or in what keeps books, are one experiment. Scores are in "
        "percent: mean ± sample standard deviation over n runs. * marks code with uncommitted changes."
    )
    body = "".join(f'<p class="note">{escape(note)}</p>\n' for note in notes(groups, score, source))
    body += "".join(f"<h2>{escape(name)}</h2>\n{part}\n" for name, part in sections.items())
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{title}</h1>\n{quiet(said)}\n{body}</body></html>\n"
    )


def check_score(groups: list[Group], score: str) -> None:
    """Raise a UsageError if runs have scores, and none this one."""
    known: set[str] = set()
    for run in runs_in(groups):
        logged = [name.split("/") for name in run.curves]
        known |= {parts[-1] for parts in logged if parts[0] == "val" and "IoU" not in parts}
        for scores in (*run.tests.values(), run.latest):
            known |= {name for part in scores.get("sets", {}).values() for name in part if name != "IoU"}
    if known and score not in known:
        raise UsageError(
            f"no run has a score {score!r}.\nFound: {', '.join(sorted(known))}.\nGive one of these."
        )


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="compare.py", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder that train.py wrote")
    parser.add_argument("--output", type=Path, default=Path("compare.html"), help="default: compare.html")
    parser.add_argument("--worst", type=int, default=6, help="images side by side (default: 6)")
    parser.add_argument("--score", default="mIoU", help="score, as logged after val/ (default: mIoU)")
    options = parser.parse_args(args)
    with short_errors():
        groups = read_groups(options.runs)
        check_score(groups, options.score)
        html, output = page(groups, options.score, options.worst), options.output
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            part = output.with_name(f".{output.name}.tmp")
            part.write_text(html, "utf-8")
            os.replace(part, output)  # a reader sees the old page or the whole new one
        except OSError as error:
            raise UsageError(
                f"the page cannot be written.\nFound: {error}.\nGive another --output."
            ) from None
    print(output)


if __name__ == "__main__":
    main()
