"""docs/reliability.md names a test for every promise: the tests are there, and those of faults are named there."""

import ast
import re

from conftest import ROOT

PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE))
OF_FAULTS = ("test_ends.py", "test_faults.py", "test_kill.py", "test_pickles.py", "test_readers.py")
OF_THE_HARNESS = {
    "test_what_counts_as_a_file_operation",
    "test_the_undisturbed_runs_are_whole",
    "test_the_pickles_are_hostile",
    "test_there_are_more_than_twenty",
}


def functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_test_that_is_named_is_there() -> None:
    assert [f"{file}::{name}" for file, name in sorted(NAMED) if name not in functions(file)] == []


def test_every_test_of_a_fault_is_named() -> None:
    there = {(file, name) for file in OF_FAULTS for name in functions(file) - OF_THE_HARNESS}
    assert sorted(there - NAMED) == []


def test_there_are_at_least_25_faults_each_with_a_test() -> None:
    table = PAGE.partition("## Faults")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 25 and all(re.search(r"`test_\w+\.py::test_\w+`", row) for row in rows)
