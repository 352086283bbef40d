"""What became of each prompt: its mean reward in two runs, or early and late in one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt in two samples of completions."""

    prompt_index: int
    count: tuple[int, int]  # completions that could be scored
    reward: tuple[float, float]  # their mean

    @property
    def change(self) -> float:
        return self.reward[1] - self.reward[0]

    @property
    def mean(self) -> float:
        """Over both samples."""
        (n, m), (a, b) = self.count, self.reward
        return (n * a + m * b) / (n + m)


def compare(first: pa.Table, second: pa.Table) -> list[PromptRow]:
    """The prompts that are in both tables (``prompt_index``, ``reward``), the most changed first."""
    a, b = _by_prompt(first), _by_prompt(second)
    rows = [PromptRow(i, (a[i][0], b[i][0]), (a[i][1], b[i][1])) for i in sorted(a.keys() & b.keys())]
    return sorted(rows, key=lambda row: -abs(row.change))


def halves(table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The rows of the first and of the second half of the steps."""
    import pyarrow.compute as pc

    middle = (pc.max(table["step"]).as_py() or 0) / 2
    return table.filter(pc.less(table["step"], middle)), table.filter(pc.greater_equal(table["step"], middle))


def _by_prompt(table: pa.Table) -> dict[int, tuple[int, float]]:
    """Prompt -> (scored completions, their mean reward)."""
    scored = table.select(["prompt_index", "reward"]).drop_null()
    means = scored.group_by("prompt_index").aggregate([("reward", "count"), ("reward", "mean")])
    return {row["prompt_index"]: (row["reward_count"], row["reward_mean"]) for row in means.to_pylist()}
