"""Draw the curves of runs from their metrics.csv: training loss, learning rate, validation mIoU over steps.

    python -m scripts.curves runs/a
    python -m scripts.curves runs/a runs/b --output curves.png

One run shows the mIoU of each validation set and their mean; of several runs, each shows its mean.
"""

import argparse
import csv
import re
from pathlib import Path

from config_files import UsageError, short_errors

PANELS = {  # title and columns, as a regular expression
    "training loss": r"train/loss.*",
    "learning rate": r"lr-.*",
    "validation mIoU (%)": r"val/(.+/)?mIoU",
}
Series = tuple[tuple[int, ...], tuple[float, ...]]  # steps and values


def read_metrics(run: Path) -> dict[str, Series]:
    """Steps and values of each column of a run's metrics.csv, without the rows that lack its value."""
    path = run / "metrics.csv"
    if not path.is_file():
        raise UsageError(f"{path} is missing: give folders that train.py wrote (its --output).")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise UsageError(f"{path} has no rows: the run ended before its first logged step.")
    known = {name: [(int(row["step"]), float(row[name])) for row in rows if row[name]] for name in rows[0]}
    return {name: tuple(zip(*pairs, strict=True)) for name, pairs in known.items() if pairs}


def draw(runs: dict[str, dict[str, Series]], output: Path) -> None:
    """Write the picture of runs, given by the name that it shows: a panel for each kind of curve.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot it draws by Agg, whatever the display
    except ModuleNotFoundError as error:
        raise UsageError('Curves need matplotlib: pip install -e ".[demo]"') from error
    figure, alone = Figure((15, 4.5), layout="constrained"), len(runs) == 1
    for axes, (title, pattern) in zip(figure.subplots(1, 3, sharex=True), PANELS.items(), strict=True):
        for i, (run, metrics) in enumerate(runs.items()):
            for name in sorted(filter(re.compile(pattern).fullmatch, metrics), key="val/mIoU".__ne__):
                mean, score = name == "val/mIoU", name.startswith("val/")
                if score and not mean and not alone:
                    continue  # the sets of several runs would hide each other
                label = "mean" if mean else name.removeprefix("val/").removesuffix("/mIoU")
                color = f"C{i}" if not alone else "black" if mean else None
                style = {"color": color, "marker": "o" if score else None, "markersize": 4}
                style |= {"linewidth": 2.5, "zorder": 3} if mean else {}
                axes.plot(*metrics[name], label=label if alone else f"{run}: {label}", **style)
        axes.set(title=title, xlabel=f"step of {next(iter(runs))}" if alone else "step")
        axes.ticklabel_format(axis="y", scilimits=(-2, 4))
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend(frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder that train.py wrote")
    parser.add_argument("--output", type=Path, help="PNG file; of one run by default RUN/pictures/curves.png")
    args = parser.parse_args(argv)
    if args.output is None and len(args.runs) > 1:
        parser.error("Several runs have no folder in common: say where the picture goes with --output FILE.")
    output = args.output or args.runs[0] / "pictures/curves.png"
    draw({str(run): read_metrics(run) for run in args.runs}, output)
    print(output)


if __name__ == "__main__":
    with short_errors():
        main()
