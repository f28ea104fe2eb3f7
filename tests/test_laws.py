"""The table of laws in docs/laws.md is whole, and names tests that exist."""

import ast
import functools
import re

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "laws.md").read_text()
NAMED = sorted(set(re.findall(r"`(\w+)::(\w+)`", PAGE)))
LAWS = {1: 18, 2: 8, 3: 9, 4: 7, 6: 7}  # how many there are in each part of the plan; part 5 is not numbered


@functools.cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / f"test_{file}.py").read_text())
    return {node.name.removeprefix("test_") for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_every_test_that_the_page_names_exists(file):
    named = {test for other, test in NAMED if other == file}
    assert named <= names_in(file), named - names_in(file)


def test_every_law_has_a_test():
    wanted = [f"B{part}.{law}" for part, laws in LAWS.items() for law in range(1, laws + 1)]
    rows = {number: row for row in PAGE.splitlines() for number in re.findall(r"^\| (B\d+\.\d+) ", row)}
    assert sorted(rows) == sorted(wanted)
    assert all("::" in row for row in rows.values())
