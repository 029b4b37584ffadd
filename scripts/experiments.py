"""Train and score every run of a table, skip what is finished, and write the table.

    python -m scripts.experiments conf/mini/tables/madm.yaml --seeds 0 1 2 --jobs 2

A plan is a YAML of the form {title: {row: words of train.py's command line}}. Each row is trained with each
seed, a run is scored at its last checkpoint, and the same command goes on where it was stopped. A finished
run of other options than the plan's is refused.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from callbacks.run_record import write_atomically
from cli import SegmentationCLI
from config_files import UsageError, differences, read_yaml, short_errors
from scripts.table import read_scores, table

Plan = dict[str, dict[str, str]]
DECISIVE = ("seed_everything", "model", "data", "max_steps")  # of a run's options, what its scores depend on


def read_plan(path: Path, only: Sequence[str]) -> Plan:
    """The titles of a plan, those of `only` if there are any.

    Raises:
        UsageError: the file is no plan, or lacks a title.
    """
    plan = read_yaml(path)
    if not all(
        isinstance(rows, dict) and all(isinstance(r, str) for r in rows.values()) for rows in plan.values()
    ):
        raise UsageError(f"{path} is no plan: it needs the form title: {{row: words of train.py}}.")
    if unknown := [title for title in only if title not in plan]:
        raise UsageError(f"{path} has no title {unknown[0]!r}: choose from {', '.join(plan)}.")
    return {title: plan[title] for title in only or plan}


def run_folder(runs: Path, title: str, row: str, seed: int) -> Path:
    """Where a run lies: its title and row in letters, digits and dashes."""
    title, row = (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") for name in (title, row))
    return runs / title / f"{row}-{seed}"


def finished(folder: Path, words: Sequence[str]) -> bool:
    """Whether a run has been scored.

    Args:
        words: of train.py's command line.

    Raises:
        UsageError: it was trained with other options than these words give today; names the first.
    """
    if not (folder / "test" / "own-last" / "metrics.json").is_file():
        return False
    configs = read_yaml(folder / "config.yaml"), SegmentationCLI(list(words), build=False).resolved()
    old, new = ({key: (config | config["trainer"])[key] for key in DECISIVE} for config in configs)
    if found := differences(old, new):
        key, before, now = found[0]
        raise UsageError(
            f"the plan's options are not those of the run {folder}: {key} is {str(now)[:60]!r} and was "
            f"{str(before)[:60]!r}. Delete the run, or give another folder by --runs."
        )
    return True


def finish(folder: Path, words: Sequence[str], threads: int) -> None:
    """Train a run to its end, from its last checkpoint if there is one, and score it; output: FOLDER.log.

    Raises:
        UsageError: a command failed.
    """
    train = [*words, "--output", str(folder), *(["--resume"] if folder.exists() else [])]
    folder.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(f"{folder}.log", "a") as log:
        for command in (["train.py", *train], ["test.py", str(folder), "--checkpoint", "last"]):
            done = subprocess.run([sys.executable, *command], stdout=log, stderr=log, env=environment)
            if done.returncode:
                raise UsageError(f"python {shlex.join(command)} failed: {log.name} says why.")


def write_table(plan: Plan, runs: Path, seeds: Sequence[int], output: Path | None) -> str:
    """Markdown of all titles, printed by the caller and left in `output`."""
    parts = []
    for title, rows in plan.items():
        folders = {row: [run_folder(runs, title, row, seed) for seed in seeds] for row in rows}
        scores = {row: [read_scores(f / "test" / "own-last") for f in own] for row, own in folders.items()}
        parts.append(f"### {title}\n\n{table(scores)}")
    text = "\n".join(parts)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, text)
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], help="titles of the plan (default: all)")
    parser.add_argument("--runs", type=Path, help="folder of the runs (default: runs/PLAN)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they share the CPU's cores")
    parser.add_argument("--output", type=Path, help="Markdown file of the table")
    args = parser.parse_args(argv)
    plan, runs = read_plan(args.plan, args.only), args.runs or Path("runs") / args.plan.stem
    threads = max((os.cpu_count() or 1) // args.jobs, 1)
    # Seed by seed, so that a table with fewer seeds is there early.
    runs_of_plan = {
        run_folder(runs, title, row, seed): [*shlex.split(words), "--seed_everything", str(seed)]
        for seed in args.seeds
        for title, rows in plan.items()
        for row, words in rows.items()
    }
    todo = {folder: words for folder, words in runs_of_plan.items() if not finished(folder, words)}
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = [pool.submit(finish, folder, words, threads) for folder, words in todo.items()]
        try:
            for one in tqdm(waiting, desc=args.plan.stem, unit="run"):
                one.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    print(write_table(plan, runs, args.seeds, args.output))


if __name__ == "__main__":
    with short_errors():
        main()
