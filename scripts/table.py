"""One Markdown table from the test results of several runs: a row per method, mean and deviation over its seeds.

    python -m scripts.table --row "trained U-Net" runs/a0/test/own-best runs/a1/test/own-best --row "untrained" runs/b0/...

Each folder holds the metrics.json that test.py wrote. Columns are the sets and their mean: mIoU in percent.
"""

import argparse
import json
import statistics
from pathlib import Path


def read_scores(folder: Path) -> dict[str, float]:
    """mIoU in percent by set, and their "mean".

    Raises:
        FileNotFoundError: the folder holds no result of test.py.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: give folders that test.py wrote, such as RUN/test/own-best.")
    test = json.loads(path.read_text("utf-8"))["test"]
    return {name: scores["mIoU"] for name, scores in test["sets"].items()} | {"mean": test["mean"]["mIoU"]}


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Markdown with a column per set; a cell is the mean over runs, with the sample deviation where there are several.

    Raises:
        ValueError: the runs were scored on different sets.
    """
    columns = list(next(iter(rows.values()))[0])
    lines = [f"| mIoU (%) | runs | {' | '.join(columns)} |", "|" + "--|" * (len(columns) + 2)]
    for name, runs in rows.items():
        for scores in runs:
            if list(scores) != columns:
                raise ValueError(f"{name!r} has the sets {list(scores)}, the first row {columns}: score all on the same.")
        cells = []
        for column in columns:
            values = [scores[column] for scores in runs]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", nargs="+", action="append", required=True, metavar="NAME FOLDER", help="name, folders")
    args = parser.parse_args(argv)
    if short := [row[0] for row in args.row if len(row) < 2]:
        parser.error(f"--row {short[0]!r} names no folder: give a name and at least one folder.")
    print(table({name: [read_scores(Path(folder)) for folder in folders] for name, *folders in args.row}))


if __name__ == "__main__":
    main()
