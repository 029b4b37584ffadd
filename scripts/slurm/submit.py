"""Check a training job for SLURM, write its file into the run folder, and submit it.

    python -m scripts.slurm.submit --config conf/madm_rgb2depth.yaml --config conf/slurm.yaml --time 24:00:00
    python -m scripts.slurm.submit --config conf/diff_gta2cityscapes.yaml --gpus 1 --time 1-0 --seeds 0 1 2

All words that are not listed below are those of train.py's command line and are checked as it does. The job
saves before its time limit, is queued again and goes on until it has finished. With --seeds it is an array:
one run for each seed, in OUTPUT/seed-N.
"""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

from config_files import UsageError, check_configs, config_paths, read_yaml, set_environment, short_errors

TEMPLATE = Path(__file__).parent / "train.sbatch"
EARLY = 60  # seconds by which SLURM may send a signal early (man sbatch, --signal)


def seconds(text: str) -> int:
    """Read SLURM's notation of a time: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        UsageError: it is none of these, or no time at all.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise UsageError(
            f"--time (given: {text}) is no time of SLURM's.\n"
            "Write 90 (minutes), 1:30:00 or 1-12:00:00 (a day and a half)."
        )
    days, *parts = match.groups()
    parts = [int(part) for part in parts if part]
    if days is None and len(parts) < 3:
        parts = [0, *parts]  # minutes come first unless hours or days are given
    hours, minutes, rest = (*parts, 0, 0)[:3]
    found = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest
    if not found:
        raise UsageError(
            f"--time (given: {text}) is no time at all.\nGive the limit of one stretch of the job."
        )
    return found


def processes(trainer, nodes: int | None, gpus: int | None) -> tuple[int, int, int]:
    """Return (nodes, processes of a node, GPUs of a node), what is not given taken from the config.

    Args:
        trainer: the config's section, with accelerator, num_nodes and devices.
        nodes, gpus: what the job is to ask for; gpus for each node.

    Raises:
        UsageError: the job's and the config's numbers differ; names both.
    """
    on_cpu = trainer.accelerator == "cpu" or (gpus == 0 and trainer.accelerator == "auto")
    if isinstance(trainer.devices, list):
        devices = len(trainer.devices)
    elif re.fullmatch(r"\d+", str(trainer.devices)):
        devices = int(trainer.devices)
    else:  # "auto" and -1 take all there is: one process on CPUs, else the GPUs of the job
        devices = 1 if on_cpu else gpus
    if devices is None:
        raise UsageError(
            f"neither --gpus nor trainer.devices (given: {trainer.devices}) tells the number of GPUs.\n"
            "Give one of them; conf/slurm.yaml is an overlay for several nodes."
        )
    nodes, gpus = nodes or trainer.num_nodes, (0 if on_cpu else devices) if gpus is None else gpus
    if nodes != trainer.num_nodes or gpus != (0 if on_cpu else devices):
        raise UsageError(
            f"the job asks for {nodes} node(s) with {gpus} GPU(s) each, the config for {trainer.num_nodes} "
            f"node(s) with {devices} process(es) each on accelerator {trainer.accelerator!r}.\n"
            "Change --nodes and --gpus, or trainer.num_nodes and trainer.devices (see conf/slurm.yaml)."
        )
    return nodes, devices, gpus


def check_folder(folder: Path, resume: bool, words: list[str]) -> None:
    """Refuse a run folder in which the job could not begin or go on.

    Args:
        folder: of one run.
        resume: whether it may hold one.
        words: of train.py's command line for this run.

    Raises:
        UsageError: it holds a run without --resume, one of other options, or one that has finished.
    """
    from cli import SegmentationCLI
    from run_folder import RUN_FILES, RUN_FOLDERS, check_unchanged

    if not any((folder / name).exists() for name in (*RUN_FILES, *RUN_FOLDERS)):
        return
    if not resume:
        raise UsageError(
            f"the folder {folder} holds a run.\n"
            "Add --resume to go on with it, or --output DIR for another folder."
        )
    if (folder / "config.yaml").is_file():
        new = SegmentationCLI(words, build=False).resolved()
        check_unchanged(read_yaml(folder / "config.yaml"), new)
        step, last = read_yaml(folder / "run.json").get("step", 0), new["trainer"]["max_steps"]
        if 0 < last <= step and read_yaml(folder / "run.json").get("status") == "finished":
            raise UsageError(
                f"the run in {folder} has finished: step {step} is its last.\n"
                "Raise trainer.max_steps to go on, or leave its seed out."
            )


def job_file(sbatch: list[str], words: str, python: str) -> str:
    """Return train.sbatch with other options for sbatch and with the words of train.py.

    Args:
        sbatch: options, such as "--nodes=2".
        words: as the shell reads them.
        python: the interpreter.
    """
    head = ["#!/bin/bash", "# Written by scripts/slurm/submit.py; submit it again by sbatch and this file."]
    for word in sbatch:
        key, equals, value = word.partition("=")
        head.append(f"#SBATCH {key}{equals}{shlex.quote(value) if value else ''}")
    body = re.split(r"(?m)^#SBATCH.*\n", TEMPLATE.read_text("utf-8"))[-1]
    return "\n".join([*head, "", f"PYTHON={shlex.quote(python)}", f"set -- {words}", body])


def submit(path: Path) -> str:
    """Submit a job file and return the job's id.

    Raises:
        UsageError: there is no sbatch, or it refuses; says what it said.
    """
    try:
        done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    except FileNotFoundError:
        raise UsageError(
            f"the job is written, {path}, but there is no sbatch on this machine.\n"
            "Submit it by `sbatch` on a login node of the cluster; --dry-run only writes it."
        ) from None
    if done.returncode:
        raise UsageError(
            f"sbatch refuses {path}: {' '.join(done.stderr.split())}\n"
            "Change --partition, --account, --time, --gpus or --sbatch-arg; `sinfo` shows what there is."
        )
    return done.stdout.strip().split(";")[0]  # behind the semicolon: the cluster, where there are several


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--nodes", type=int, help="default: trainer.num_nodes")
    parser.add_argument("--gpus", type=int, help="of each node (default: trainer.devices); 0: CPUs only")
    parser.add_argument("--cpus", type=int, help="of each process (default: its data workers and one more)")
    parser.add_argument(
        "--time", required=True, help="limit of one stretch, in SLURM's notation: 24:00:00, 1-12"
    )
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument(
        "--requeue", action=argparse.BooleanOptionalAction, default=True, help="go on by itself"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="a job array, one run for each seed")
    parser.add_argument("--name", help="of the job (default: name of the run folder)")
    parser.add_argument("--signal-seconds", type=int, default=120, help="time to save before the limit")
    parser.add_argument(
        "--sbatch-arg", action="append", default=[], help="e.g. --sbatch-arg=--mem=64G; repeatable"
    )
    parser.add_argument("--dry-run", action="store_true", help="check and write the file, do not submit it")
    options, words = parser.parse_known_args(argv)
    set_environment()
    check_configs(words)
    limit = seconds(options.time)
    if options.signal_seconds < 1:
        raise UsageError(
            f"--signal-seconds (given: {options.signal_seconds}) must be 1 or more.\n"
            "Give the time that a step and its saving take; 120 is the default."
        )
    if limit <= options.signal_seconds + EARLY:
        raise UsageError(
            f"--time {options.time} leaves nothing to train in: the signal to save comes "
            f"{options.signal_seconds} s (--signal-seconds) before the end, or up to {EARLY} s earlier.\n"
            "Give more --time, or fewer --signal-seconds."
        )
    if len(set(options.seeds)) < len(options.seeds) or min(options.seeds, default=0) < 0:
        raise UsageError(f"--seeds (given: {options.seeds}) must be different numbers, none below 0.")
    print(prepare(options, words))


def prepare(options: argparse.Namespace, words: list[str]) -> str:
    """Check the config and the folders, write the job file, and submit it; return what to tell.

    Args:
        options: of this command.
        words: of train.py's command line.
    """
    from callbacks.run_record import secret_values
    from cli import SegmentationCLI

    command = SegmentationCLI(words, build=False)
    command.check_trains()
    config = command.config
    refuse(words, options.seeds, config.overwrite, secret_values(command.resolved()))
    nodes, tasks, gpus = processes(config.trainer, options.nodes, options.gpus)
    folder = Path(config.output or Path("runs") / config_paths(words)[0].stem)
    folders = {folder / f"seed-{seed}": ["--seed_everything", str(seed)] for seed in options.seeds}
    folders = folders or {folder: []}
    for own, seed in folders.items():
        check_folder(own, config.resume, [*words, *seed])
    array = '"$SLURM_ARRAY_TASK_ID"'  # the array's ids are the seeds
    shell = shlex.join(words if config.output and not options.seeds else [*words, "--output", str(folder)])
    shell += f"/seed-{array} --seed_everything {array}" if options.seeds else ""
    sbatch = {
        "job-name": options.name or folder.name,
        "chdir": str(Path.cwd()),
        "nodes": nodes,
        "ntasks-per-node": tasks,
        "gpus-per-node": gpus or None,
        "cpus-per-task": options.cpus or 1 + max(workers(command.resolved()), default=0),
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "signal": f"USR1@{options.signal_seconds}",
        "open-mode": "append",
        "output": f"{folder}/seed-%a/slurm-%A.log" if options.seeds else f"{folder}/slurm-%j.log",
        "array": ",".join(map(str, options.seeds)) or None,
    }
    lines = [f"--{key}={value}" for key, value in sbatch.items() if value is not None]
    lines += ["--requeue" if options.requeue else "--no-requeue", *options.sbatch_arg]
    path = folder / "job.sbatch"
    write(path, list(folders), job_file(lines, shell, sys.executable))
    if options.dry_run:
        return f"{path} is written. Submit it by: sbatch {shlex.quote(str(path))}"
    return f"Submitted batch job {submit(path)} ({path}); its log: {sbatch['output']}"


def refuse(words: list[str], seeds: list[int], overwrite: bool, secrets: set[str]) -> None:
    """Refuse what train.py's command line may hold, but a job that runs again may not.

    Raises:
        UsageError: --overwrite, two seeds for one run, or a secret.
    """
    from callbacks.run_record import redact_command

    if overwrite:
        raise UsageError(
            "--overwrite would delete the run each time the job is queued again.\nDelete the folder by hand."
        )
    if seeds and any(word.partition("=")[0] == "--seed_everything" for word in words):
        raise UsageError("--seed_everything and --seeds both give the seed.\nLeave the first out.")
    clean = redact_command(words, secrets)
    if any(word != hidden and "${" not in word for word, hidden in zip(words, clean, strict=True)):
        raise UsageError(
            "the command holds a secret, which would stand in the job file.\n"
            "Export it under a name and write ${oc.env:NAME} in its place; jobs inherit the environment."
        )


def workers(node) -> list[int]:
    """List the values of num_workers anywhere in a nested config."""
    if isinstance(node, list):
        return [number for each in node for number in workers(each)]
    if not isinstance(node, dict):
        return []
    own = [node["num_workers"]] if isinstance(node.get("num_workers"), int) else []
    return own + [number for each in node.values() for number in workers(each)]


def write(path: Path, folders: list[Path], text: str) -> None:
    """Write a job file and make the folders of its logs, which SLURM does not.

    Raises:
        UsageError: that is not allowed there.
    """
    from callbacks.run_record import write_atomically

    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error}.\nChoose another folder by --output DIR."
        ) from None


if __name__ == "__main__":
    with short_errors():
        main()
