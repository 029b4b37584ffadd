"""docs/reliability.md lists each fault of F01..F34; the tests that it names exist and run where it says."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/reliability.md").read_text("utf-8")
IDS = [f"F{number:02d}" for number in range(1, 35)]
NAMED = re.findall(r"^(F\d\d|   ) (tests/[\w/]+\.py)::(test_\w+)(?: \((\w+)\))?$", TEXT, re.MULTILINE)


def marks_of_tests(file: Path) -> dict[str, set[str]]:
    """Marks of each test of a file, its own and the file's but not those of single parameters."""
    tree, of_file, found = ast.parse(file.read_text("utf-8")), set(), {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            of_file = set(re.findall(r"pytest\.mark\.(\w+)", ast.unparse(node.value)))
        if isinstance(node, ast.FunctionDef):
            own = {ast.unparse(decorator).removeprefix("pytest.mark.") for decorator in node.decorator_list}
            found[node.name] = (of_file | own) & {"slow", "slurm", "cuda"}
    return found


def test_each_fault_has_a_row_and_a_test():
    rows = re.findall(r"^\| (F\d\d) \| [^|]+ \| [^|]+ \|$", TEXT, re.MULTILINE)
    assert rows == IDS
    assert [number for number, *_ in NAMED if number.strip()] == IDS


def test_each_test_that_is_named_exists_and_is_marked_as_the_page_says():
    listed = TEXT.split("## The tests")[1].count("::test_")
    assert len(NAMED) == listed > 100
    files = {file: marks_of_tests(ROOT / file) for file in {file for _, file, *_ in NAMED}}
    wrong = [
        f"{file}::{name}"
        for _, file, name, mark in NAMED
        if name not in files[file] or files[file][name] != ({mark} if mark else set())
    ]
    assert wrong == []
