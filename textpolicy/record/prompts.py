"""Compare the mean reward of each prompt in two samples of completions: two runs, or the two halves of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class PromptRow:
    """The rewards of one prompt in two samples of completions."""

    prompt_index: int
    count: tuple[int, int]  # scored completions
    reward: tuple[float, float]  # their mean
    change: float  # of the mean


def compare(first: pa.Table, second: pa.Table) -> list[PromptRow]:
    """Return the prompts that are in both tables (``prompt_index``, ``reward``), the most changed first."""
    found: list[dict[int, tuple[int, float]]] = []  # of each table: prompt -> (scored completions, their mean reward)
    for table in (first, second):
        scored = table.select(["prompt_index", "reward"]).drop_null()
        means = scored.group_by("prompt_index").aggregate([("reward", "count"), ("reward", "mean")])
        found.append({row["prompt_index"]: (row["reward_count"], row["reward_mean"]) for row in means.to_pylist()})
    a, b = found
    rows: list[PromptRow] = []
    for prompt in sorted(a.keys() & b.keys()):
        (n, before), (m, after) = a[prompt], b[prompt]
        rows.append(PromptRow(prompt, (n, m), (before, after), after - before))
    return sorted(rows, key=lambda row: -abs(row.change))


def halves(table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Return the rows of the first and of the second half of the steps."""
    import pyarrow.compute as pc

    middle = (pc.max(table["step"]).as_py() or 0) / 2
    return table.filter(pc.less(table["step"], middle)), table.filter(pc.greater_equal(table["step"], middle))
