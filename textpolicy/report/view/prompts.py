"""Count how often each training prompt of a run was answered right, and how its reward changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ...record.prompts import compare, halves

if TYPE_CHECKING:
    import pyarrow as pa

Order = Literal["hardest", "easiest", "changed"]


@dataclass(frozen=True, slots=True)
class Judged:
    """The completions of one prompt: how many there are, and what they earned."""

    prompt_index: int
    count: int
    right: float | None  # share of the completions that the reward calls correct or wrong; None: it calls none so
    reward: float | None  # mean of those scored
    change: float | None  # of the mean reward from the first half of the run to the second; None: not drawn in both


def judged(table: pa.Table, order: Order) -> list[Judged]:
    """Return the prompts of an index's ``table`` in the order asked for."""
    import pyarrow as pa

    table = table.filter(table["prompt_index"].is_valid())
    table = table.append_column("right", table["is_correct"].cast(pa.int8()))
    aggregates = [("step", "count"), ("right", "mean"), ("reward", "mean")]
    changes = {row.prompt_index: row.change for row in compare(*halves(table))}
    rows: list[Judged] = []
    for row in table.group_by("prompt_index").aggregate(aggregates).sort_by("prompt_index").to_pylist():
        index, count, right = row["prompt_index"], row["step_count"], row["right_mean"]
        rows.append(Judged(index, count, right, row["reward_mean"], changes.get(index)))
    if order == "changed":
        return sorted(rows, key=lambda row: (row.change is None, -abs(row.change or 0.0)))
    sign = 1 if order == "hardest" else -1
    known = [tuple(-np.inf if x is None else x for x in (row.right, row.reward)) for row in rows]
    ranked = sorted(zip(known, rows, strict=True), key=lambda pair: (sign * pair[0][0], sign * pair[0][1]))
    return [row for _, row in ranked]
