"""The table of bad input in docs/bad_input.md: long enough, and every test that it names exists."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "bad_input.md"


def table():
    """The (input, what happens, test) of each row."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("|")]
    return cells[2:]


def functions_of(path):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_the_table_has_at_least_sixty_rows_each_of_its_own():
    rows = table()
    assert len(rows) >= 60
    assert all(len(row) == 3 and all(row) for row in rows)
    assert len({row[0] for row in rows}) == len(rows)


def test_every_test_that_the_table_names_exists():
    named = [re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)(?:\[(.+)\])?`", row[2]) for row in table()]
    assert all(named)
    for match in named:
        path, name, case = match.groups()
        assert name in functions_of(path), f"{path} has no {name}"
        if case:
            assert f'"{case}"' in (ROOT / path).read_text(encoding="utf-8"), f"{path} has no case {case}"
