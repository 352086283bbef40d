"""The ``Facts`` that a run recorded, as the doctor's rules read them, from a run folder or a loop of your own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from ..loop.evaluation import Rate
from ..loop.metrics import Row
from ..record import layout
from ..record.reader import flat, load_run
from ..types import Episode
from .finding import Example

if TYPE_CHECKING:
    from ..record.reader import RecordedRun


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The greedy accuracy on held-out problems."""

    step: int  # training steps done before it
    split: str
    correct: int
    total: int

    @property
    def rate(self) -> Rate:
        """The accuracy with its 95% interval."""
        return Rate(self.correct, self.total)


@dataclass(frozen=True, slots=True, eq=False)
class Completions:
    """The sampled completions as columns of N entries."""

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
        """The groups of all steps as dense numbers, (N,) int."""
        pairs = np.stack([self.step, self.group], axis=1)
        return np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)

    def examples(self, which: np.ndarray | None = None, count: int = 3) -> tuple[Example, ...]:
        """Return the latest completions where ``which`` (N,) bool holds (None: any), each from another group."""
        places = np.flatnonzero(np.ones(len(self), bool) if which is None else which)[::-1]
        first = np.sort(np.unique(self.groups[places], return_index=True)[1])[:count]
        return tuple(
            Example(int(self.step[i]), self.prompt[i], self.text[i], float(self.reward[i]), bool(self.truncated[i]))
            for i in places[first].tolist()
        )

    @classmethod
    def of(cls, steps: Iterable[tuple[int, Sequence[Episode]]]) -> Self:
        """Make columns from (step, episodes) pairs, as ``train`` passes them to ``on_step``."""
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


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a run that the rules read; None where unknown."""

    updates_per_step: int | None = None
    max_tokens: int | None = None
    max_gap: float | None = None  # nats, of on_policy


@dataclass(frozen=True, slots=True)
class Facts:
    """The record of one run. Rules judge its last third, when what it learned at the start has had time to show."""

    rows: Sequence[Row]  # of the training steps, in order
    evaluations: Sequence[Evaluation] = ()
    completions: Completions | None = None  # of the last third of the steps; None where they were not recorded
    early: Completions | None = None  # the same of the first third
    settings: Settings = Settings()

    @property
    def third(self) -> int:
        """The number of steps in a third of the run, at least 1."""
        return max(1, len(self.rows) // 3)

    @property
    def ending(self) -> Sequence[Row]:
        """The rows of the last third."""
        return self.rows[-self.third :]

    @property
    def beginning(self) -> Sequence[Row]:
        """The rows of the first third."""
        return self.rows[: self.third]

    def held_out(self, split: str) -> list[Evaluation]:
        """Return the evaluations on ``split``, in order."""
        return [evaluation for evaluation in self.evaluations if evaluation.split == split]


def values(rows: Sequence[Row], name: str) -> np.ndarray:
    """Return the metric ``name`` of the rows that have it, (n,) float64."""
    return np.array([row[name] for row in rows if name in row], float)


def mean(rows: Sequence[Row], name: str) -> float:
    """Return the mean of the metric ``name``; NaN if no row has it."""
    found = values(rows, name)
    return float(found.mean()) if len(found) else float("nan")


def largest(rows: Sequence[Row], name: str) -> float:
    """Return the largest value of the metric ``name``; NaN if no row has it."""
    return float(values(rows, name).max(initial=-np.inf)) if any(name in row for row in rows) else float("nan")


def rises(before: np.ndarray, after: np.ndarray) -> bool:
    """Return whether the mean of ``after`` is above that of ``before`` by more than two standard errors."""
    if min(len(before), len(after)) < 2 or not np.isfinite([*before, *after]).all():
        return False
    error = np.sqrt(before.var(ddof=1) / len(before) + after.var(ddof=1) / len(after))
    return bool(after.mean() - before.mean() > 2 * error)


def at_limit(facts: Facts) -> str:
    """Return " at N tokens", the limit on completions, if it is known."""
    return f" at {facts.settings.max_tokens} tokens" if facts.settings.max_tokens else ""


def evaluations(run: RecordedRun) -> list[Evaluation]:
    """Return the greedy evaluations of a run, in order."""
    return [
        Evaluation(row["step"], row["split"], round(row["accuracy"] * row["problems"]), int(row["problems"]))
        for row in run.rows
        if row["kind"] == "eval"
    ]


def read_facts(folder: Path | str) -> Facts:
    """Read the facts of a run folder, finished or not. Raises UserError for any other folder."""
    run = load_run(folder)
    steps = [row for row in run.rows if row["kind"] == "train"]
    rows: list[Row] = [  # of the last stage, in a run of several
        {name: value for name, value in row.items() if name not in ("kind", "stage") and value is not None}
        for row in steps
        if row.get("stage") == steps[-1].get("stage")
    ]
    names = ("optimizer.updates_per_step", "rollout.max_tokens", "on_policy.max_gap")
    config = flat(run.config)  # without some in old runs, and of any shape in another program's
    found = (value if type(value := config.get(name)) in (int, float) else None for name in names)
    settings = Settings(*found)
    facts = Facts(rows, evaluations(run), settings=settings)
    if not rows or not layout.parquet_files(run.folder / layout.ROLLOUTS):
        return facts
    return Facts(rows, facts.evaluations, _recorded(run, facts.ending), _recorded(run, facts.beginning), settings)


def _recorded(run: RecordedRun, rows: Sequence[Row]) -> Completions:
    """Read the completions of the steps of ``rows``."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = ("step", "group", "prompt", "text", "finish_reason", "reward", "is_correct", "scores", "length")
    step, first, last = pc.field("step"), int(rows[0]["step"]), int(rows[-1]["step"])
    table = run.read(layout.ROLLOUTS, columns, (step >= first) & (step <= last))
    kinds = {"step": pa.int64(), "group": pa.int64(), "length": pa.int64(), "reward": pa.float64()}
    correct = [np.nan if value is None else float(value) for value in table["is_correct"].to_pylist()]
    scores = [dict(pairs or ()) for pairs in table["scores"].to_pylist()]
    names = sorted({name for row in scores for name in row})
    return Completions(
        **{name: table[name].cast(kind).to_numpy() for name, kind in kinds.items()},
        correct=np.array(correct, float),
        truncated=np.array([reason == "length" for reason in table["finish_reason"].to_pylist()], bool),
        prompt=table["prompt"].fill_null("").to_pylist(),
        text=table["text"].fill_null("").to_pylist(),
        scores={name: np.array([row.get(name, np.nan) for row in scores], float) for name in names},
    )
