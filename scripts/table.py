"""One Markdown table from the test results of several runs: a row per method, mean and deviation over seeds.

    python -m scripts.table --row x runs/a/test/own-best runs/b/test/own-best --row own runs/c/test/own-best

Each folder holds the metrics.json that test.py wrote. Columns are the sets and their mean: mIoU in percent.
"""

import argparse
import json
import statistics
from pathlib import Path

from config_files import UsageError, short_errors


def read_scores(folder: Path) -> dict[str, float]:
    """mIoU in percent by set, and their "mean".

    Raises:
        UsageError: the folder holds no scores.
        UsageError: its scores are those of a validation.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        raise UsageError(f"{path} is missing: give folders that test.py wrote, such as RUN/test/own-best.")
    stages = json.loads(path.read_text("utf-8"))
    if "test" not in stages:
        raise UsageError(
            f"{path} holds no test scores, found {', '.join(stages)}: give folders that test.py wrote, such "
            "as RUN/test/own-best."
        )
    test = stages["test"]
    return {name: scores["mIoU"] for name, scores in test["sets"].items()} | {"mean": test["mean"]["mIoU"]}


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Markdown with a column per set; a cell is the mean over runs, and the sample deviation of several.

    Raises:
        UsageError: the runs were scored on different sets.
    """
    columns = list(next(iter(rows.values()))[0])
    lines = [f"| mIoU (%) | runs | {' | '.join(columns)} |", "|" + "--|" * (len(columns) + 2)]
    for name, runs in rows.items():
        for scores in runs:
            if list(scores) != columns:
                raise UsageError(
                    f"{name!r} has the sets {list(scores)}, the first row {columns}: score all on the same."
                )
        cells = []
        for column in columns:
            values = [scores[column] for scores in runs]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--row",
        nargs="+",
        action="append",
        required=True,
        metavar=("NAME", "FOLDER"),
        help="name, then the folders of its runs",
    )
    args = parser.parse_args(argv)
    if short := [row[0] for row in args.row if len(row) < 2]:
        parser.error(f"--row {short[0]!r} names no folder: give a name and at least one folder.")
    names = [row[0] for row in args.row]
    if twice := [name for name in names if names.count(name) > 1]:
        parser.error(f"--row {twice[0]!r} is given twice: name the folders of one row together.")
    print(table({name: [read_scores(Path(folder)) for folder in folders] for name, *folders in args.row}))


if __name__ == "__main__":
    with short_errors():
        main()
