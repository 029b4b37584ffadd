"""The rooms of the house depend on each other in one direction only."""

import ast
import io
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "train",
    "test",
    "predict",
    "video",
    "compare",
    "cli",
    "config_files",
    "comparison_page",
    "mistakes",
    "run_folder",
}
COMMANDS |= {"scripts", "benchmarks"}
ROOMS = {"functional", "models", "datamodules", "callbacks", "lightning_modules"} | COMMANDS
ALLOWED = {
    "functional": {"functional"},
    "models": {"models", "functional"},
    "datamodules": {"datamodules", "functional"},
    "callbacks": {"callbacks", "functional"},
    "lightning_modules": {"lightning_modules", "models", "functional"},
}


def imported_rooms(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names & ROOMS


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_a_room_imports_only_the_rooms_below_it(room):
    upward = {
        f"{path.relative_to(ROOT)}: {sorted(extra)}"
        for path in (ROOT / room).rglob("*.py")
        if (extra := imported_rooms(path) - ALLOWED[room])
    }
    assert not upward


FILES = [
    p for room in sorted(ROOMS) for p in [ROOT / f"{room}.py", *(ROOT / room).rglob("*.py")] if p.exists()
]


def lines_of_code(source: str) -> int:
    """Lines that hold code: not those of comments and docstrings, and not the empty ones."""
    documentation = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
            documentation |= set(range(node.lineno, node.end_lineno + 1))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped | {tokenize.ENDMARKER}:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - documentation)


def test_no_product_file_is_longer_than_450_lines():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in FILES}
    assert {name: n for name, n in lengths.items() if n > 450} == {}


def test_the_product_stays_small():
    # Code alone is counted, so that nobody saves on what is written for the reader. The mini world with the
    # training of its model is a third of it; four methods with 18 data sets, the commands, and what lets a
    # run survive a cluster are the rest.
    assert lines_of_code('"""Doc\nstring."""\n\n# comment\nx = (\n    1\n)\n') == 3
    # What only measures and checks it, against other orders of work written out in full, is like tests/.
    product = [p for p in FILES if not p.is_relative_to(ROOT / "benchmarks")]
    assert sum(lines_of_code(p.read_text()) for p in product) <= 15500


@pytest.mark.slow
def test_the_core_imports_neither_torchvision_nor_xformers():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for room in ALLOWED
        for path in sorted((ROOT / room).rglob("*.py"))
        if path.name != "__init__.py"
    ]
    code = (
        "import importlib, sys\n"
        "sys.modules['torchvision'] = sys.modules['xformers'] = None\n"
        f"for name in {['cli', 'predict', *modules]!r}: importlib.import_module(name)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_package_is_installed():
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    rooms = {
        p.parent.relative_to(ROOT).as_posix().replace("/", ".") for p in FILES if p.name == "__init__.py"
    }
    assert declared == rooms - {"benchmarks"}
