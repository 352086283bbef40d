"""The table of rules for mathematical answers in docs/02_rewards.md is what the grader does."""

import re
from pathlib import Path

import pytest

from textpolicy.rewards.math import grade_math_answer

PAGE = Path(__file__).parents[2] / "docs" / "02_rewards.md"
ROW = re.compile(
    r"\| (?P<rule>[^|]*)\| `(?P<given>(?:[^`|]|\\\|)+)` \| `(?P<reference>[^`|]+)` \| (?P<equal>yes|no) \|"
)


def rows():
    table = (
        PAGE.read_text(encoding="utf-8").partition("| rule | answer | reference | equal |\n")[2].partition("\n\n")[0]
    )
    return table.splitlines()[1:]


@pytest.mark.parametrize("row", rows())
def test_a_row_of_the_table_of_rules_is_graded_as_it_says(row):
    found = ROW.fullmatch(row)
    assert found, row
    given = found["given"].replace(r"\|", "|")
    assert grade_math_answer(given, found["reference"]) == (found["equal"] == "yes")


def test_the_table_has_a_row_for_each_rule_and_verdicts_of_both_kinds():
    assert len(rows()) > 50
    assert sum(row.endswith("| no |") for row in rows()) > 15
