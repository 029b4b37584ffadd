"""Mistakes in configs and data, told in three lines: which key, what was given, the nearest valid name."""

import ast
import importlib
import inspect
import re
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks.run_record import is_secret
from config_files import UsageError, config_paths, nearest, read_yaml

ROOT = Path(__file__).parent
ROOMS = ("lightning_modules", "models", "datamodules")


@contextmanager
def edge_errors(over: Callable[[], bool] = lambda: False):
    """Inside the block, what this project's own checks find becomes a UsageError; bugs keep their traceback.

    Args:
        over: when true, nothing is converted any more.
    """
    try:
        yield
    except UsageError:
        raise
    except (FileNotFoundError, ValueError, MisconfigurationException) as error:
        found = None if over() else edge_error(error)
        if found is None:
            raise
        raise UsageError(str(found)) from error


def edge_error(error: BaseException | None) -> BaseException | None:
    """Find, among an error and its causes, a missing file, a wrong Trainer option or our ValueError."""
    while error is not None:
        if told := union_reason(error):
            return ValueError(told)
        frame = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        ours = frame.is_relative_to(ROOT) and "site-packages" not in frame.parts
        if isinstance(error, FileNotFoundError | MisconfigurationException) or (
            ours and isinstance(error, ValueError)
        ):
            return error
        error = error.__cause__  # jsonargparse wraps what a constructor raises
    return None


def union_reason(error: BaseException) -> str | None:
    """What a constructor said, where jsonargparse tried several types and kept the errors as text only."""
    if not str(error).startswith("Does not validate against any of the Union subtypes"):
        return None
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    own = [line for line in told if not line.startswith(("Expected ", "Does not validate"))]
    return own[0] if own else None


def explain(message: str, known: list[str], args: list[str], config: dict | None = None) -> str:
    """Shorten jsonargparse's explanation of a mistake to at most three lines.

    Args:
        message: its explanation.
        known: the keys outside model and data.
        args: the command line, where the value given is looked up, as in the files it names.
        config: looked up instead of the files.

    Returns:
        Which key is wrong, what was given, and the nearest valid name.
    """
    if match := re.match(r"(.*)\n\s+full_key: (\S+)", message):
        return f"{match[2]}: {match[1]}.\nCheck the name between ${{ and }}."
    key, owner, reason = _innermost(message)
    if match := re.search(
        r"Option '(.+)' is not accepted|Group '(.+)' does not accept option '(.+)'", reason
    ):
        option = match[1] or f"{match[2]}.{match[3]}"
        return _unknown(f"{key}.{option}" if key else option, owner, known, _given(option, args, config))
    if match := re.match(r"unrecognized arguments: --([^\s=]+)", reason):
        return _unknown(match[1], "", known, _given(match[1], args, config))
    if re.search(
        r"has no attribute|No module named|not correspond to a subclass|[Uu]nexpected import", reason
    ):
        named = re.search(r"module '(.+)' has no attribute '(.+)'", reason)
        path = owner or str(_given(key, args, config))
        if named and not path.startswith(".".join(named.groups())):
            path = ".".join(named.groups())
        guess = nearest(path, project_classes())
        hint = f"\nDid you mean {guess}?" if guess and guess != path else ""
        return f"{key}.class_path (given: {path}): {reason.partition('. Got value')[0]}.{hint}"
    if match := re.match(r"the following arguments are required: (.+)", reason):
        hint = f"Set {key}.init_args.{match[1].split(',')[0]}."
        return f"{key} lacks {match[1]}, which {owner or 'it'} needs.\n{hint}"
    choices = re.findall(r"Expected a typing.Literal\[(.+)\]", message)
    types = re.findall(r"Expected an? <class '(?!NoneType)([\w.]+)'>", message)
    if choices or types:
        given = re.search(r"Got value: (.+?)(?:\. Got value|$)", reason)
        value = given[1] if given else _given(key, args, config)
        expected = ", ".join(choices) if choices else " or ".join(dict.fromkeys(types))
        guess = nearest(str(value), re.findall(r"'([^']+)'", expected)) if choices else None
        hint = f"\nDid you mean {guess}?" if guess else ""
        kind = "value" if choices else "type"
        return f"{key} has a wrong {kind}: given {value!r}, expected {expected}.{hint}"
    return f"{key}: {reason}" if key and key not in reason else reason


def _innermost(message: str) -> tuple[str, str, str]:
    """Return key, class around it and reason from the bottom of jsonargparse's nested explanation."""
    keys, owner, reason = [], "", message.strip().splitlines()[0]
    noise = r"Does not validate|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|Expected a path|$"
    for line in (line.strip().removeprefix("- ") for line in message.splitlines()):
        if match := re.match(r"Type \S*Callable\[.*?: (.*)", line):  # a class whose instances are called
            line = match[1]
            around = re.search(r"class_path='(.+?)'", message)
            owner = around[1] if around else ""
        if match := re.match(r'Parser key "(.+?)"[^:]*:\s*(.*)', line):
            keys, line = [*keys, match[1]], match[2]
        elif match := re.match(r"Problem with given class_path '(.+?)':\s*(.*)", line):
            owner, line = match[1], match[2]
        if not re.match(noise, line):
            reason = line
            break
    return ".".join(keys), owner, reason


def _unknown(key: str, owner: str, known: list[str], given) -> str:
    """Say that a key does not exist, and which one is like it."""
    room, _, option = key.rpartition(".")
    if owner:
        valid = _parameters(owner)
        guess, where = nearest(option, valid), f"of {owner}"
    else:
        valid, where = [*known, "model", "data", "config"], "of this command"
        guess, room = nearest(key, valid), ""
    hint = (
        f"Did you mean {room + '.' if room else ''}{guess}?"
        if guess
        else f"Known: {', '.join(sorted(valid)[:12])}."
    )
    return f"{key} (given: {given}) is not an option {where}.\n{hint}"


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)


def _given(key: str, args: list[str], config: dict | None):
    """Find the value that the command line or a config gives to a key; the last part of the key is enough."""
    option = key.rpartition(".")[2]
    if is_secret(option):
        return "a secret"
    for word, following in zip(args, [*args[1:], ""], strict=False):
        name, _, value = word.partition("=")
        if name.startswith("--") and re.split(r"[.-]", name)[-1] == option:
            return value or following
    files = [config] if config is not None else [read_yaml(path) for path in config_paths(args)]
    found = [value for file in files for value in _values(file, option)]
    return found[-1] if found else "nothing"


def _values(node, option: str):
    if isinstance(node, dict):
        for key, value in node.items():
            if key == option:
                yield value
            yield from _values(value, option)
    elif isinstance(node, list):
        for value in node:
            yield from _values(value, option)


def project_classes() -> list[str]:
    """Return the full paths of the classes in the rooms of this project, read without importing them."""
    paths = []
    for file in (file for room in ROOMS for file in (ROOT / room).glob("**/*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        classes = (node for node in ast.parse(file.read_text("utf-8")).body if isinstance(node, ast.ClassDef))
        paths += [f"{module}.{node.name}" for node in classes]
    return paths
