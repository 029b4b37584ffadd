"""Where and with what code a measurement was made, and how its result is kept."""

import json
import platform
import re
from pathlib import Path

import torch

from callbacks.run_record import git_state, write_atomically


def processor() -> str:
    """The processor's name: of /proc/cpuinfo where there is one, else what Python knows."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", path.read_text()) if path.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def provenance() -> dict:
    """Commit of the code, whether it was changed since, the processor's name, torch's version and threads."""
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    return {**git_state(Path(__file__).parent), "processor": processor(), **versions}


def report(result: dict, output: Path | None) -> None:
    """Print a result as JSON, and write it to a file if one is given."""
    text = json.dumps(result, indent=2) + "\n"
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, text)
    print(text)
