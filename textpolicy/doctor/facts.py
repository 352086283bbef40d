"""``Facts``: what a run recorded, as the doctor's rules read it; from a run folder, or from a loop of your own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ..loop.evaluation import Rate
from ..loop.metrics import Row
from ..record import layout
from ..record.reader import load_run
from ..types import Episode
from .finding import Example

if TYPE_CHECKING:
    import pyarrow as pa

    from ..record.reader import RecordedRun

_COLUMNS = ("step", "group", "prompt", "text", "finish_reason", "reward", "is_correct", "scores", "length")


@dataclass(frozen=True, slots=True)
class Look:
    """Greedy accuracy on held-out problems."""

    step: int  # training steps done before it
    split: str
    correct: int
    total: int

    @property
    def rate(self) -> Rate:
        """With its 95% interval."""
        return Rate(self.correct, self.total)


@dataclass(frozen=True, slots=True, eq=False)
class Completions:
    """Sampled completions as columns of N entries."""

    step: np.ndarray  # (N,) int
    group: np.ndarray  # (N,) int, of its step
    reward: np.ndarray  # (N,) float64, NaN where unscorable
    correct: np.ndarray  # (N,) float64, 1 or 0; NaN where the reward does not say
    truncated: np.ndarray  # (N,) bool
    length: np.ndarray  # (N,) int, sampled tokens
    prompt: Sequence[str]
    text: Sequence[str]
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)  # (N,) float64 of each of several rewards, or NaN

    def __len__(self) -> int:
        return len(self.step)

    @property
    def groups(self) -> np.ndarray:
        """(N,) int, dense, over all steps."""
        pairs = np.stack([self.step, self.group], axis=1)
        return np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)

    def examples(self, which: np.ndarray, count: int = 3) -> tuple[Example, ...]:
        """The latest of those where ``which`` (N,) bool holds, each of another group."""
        places = np.flatnonzero(which)[::-1]
        first = np.sort(np.unique(self.groups[places], return_index=True)[1])[:count]
        return tuple(self._example(int(i)) for i in places[first])

    def _example(self, i: int) -> Example:
        return Example(int(self.step[i]), self.prompt[i], self.text[i], float(self.reward[i]), bool(self.truncated[i]))

    @classmethod
    def of(cls, steps: Iterable[tuple[int, Sequence[Episode]]]) -> Self:
        """Those of (step, episodes) pairs, as ``train`` hands them to ``on_step``."""
        pairs = [(step, e) for step, episodes in steps for e in episodes]
        names = sorted({name for _, e in pairs for name in e.scores})
        return cls(
            step=np.array([step for step, _ in pairs], int),
            group=np.array([e.group for _, e in pairs], int),
            reward=np.array([e.reward for _, e in pairs], float),
            correct=np.array([np.nan if e.is_correct is None else e.is_correct for _, e in pairs], float),
            truncated=np.array([e.truncated for _, e in pairs], bool),
            length=np.array([e.mask.sum() for _, e in pairs], int),
            prompt=[e.prompt for _, e in pairs],
            text=[e.text for _, e in pairs],
            scores={name: np.array([e.scores.get(name, np.nan) for _, e in pairs]) for name in names},
        )

    @classmethod
    def of_table(cls, table: pa.Table) -> Self:
        """Those of a table of recorded rollouts."""
        import pyarrow as pa

        def numbers(name: str, of: Any) -> np.ndarray:
            return table[name].cast(of).to_numpy()

        scores = [dict(pairs or ()) for pairs in table["scores"].to_pylist()]
        names = sorted({name for row in scores for name in row})
        correct = [np.nan if value is None else float(value) for value in table["is_correct"].to_pylist()]
        return cls(
            step=numbers("step", pa.int64()),
            group=numbers("group", pa.int64()),
            reward=numbers("reward", pa.float64()),
            correct=np.array(correct, float),
            truncated=np.array([reason == "length" for reason in table["finish_reason"].to_pylist()], bool),
            length=numbers("length", pa.int64()),
            prompt=table["prompt"].to_pylist(),
            text=table["text"].to_pylist(),
            scores={name: np.array([row.get(name, np.nan) for row in scores], float) for name in names},
        )


@dataclass(frozen=True, slots=True)
class Settings:
    """What of a run's settings the rules read; None where nobody says."""

    updates_per_step: int | None = None
    max_tokens: int | None = None
    max_gap: float | None = None  # nats, of on_policy

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Those of a config.json, of whatever age."""
        sections = {name: config.get(name, {}) for name in ("optimizer", "rollout", "on_policy")}
        return cls(
            sections["optimizer"].get("updates_per_step"),
            sections["rollout"].get("max_tokens"),
            sections["on_policy"].get("max_gap"),
        )


@dataclass(frozen=True, slots=True)
class Facts:
    """One run. Rules judge its last third, where what it learned at the start has had its time."""

    rows: Sequence[Row]  # of the training steps, in order
    looks: Sequence[Look] = ()
    completions: Completions | None = None  # of the last third of the steps; None where nobody recorded them
    early: Completions | None = None  # the same of the first third
    settings: Settings = Settings()

    @property
    def third(self) -> int:
        """Steps of a third of the run, at least 1."""
        return max(1, len(self.rows) // 3)

    @property
    def ending(self) -> Sequence[Row]:
        return self.rows[-self.third :]

    @property
    def beginning(self) -> Sequence[Row]:
        return self.rows[: self.third]

    def held_out(self, split: str = "validation") -> list[Look]:
        """The looks at ``split``, in order."""
        return [look for look in self.looks if look.split == split]


def values(rows: Sequence[Row], name: str) -> np.ndarray:
    """(n,) float64: the figure ``name`` of the rows that have it."""
    return np.array([row[name] for row in rows if name in row], float)


def mean(rows: Sequence[Row], name: str) -> float:
    """Its mean; NaN if no row has it."""
    found = values(rows, name)
    return float(found.mean()) if len(found) else float("nan")


def rises(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether the mean of ``after`` is above that of ``before`` by more than two standard errors."""
    if min(len(before), len(after)) < 2:
        return False
    error = np.sqrt(before.var(ddof=1) / len(before) + after.var(ddof=1) / len(after))
    return bool(after.mean() - before.mean() > 2 * error)


def improves(looks: Sequence[Look]) -> bool:
    """Whether the last of ``looks`` is above the first beyond the 95% intervals of both."""
    return len(looks) > 1 and looks[-1].rate.interval[0] > looks[0].rate.interval[1]


def at_limit(facts: Facts) -> str:
    """The limit on completions as an aside, if it is known."""
    return f" at {facts.settings.max_tokens} tokens" if facts.settings.max_tokens else ""


def read_facts(folder: Path | str) -> Facts:
    """The facts of a run folder, finished or not. Raises UserError for another folder."""
    run = load_run(folder)
    rows = [_figures(row) for row in run.rows if row["kind"] == "train"]
    looks = [_look(row) for row in run.rows if row["kind"] == "eval"]
    if not rows or not layout.parquet_files(run.folder / layout.ROLLOUTS):
        return Facts(rows, looks, settings=Settings.of(run.config))
    late, early = _completions(run, Facts(rows).ending), _completions(run, Facts(rows).beginning)
    return Facts(rows, looks, late, early, Settings.of(run.config))


def _figures(row: Mapping[str, Any]) -> Row:
    return {name: value for name, value in row.items() if name != "kind" and value is not None}


def _look(row: Mapping[str, Any]) -> Look:
    return Look(row["step"], row["split"], round(row["accuracy"] * row["problems"]), row["problems"])


def _completions(run: RecordedRun, rows: Sequence[Row]) -> Completions:
    """Those of the steps of ``rows``."""
    import pyarrow.compute as pc

    step, first, last = pc.field("step"), int(rows[0]["step"]), int(rows[-1]["step"])
    return Completions.of_table(run.read(layout.ROLLOUTS, _COLUMNS, (step >= first) & (step <= last)))
