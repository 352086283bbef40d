"""The runs that the pages show, kept up to date while they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from ...errors import UserError
from ...record import layout
from ...record.reader import RecordedRun, ended, load_run
from ..words import natural
from .index import LIMIT, SHOWN, Address, Index, Kind, Query, stamp_of

if TYPE_CHECKING:
    import pyarrow as pa

PER_PAGE = 50  # groups
MOST = 64  # completions shown of a group in the list
_DEEPEST = 4  # levels below a folder of runs: campaign/runs/arm/seed


@dataclass(frozen=True, slots=True)
class Listed:
    """The line of one completion in the list."""

    address: Address
    figures: dict[str, Any]
    prompt: str
    text: str
    found: bool  # it matches the filter


@dataclass(frozen=True, slots=True)
class Group:
    """The completions of one prompt and step, at least one of which matches the filter."""

    lines: Sequence[Listed]
    more: int  # completions that are not shown, those that match last

    @property
    def rewards(self) -> list[float]:
        """The rewards that are known."""
        rewards = (line.figures["reward"] for line in self.lines)
        return [reward for reward in rewards if reward is not None and np.isfinite(reward)]


@dataclass(frozen=True, slots=True)
class Page:
    """The groups of one page of the list, and how many completions and groups match in all."""

    groups: Sequence[Group]
    total: int
    total_groups: int
    number: int
    pages: int
    rewards: tuple[float, float]  # the lowest and highest of the run, the ends of every group's scale


class ViewedRun:
    """The completions of one run folder, as a page shows them."""

    def __init__(self, number: int, folder: Path, name: str) -> None:
        """Open the run as number ``number`` of the page. Raises UserError for a folder that is not a run."""
        load_run(folder)
        self.number, self.folder, self.name = number, folder, name
        self.indices: dict[str, Index] = {kind: Index(folder / kind) for kind in get_args(Kind)}
        self._kept: dict[str, tuple[Any, Any]] = {}  # what was computed, and the stamps of the files that it is of

    @property
    def over(self) -> bool:
        """The state of the run: True once it has finished."""
        return ended(self.folder)

    @property
    def recorded(self) -> RecordedRun:
        """The run as its folder is now, read again when one of its files has changed. Raises UserError."""
        names = (layout.METRICS, layout.MATH_EVALS, layout.CONFIG, layout.SUMMARY)
        return self._kept_for(
            "recorded", [stamp_of(self.folder / name) for name in names], partial(load_run, self.folder)
        )

    @property
    def strongest(self) -> float:
        """The largest magnitude among the advantages of the training completions; 0 if there are none."""
        advantages = self.index("rollouts").table["advantage"].drop_null().to_numpy()
        return float(np.abs(advantages[np.isfinite(advantages)]).max(initial=0.0))

    def doctor(self) -> Any:
        """Return the report of ``doctor.examine``. Raises UserError."""
        from ...doctor import examine

        files = layout.parquet_files(self.folder / layout.ROLLOUTS)
        stamps = [stamp_of(path) for path in (self.folder / layout.METRICS, *files)]
        return self._kept_for("doctor", stamps, partial(examine, self.folder))

    def index(self, kind: str) -> Index:
        """Return the index of ``kind``, up to date. Raises UserError for an unknown kind."""
        if kind not in self.indices:
            raise UserError(f"there are no {kind!r}; ask for {' or '.join(self.indices)}")
        return self.indices[kind].refresh()

    def page(self, query: Query) -> Page:
        """Return the groups of the completions that match ``query``; a page beyond the last is the last."""
        index = self.index(query.kind)
        found = index.grouped(query)
        keys = found["key"].to_numpy()
        starts = np.flatnonzero(np.diff(keys, prepend=-1))  # of the groups
        pages = max(1, -(-len(starts) // PER_PAGE))
        number = min(max(1, query.page), pages)
        chosen = keys[starts[(number - 1) * PER_PAGE : number * PER_PAGE]]
        rewards = index.table["reward"].drop_null().to_numpy()
        ends = (float(rewards.min()), float(rewards.max())) if len(rewards) else (0.0, 0.0)
        groups = self._groups(query.kind, index, chosen, found, MOST)
        return Page(groups, len(found), len(starts), number, pages, ends)

    def around(self, address: Address, query: Query) -> tuple[Group, Address | None, Address | None]:
        """Return the group of a completion, and the addresses before and after it among those that ``query`` finds."""
        index = self.index(address.kind)
        file = next(number for number, path in enumerate(index.files) if path.stem == address.file)

        def place(table: pa.Table) -> np.ndarray:
            return np.flatnonzero((table["file"].to_numpy() == file) & (table["row"].to_numpy() == address.row))

        key = index.table["key"].to_numpy()[place(index.table)]
        walk = index.grouped(query) if query.kind == address.kind else index.table
        at = place(walk)
        beside: list[Address | None] = [None, None]
        for side, step in enumerate((-1, 1)):
            if len(at) and 0 <= at[0] + step < len(walk):
                beside[side] = self._address(address.kind, index, walk.slice(at[0] + step, 1).to_pylist()[0])
        [group] = self._groups(address.kind, index, key, index.table, len(index.table))
        return group, beside[0], beside[1]

    def _groups(self, kind: str, index: Index, keys: np.ndarray, found: pa.Table, most: int) -> list[Group]:
        """Return the groups with the ``keys``, in their order, and of each at most so many completions.

        ``found`` are the completions that match.
        """
        members = index.table.filter(np.isin(index.table["key"].to_numpy(), keys))
        places = [table["file"].to_numpy() * np.int64(LIMIT) + table["row"].to_numpy() for table in (members, found)]
        matching, of = np.isin(*places), members["key"].to_numpy()
        order = np.lexsort([places[0], ~matching, of])  # by group, those that match first
        starts, sizes = np.unique(of[order], return_index=True, return_counts=True)[1:]
        shown = np.sort(order[np.arange(len(order)) - np.repeat(starts, sizes) < most])
        members, matching = members.take(shown), matching[shown]
        more = {key: max(0, size - most) for key, size in zip(of[order][starts].tolist(), sizes.tolist(), strict=True)}
        groups: dict[int, list[Listed]] = {key: [] for key in keys.tolist()}
        for row, said, matches in zip(members.to_pylist(), index.read(members, SHOWN), matching.tolist(), strict=True):
            address = self._address(kind, index, row)
            groups[row["key"]].append(Listed(address, row, said["prompt"] or "", said["text"] or "", matches))
        return [Group(lines, more[key]) for key, lines in groups.items()]

    def _address(self, kind: str, index: Index, row: dict[str, Any]) -> Address:
        return Address(self.number, kind, index.files[row["file"]].stem, row["row"])

    def _kept_for(self, name: str, stamps: Any, compute: Any) -> Any:
        """Return what ``compute`` gave when the files had these ``stamps``."""
        if name not in self._kept or self._kept[name][0] != stamps:
            self._kept[name] = (stamps, compute())
        return self._kept[name][1]


@dataclass
class Runs:
    """The runs of the folders given, each a run or a folder of runs; new ones are found as they appear."""

    folders: Sequence[Path]
    opened: list[ViewedRun] = field(default_factory=list)

    def refresh(self) -> None:
        """Find runs that are new. Raises UserError for a folder that is neither a run nor holds one."""
        known = {run.folder.resolve() for run in self.opened}
        for given in self.folders:
            found = [given] if (given / layout.METRICS).is_file() else []
            for depth in range(1, _DEEPEST + 1 if not found else 0):
                found += [path.parent for path in given.glob("*/" * depth + layout.METRICS) if path.is_file()]
            if not found:
                load_run(given)  # raises
            for folder in sorted(found, key=natural):
                if folder.resolve() not in known:
                    known.add(folder.resolve())
                    name = folder.resolve().name if folder == given else str(folder.relative_to(given))
                    self.opened.append(ViewedRun(len(self.opened), folder, name))

    def run(self, number: int) -> ViewedRun:
        """Return run ``number`` of the page. Raises UserError."""
        if number >= len(self.opened):
            raise UserError(f"there is no run {number} on this page; choose one below {len(self.opened)}")
        return self.opened[number]
