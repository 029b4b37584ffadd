"""What a run says when it fails for a known reason that is no bug: what was found, and what to change."""

import errno
import inspect
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

from callbacks.checkpoints import LAST, PREVIOUS, damage

SHOWN = 16  # samples that a message names

DISK_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "a file is larger than the limit (ulimit -f)",
}
WORKER_DIED = r"DataLoader worker \(pid.*?(exited unexpectedly|is killed by signal: [^.]*)"
WORKER_HANGS = r"DataLoader timed out after (\S+) seconds"
WORKER_MEMORY = r"Caught \w*MemoryError in DataLoader worker|DataLoader worker.*Allocator: can't alloc"
SHARED_MEMORY = r"signal: Bus error|shared memory.*No space left|</torch_.*No space left"
OPEN_FILES = r"items of ancdata|Too many open files"  # the first is how it shows in a batch of a worker
CPU_MEMORY = r"DefaultCPUAllocator: can't allocate memory|DefaultCPUAllocator: not enough memory"
OTHER_RANK = (
    r"Connection (closed|reset) by peer|Socket closed|Broken pipe"
    r"|Timed out waiting .* for (recv|send)|collective operation timeout|Heart ?beat.*timed? ?out"
)


def describe(error: BaseException, trainer) -> str | None:
    """Explain the failure of a run in three parts: what is wrong, what was found, what to do.

    Args:
        error: what ended the training; the errors that led to it are looked at as well.
        trainer: the Trainer of the run, with its LightningModule and DataModule.

    Returns:
        A text of a few lines; None for what is no known failure, whose traceback is needed.
    """
    for each in chain(error):
        for explain in (worker_failure, memory_failure, disk_failure, open_files, rank_failure, file_failure):
            if text := explain(each, trainer):
                return f"{text}\n{way_on(trainer)}"
    return None


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it came from."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def way_on(trainer) -> str:
    """Say which checkpoint is there to go on from."""
    folder = Path(trainer.default_root_dir) / "checkpoints"
    for path in (folder / LAST, folder / PREVIOUS):
        if path.is_file() and damage(path) is None:
            # Mapped, not read: it may be larger than the memory that is left.
            step = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
            return f"{path} of step {step} is valid: go on with --resume."
    return f"There is no checkpoint in {folder} yet: start again with --resume or --overwrite."


# --- data workers


def worker_failure(error: BaseException, trainer) -> str | None:
    """A worker of a loader that died, hangs, or has no memory."""
    if not isinstance(error, RuntimeError | MemoryError):
        return None
    text, data = str(error), trainer.datamodule
    workers, batch_size = getattr(data, "num_workers", "?"), getattr(data, "batch_size", "?")
    asked = f"asked for last: {samples(data)}"
    less = f"Lower data.init_args.num_workers (now {workers}) or batch_size (now {batch_size})"
    if re.search(SHARED_MEMORY, text, re.DOTALL):
        return (
            f"A data worker has no shared memory left: found {last_line(text)!r}; {asked}.\n"
            "Give /dev/shm more room (docker run --shm-size 8g, or a larger tmpfs). "
            f"{less}; 0 workers need none."
        )
    if re.search(WORKER_MEMORY, text, re.DOTALL):
        return f"A data worker ran out of memory: found {last_line(text)!r}; {asked}.\n{less}."
    if found := re.search(WORKER_DIED, text):
        return (
            f"A data worker died: found that it {found[1]}; {asked}.\n"
            f"Most often the machine has no memory left (see dmesg, or sacct -o MaxRSS). {less}."
        )
    if found := re.search(WORKER_HANGS, text):
        return (
            f"A data worker hangs: found no batch in {found[1]} seconds; {asked}.\n"
            "Check that these files can be read (is a network drive gone?) and that workers have cores."
        )
    return None


def samples(data) -> str:
    """Name the samples that workers were asked for last."""
    asked = data.asked_last() if hasattr(data, "asked_last") else []
    more = f" and {len(asked) - SHOWN} more" if len(asked) > SHOWN else ""
    return ", ".join(asked[:SHOWN]) + more if asked else "no training samples"


def last_line(text: str) -> str:
    """The error itself, where a text ends with the traceback of another process."""
    return text.strip().splitlines()[-1].strip()[:300]


# --- memory


def memory_failure(error: BaseException, trainer) -> str | None:
    """Out of memory on the device or the host, with what takes most of it."""
    on_host = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search(CPU_MEMORY, str(error))
    )
    if not (on_host or isinstance(error, torch.OutOfMemoryError)):
        return None
    said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    found = [said, *run_facts(trainer)]
    if torch.cuda.is_available() and not on_host:
        peaks = (torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30)
        found.append("peak {:.1f} GiB allocated, {:.1f} GiB reserved".format(*peaks))
    place = "the machine's memory" if on_host else "memory"
    numbered = "\n".join(f"  {number}. {lever}" for number, lever in enumerate(levers(trainer), 1))
    return f"The run is out of {place}: found {'; '.join(found)}.\nChange, largest first:\n{numbered}"


def run_facts(trainer) -> list[str]:
    """What decides on the memory of this run."""
    data = trainer.datamodule
    shape = getattr(data, "last_images", None)
    images = [f"images of the last batch {shape[0]} x {shape[-2]}x{shape[-1]}"] if shape else []
    return [f"batch size {getattr(data, 'batch_size', '?')}", *images, f"precision {trainer.precision}"]


def levers(trainer) -> list[str]:
    """What reduces the memory of this run, the largest first."""
    module, found = trainer.lightning_module, []
    batch_size, accumulated = getattr(trainer.datamodule, "batch_size", 1), trainer.accumulate_grad_batches
    if batch_size > 1 and hasattr(module, "micro_batches"):
        found.append(
            f"model.init_args.micro_batches (now {module.micro_batches}): more, with the same result"
        )
    if batch_size > 1:
        keep = f", with trainer.accumulate_grad_batches (now {accumulated}) as many times larger"
        more = keep if module.automatic_optimization else ""
        found.append(f"data.init_args.batch_size (now {batch_size}): smaller{more}")
    found += [f"model.{name}.gradient_checkpointing: true" for name in without_checkpointing(module)]
    if "16" not in str(trainer.precision):
        found.append(f"trainer.precision: bf16-mixed (now {trainer.precision})")
    return [*found, "crop_size of the data's transform: smaller"]


def without_checkpointing(module: torch.nn.Module) -> list[str]:
    """Names of the parts that have the option gradient_checkpointing and do not use it."""
    return [
        name
        for name, part in module.named_modules()
        if "gradient_checkpointing" in inspect.signature(type(part).__init__).parameters
        and not any(getattr(layer, "gradient_checkpointing", False) for layer in part.modules())
    ]


# --- disk, other processes, files


def disk_failure(error: BaseException, trainer) -> str | None:
    """A file that could not be written for want of room."""
    if not isinstance(error, OSError) or error.errno not in DISK_FULL:
        return None
    file = error.filename or trainer.default_root_dir
    return (
        f"The run cannot write: found that {DISK_FULL[error.errno]} at {file} ({error.strerror}).\n"
        "Make room there. Checkpoints that were written before are whole."
    )


def open_files(error: BaseException, trainer) -> str | None:
    """The limit of open files, of which each tensor that a worker hands over is one."""
    if not (isinstance(error, RuntimeError | OSError) and re.search(OPEN_FILES, str(error))):
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"Too many files are open: found {last_line(str(error))!r} with a limit of {soft}.\n"
        f"Raise it (ulimit -n {hard}), or lower data.init_args.num_workers "
        f"(now {getattr(trainer.datamodule, 'num_workers', '?')})."
    )


def rank_failure(error: BaseException, trainer) -> str | None:
    """Another process of the group that went away."""
    known = isinstance(error, torch.distributed.DistError | ConnectionError) or (
        isinstance(error, RuntimeError) and trainer.world_size > 1
    )
    if not (known and re.search(OTHER_RANK, str(error), re.IGNORECASE | re.DOTALL)):
        return None
    return (
        f"Another process of this run failed first: rank {trainer.global_rank} of {trainer.world_size} found "
        f"{last_line(str(error))!r}.\nLook for the reason in the log of the other ranks."
    )


def file_failure(error: BaseException, trainer) -> str | None:
    """A file of the data that cannot be read, in this process or in a worker."""
    if not getattr(error, "user_error", False):
        return None
    text = re.sub(r"^\w+(\.\w+)*: ", "", last_line(str(error)))
    if getattr(trainer.datamodule, "unreadable", "skip") == "skip":
        return text
    return f"{text}\nIn training, data_faults: skip puts other samples in the place of such, and counts them."
