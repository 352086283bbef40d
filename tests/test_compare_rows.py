"""The comparison of a benchmark's newest row with the one before it."""

import json

import pytest
from running import ROOT

ROW = {"recipe": "grpo", "completions": 8, "tokens": 64, "commit": "a", "load_average": 1.0}


def row(machine, tokens_ms, credit_ms):
    return {**ROW, "machine": machine, "tokens_ms": {"min": tokens_ms}, "credit_ms": {"min": credit_ms}}


@pytest.fixture
def compared(tmp_path, monkeypatch):
    """``compared(rows, limit)``: the lines and the verdict on a file with these rows."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from compare import compare

    def compared(rows, limit=0.15):
        path = tmp_path / "credit.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return compare(path, limit)

    return compared


def test_a_figure_that_is_worse_by_more_than_the_limit_fails(compared):
    lines, worse = compared([row("mac", 10, 20), row("mac", 11.6, 20)])
    assert worse
    assert [line.split()[0] for line in lines] == ["WORSE", "ok"]
    assert "10 -> 11.6" in lines[0]
    assert not compared([row("mac", 10, 20), row("mac", 11.6, 20)], limit=0.2)[1]
    assert not compared([row("mac", 10, 20), row("mac", 5, 20)])[1]


def test_only_rows_of_one_machine_and_workload_are_compared(compared):
    assert compared([row("mac", 10, 20), row("server", 99, 99)]) == ([], False)
    assert compared([row("mac", 10, 20), {**row("mac", 99, 99), "recipe": "full"}]) == ([], False)
    assert compared([row("mac", 10, 20), row("server", 1, 1), row("mac", 99, 99)])[1]


def test_the_newest_row_is_compared_with_the_one_before_it(compared):
    assert not compared([row("mac", 10, 20), row("mac", 99, 20), row("mac", 100, 20)])[1]
