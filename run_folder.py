"""The folder of a run: who may write into it, what it holds, and its checkpoints."""

import json
import os
import shutil
import socket
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from callbacks.checkpoints import LAST, PREVIOUS, damage
from callbacks.run_record import REDACTED, redact, secret_values, write_atomically
from config_files import UsageError, differences

RUN_FILES = ("config_as_given.yaml", "config.yaml", "run.json", "metrics.json", "metrics.md", "metrics.csv")
RUN_FOLDERS = ("checkpoints", "pictures", "wandb", "test", "predictions", "non_finite")
# Options of the Trainer that change what a step computes, or the schedule.
COURSE = (
    *("max_steps", "accumulate_grad_batches", "precision", "sync_batchnorm"),
    *("gradient_clip_val", "gradient_clip_algorithm"),
)
HEARTBEAT = 30  # seconds between two touches of a lock


def open_run_folder(lock: "RunLock", resume: bool, overwrite: bool) -> Path | None:
    """Make a folder ready for a run and return the checkpoint to go on from (None: a fresh start).

    Args:
        lock: of the folder; the first process takes it.
        resume, overwrite: what to do with a run that the folder holds.

    Raises:
        UsageError: the folder holds a run and neither option is given, both are, it cannot be written, or
            another process writes into it.
    """
    folder = lock.path.parent
    held = [name for name in (*RUN_FILES, *RUN_FOLDERS) if (folder / name).exists()]
    if resume and overwrite:
        raise UsageError("--resume goes on with a run and --overwrite deletes it: give one of the two.")
    if rank_zero_only.rank == 0:  # the other ranks may come when the first has begun to write
        if held and not (resume or overwrite):
            raise UsageError(
                f"the folder {folder} holds a run ({', '.join(held[:3])}).\n"
                "Add --resume to go on with it, --overwrite to delete it, or --output DIR for another folder."
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".writable").touch()
            (folder / ".writable").unlink()
        except OSError as error:
            raise UsageError(
                f"the run folder {folder} cannot be written: {error}.\nChoose another by --output DIR."
            ) from None
        lock.take()
        for path in (folder / name for name in held if overwrite):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if resume and any((folder / "checkpoints").glob("*.ckpt")):
        return sound_checkpoint(folder)
    if resume and held and rank_zero_only.rank == 0:
        print(f"{folder} holds no checkpoint yet: the run begins with its first step.", file=sys.stderr)
    return None


def sound_checkpoint(run: Path) -> Path:
    """Return the latest checkpoint of a run that is whole: `last`, or with a warning the one before it.

    Raises:
        UsageError: neither is; a run that has checkpoints never starts anew by itself.
    """
    faults = []
    for path in (run / "checkpoints" / LAST, run / "checkpoints" / PREVIOUS):
        fault = damage(path) if path.is_file() else "there is no such file"
        if fault is None:
            break
        faults.append(f"{path} ({fault})")
    else:
        others = sorted(path.name for path in (run / "checkpoints").glob("*.ckpt"))
        others = ", ".join(name for name in others if name not in (LAST, PREVIOUS)) or "none"
        raise UsageError(
            f"no checkpoint to go on from is whole: {', '.join(faults)}.\n"
            f"Copy another to {LAST} (found: {others}), or start again by --overwrite or another --output."
        )
    if faults:
        rank_zero_warn(f"{faults[0]} cannot be used: the run goes on from the one before, {path}.")
        if rank_zero_only.rank == 0 and (damaged := run / "checkpoints" / LAST).is_file():
            damaged.rename(damaged.with_name(f"{LAST}.damaged"))  # or it would become the one before
    return path


class RunLock:
    """Keeps a second process from writing into the folder of a run that goes on.

    The file .lock names host, process and SLURM job, and is touched every `HEARTBEAT` seconds. It is stale,
    and taken over, when its process on this host has ended, when it has not been touched for a while, or when
    it is of this same job on another host, on which SLURM has started it again.
    """

    def __init__(self, folder: Path):
        self.path = folder / ".lock"
        self.stop = threading.Event()
        self.taken = False

    def take(self) -> None:
        """Write the lock.

        Raises:
            UsageError: another run holds it; names its host, process and time.
        """
        own = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "job": os.environ.get("SLURM_JOB_ID"),
        }
        try:
            with self.path.open("x") as file:
                file.write(json.dumps(own))
        except FileExistsError:
            held = self.holder(own)
            held = self.take_over(own) if held is None else held
            if held is not None:
                raise UsageError(
                    f"the folder {self.path.parent} is in use: by process {held.get('pid')} on "
                    f"{held.get('host')}, since {held.get('started')}.\nWait for it or stop it, or choose "
                    f"another --output DIR. If it is gone, delete {self.path}."
                ) from None
            print(f"{self.path} is of a run that has ended: taken over.", file=sys.stderr)
        self.taken = True
        threading.Thread(target=self.beat, daemon=True).start()

    def take_over(self, own: dict) -> dict | None:
        """Replace a stale lock; of several processes one does, the others are returned who was faster."""
        claim = self.path.with_name(".lock.claim")
        if claim.exists() and self.age(claim) > 2 * HEARTBEAT:
            claim.unlink(missing_ok=True)  # of a process that was killed while it took over
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            return {"pid": "unknown", "host": "some host", "started": "just now"}
        try:
            if (held := self.holder(own)) is None:
                write_atomically(self.path, json.dumps(own))
        finally:
            claim.unlink()
        return held

    def holder(self, own: dict) -> dict | None:
        """Return who holds the lock, None if it is stale."""
        try:
            held, age = self.read(), self.age(self.path)
        except FileNotFoundError:
            return None
        if age > 10 * HEARTBEAT:
            return None
        if held.get("host") == own["host"]:
            gone = held["pid"] == own["pid"] or not process_runs(held["pid"])
            return None if gone else held
        started_again = own["job"] is not None and held.get("job") == own["job"]
        return None if started_again else held

    def read(self) -> dict:
        """What the lock holds; nothing where another run has just begun to write it."""
        try:
            return json.loads(self.path.read_text())
        except ValueError:
            return {}

    def age(self, path: Path) -> float:
        """Seconds since a file was touched, by the clock of the file system and not of this machine."""
        probe = self.path.with_name(f".lock.now-{os.getpid()}")
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now - path.stat().st_mtime

    def beat(self) -> None:
        while not self.stop.wait(HEARTBEAT):
            with suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        """Stop touching the file and delete it, if it was taken and is still this process's."""
        self.stop.set()
        with suppress(FileNotFoundError):
            if self.taken and self.read().get("pid") == os.getpid():
                self.path.unlink()


def process_runs(number: int) -> bool:
    """Whether a process of this number exists on this host."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True


def check_unchanged(old: dict, new: dict) -> None:
    """Refuse to resume with another model, other training data or another seed.

    The checkpoint's optimiser and schedule would bring back the old rates, and the samples drawn so far would
    be counted by another batch size, while the run's record says otherwise. Options of the Trainer that
    change the course are allowed with a warning.

    Args:
        old: resolved config of the checkpoint, without secrets.
        new: resolved config of the command.

    Raises:
        UsageError: names what differs.
    """
    new = redact(new, secret_values(new))
    trainers = [c.get("trainer", {}) for c in (old, new)]
    old, new = ({k: c.get(k) for k in ("seed_everything", "model", "data")} for c in (old, new))
    changed = []
    for key, before, now in differences(old, new):
        parts = key.split(".")
        only_evaluation = parts[0] == "data" and any(part.startswith("eval_") for part in parts)
        only_speed = parts[0] == "data" and parts[-1] == "num_workers"
        if not (only_evaluation or only_speed or REDACTED in f"{before}{now}"):
            changed.append(f"{key} ({str(before)[:60]!r} -> {str(now)[:60]!r})")
    if changed:
        more = f" and {len(changed) - 10} more" if len(changed) > 10 else ""
        raise UsageError(
            "--resume goes on with the options that the run began with, but found others now:\n"
            f"{', '.join(changed[:10])}{more}.\n"
            "Leave these changes out, or start another run with --output DIR."
        )
    of_trainer = [
        f"trainer.{key} ({before!r} -> {now!r})"
        for key, before, now in differences(*({k: c.get(k) for k in COURSE} for c in trainers))
    ]
    if of_trainer:
        rank_zero_warn(
            f"The run goes on with other options: {', '.join(of_trainer)}. From here on it is not the run "
            "that it would have been without the stop."
        )


def checkpoint_path(run: Path, which: str | None) -> Path:
    """Return a checkpoint of a run folder: by name ("best"), path, or None for the best, else the last.

    Raises:
        UsageError: there is no such file; names those that exist.
    """
    folder = run / "checkpoints"
    if which is None:
        which = "best" if (folder / "best.ckpt").is_file() else "last"
    path = folder / f"{which}.ckpt"
    path = path if which in ("best", "last") or path.is_file() else Path(which)
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in folder.glob("*.ckpt"))) or "none"
        raise UsageError(f"there is no checkpoint {path}.\nThe run folder {run} holds: {found}.")
    return path


def load_checkpoint(path: Path, sound: bool = False) -> dict:
    """Read a checkpoint without running code from it.

    Args:
        path: of its file.
        sound: whether its checksums are known to be right; they take a reading of the whole file.

    Raises:
        UsageError: the file is damaged, or holds more than tensors and plain values, or no config.
    """
    if not path.is_file():
        raise UsageError(f"there is no checkpoint {path}.")
    if not sound and (fault := damage(path)):
        others = ", ".join(sorted(p.name for p in path.parent.glob("*.ckpt") if p != path)) or "none"
        raise UsageError(f"the checkpoint {path} is damaged: {fault}.\nIts folder holds others: {others}.")
    try:
        # Mapped: who wants the config alone need not have room for the weights.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # zip, pickle and end-of-file errors have no common class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"the checkpoint {path} cannot be read safely: {reason}.") from None
    if not isinstance(checkpoint, dict) or not {"config", "classes", "state_dict"} <= checkpoint.keys():
        raise UsageError(f"{path} is no checkpoint of this project: it lacks config, classes or state_dict.")
    return checkpoint
