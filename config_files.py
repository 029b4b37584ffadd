"""Configuration files and mistakes in them, dealt with before anything heavy (torch) is imported."""

import logging
import os
import re
import sys
import warnings
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

import yaml


class UsageError(ValueError):
    """A mistake in a command or a config; the message says what is wrong, what was found and what to do."""


class RunFailed(Exception):
    """A run could not go on, for a reason that its message explains better than a traceback."""


@contextmanager
def short_errors():
    """Inside the block a UsageError ends the program with three lines at most and exit code 2.

    A RunFailed ends it with its message and exit code 1, Ctrl-C where nothing saves with exit code 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except UsageError as error:
        print("error: " + "\n".join(str(error).splitlines()[:3]), file=sys.stderr)
        raise SystemExit(2) from None


def set_environment() -> None:
    """Set what libraries read while they are imported, unless the user has set it."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks a server for its version
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive forked data workers
    os.environ.setdefault("WANDB_SILENT", "true")
    # What Lightning says to every user of a frozen network, of torch 2.13, and of no other logger.
    warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    # The seed stands in run.json; in front of an error it would be a line that explains nothing.
    for name in ("pytorch.utilities.rank_zero", "fabric.utilities.seed"):
        said_to_all = logging.getLogger(f"lightning.{name}")
        said_to_all.addFilter(lambda record: not re.search("litlogger|^Seed set to", record.getMessage()))


def nearest(name: str, valid) -> str | None:
    """Return the valid name most like this one, or None when nothing is similar."""
    found = get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return found[0] if found else None


class _Loader(yaml.SafeLoader):
    """Plain values only, and no key twice in one mapping."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice: remove one of the two", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, name: str) -> dict:
    """Read a mapping from YAML text.

    Raises:
        UsageError: a tab, a python tag, a key given twice, another fault, or no mapping; names `name`:line.
    """
    try:
        config = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        problem = error.problem or "cannot be read"
        line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
        if "\\t" in problem or "\t" in line[: len(line) - len(line.lstrip())]:
            problem = "a tab character: indent with spaces"
        elif "constructor for the tag" in problem:
            tag = problem.split("'")[1].replace("tag:yaml.org,2002:", "!!")
            problem = f"the tag {tag} is refused: a config holds plain values and names classes by class_path"
        raise UsageError(f"{where}: {problem}.") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{name}: not valid YAML: {str(error).splitlines()[0]}.") from None
    if not isinstance(config, dict):
        raise UsageError(
            f"{name}: a config is a mapping such as 'model: ...', found {type(config).__name__}."
        )
    return config


def read_yaml(path: str | Path) -> dict:
    """Read one config file.

    Raises:
        UsageError: the file is missing (with the nearest name that exists), unreadable or faulty.
    """
    path = Path(path)
    if not path.is_file():
        others = [*path.parent.glob("*.yaml"), *Path("conf").glob("**/*.yaml")]
        guess = nearest(str(path), map(str, others))
        hint = (
            f"Did you mean {guess}?"
            if guess
            else "Give the path of a YAML file; conf/ holds those of the project."
        )
        raise UsageError(f"the config file {path} does not exist.\n{hint}")
    try:
        return parse_yaml(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the config file {path} cannot be read: {error}.") from None


def config_paths(args: list[str]) -> list[Path]:
    """Return the files that follow --config or -c, in order.

    Raises:
        UsageError: --config is the last word of the command.
    """
    paths = []
    for i, arg in enumerate(args):
        if arg in ("--config", "-c"):
            if i + 1 == len(args):
                raise UsageError(
                    f"{arg} needs the path of a YAML file, e.g. {arg} conf/mini/supervised_street.yaml."
                )
            paths.append(Path(args[i + 1]))
        elif arg.startswith("--config="):
            paths.append(Path(arg.removeprefix("--config=")))
    return paths


def check_configs(args: list[str]) -> None:
    """Read the config files of a command line once, to find missing and faulty ones before anything else.

    Raises:
        UsageError: a file is missing or faulty, or none is given.
    """
    paths = config_paths(args)
    if not paths and not {"-h", "--help"} & set(args):
        raise UsageError(
            "no config is given.\nStart with --config, e.g. --config conf/mini/supervised_street.yaml."
        )
    for path in paths:
        read_yaml(path)


def differences(old, new, key: str = "") -> list[tuple[str, object, object]]:
    """List (key, old value, new value) wherever two nested configs differ; an absent value is "nothing"."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [(key, old, new)]
    found = []
    for name in {**old, **new}:
        path = f"{key}.{name}" if key else str(name)
        found += differences(old.get(name, "nothing"), new.get(name, "nothing"), path)
    return found
