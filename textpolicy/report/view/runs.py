"""The runs that a page shows, kept up to date while they go on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ...errors import UserError
from ...record import layout
from ...record.prompts import PromptRow, compare, halves
from ...record.reader import RecordedRun, load_run
from .curves import Curve, curve
from .index import SHOWN, Address, Index, Kind, Query

if TYPE_CHECKING:
    import pyarrow as pa

PER_PAGE = 50
_CURVES = {"reward_mean": "reward", "accuracy": "correct in training", "entropy": "entropy", "length_mean": "length"}


@dataclass(frozen=True, slots=True)
class Listed:
    """One line of the list."""

    address: Address
    figures: dict[str, Any]
    prompt: str
    text: str


@dataclass(frozen=True, slots=True)
class Page:
    """One page of the list."""

    lines: Sequence[Listed]
    total: int
    number: int
    pages: int


@dataclass
class ViewedRun:
    """A run folder on a page."""

    number: int
    folder: Path
    indices: dict[str, Index] = field(default_factory=dict)

    @classmethod
    def open(cls, number: int, folder: Path) -> ViewedRun:
        """Raises UserError for a folder that is no run's."""
        load_run(folder)
        return cls(number, folder, {kind: Index(folder / kind) for kind in get_args(Kind)})

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def recorded(self) -> RecordedRun:
        """As it is now."""
        return load_run(self.folder)

    @property
    def over(self) -> bool:
        return (self.folder / layout.SUMMARY).is_file()

    def index(self, kind: str) -> Index:
        """Up to date. Raises UserError for a kind that is none."""
        if kind not in self.indices:
            raise UserError(f"there are no {kind!r}; ask for {' or '.join(self.indices)}")
        self.indices[kind].refresh()
        return self.indices[kind]

    def page(self, query: Query) -> Page:
        """The completions that ``query`` asks for; a page beyond the last is the last."""
        index = self.index(query.kind)
        found = index.select(query)
        pages = max(1, -(-found.num_rows // PER_PAGE))
        number = min(max(1, query.page), pages)
        places = found.slice((number - 1) * PER_PAGE, PER_PAGE)
        return Page(self._lines(query.kind, index, places), found.num_rows, number, pages)

    def completion(self, address: Address) -> dict[str, Any]:
        """Everything about one. Raises UserError."""
        return self.index(address.kind).one(address.file, address.row)

    def siblings(self, address: Address, row: dict[str, Any]) -> list[Listed]:
        """The completions of its group, itself included."""
        index = self.index(address.kind)
        query = Query(kind=address.kind, step_from=row["step"], step_to=row["step"], group=row["group"], sort="oldest")  # type: ignore[arg-type]  # index() has checked it
        return [
            line for line in self._lines(address.kind, index, index.select(query)) if line.address.file == address.file
        ]

    def latest(self, prompt_index: int) -> Listed | None:
        """A completion of a training prompt, of the last step that drew it."""
        index = self.index("rollouts")
        found = index.select(Query(prompt=prompt_index)).slice(0, 1)
        return next(iter(self._lines("rollouts", index, found)), None)

    def curves(self) -> list[Curve]:
        """What the top of the page shows."""
        recorded = self.recorded
        drawn = [_of_steps(recorded.rows, name, shown) for name, shown in _CURVES.items()]
        looks = [r for r in recorded.rows if r["kind"] == "eval" and r["split"] == "validation"]
        held_out = curve("validation, greedy", [r["step"] for r in looks], [r["accuracy"] for r in looks])
        return [c for c in (held_out, *drawn) if c is not None]

    def _lines(self, kind: str, index: Index, places: pa.Table) -> list[Listed]:
        texts = index.read(places, SHOWN)
        return [
            Listed(Address(self.number, kind, index.name(row["file"]), row["row"]), row, said["prompt"], said["text"])
            for row, said in zip(places.to_pylist(), texts, strict=True)
        ]


def _of_steps(rows: Sequence[dict[str, Any]], name: str, shown: str) -> Curve | None:
    known = [r for r in rows if r["kind"] == "train" and math.isfinite(r.get(name, math.nan))]
    return curve(shown, [r["step"] for r in known], [r[name] for r in known])


def prompts_of(runs: Sequence[ViewedRun]) -> list[PromptRow]:
    """Each training prompt in two runs, or in the first and the second half of one; the most changed first."""
    tables = [run.index("rollouts").table for run in runs]
    return compare(*(halves(tables[0]) if len(tables) == 1 else tables))
