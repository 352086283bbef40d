"""The completions of a run by their figures: what a page lists and filters, without reading a token."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ...config.settings import Section
from ...errors import UserError
from ...record import layout
from ...record.reader import damaged

if TYPE_CHECKING:
    import pyarrow as pa

Kind = Literal["rollouts", "evals"]
FIGURES = (
    "step", "split", "group", "sample", "prompt_index", "temperature", "finish_reason",
    "reward", "is_correct", "length", "advantage",
)  # fmt: skip
SHOWN = ("prompt", "text")  # of a line of the list
_THREADS = 4


class Query(Section):
    """What of a run's completions to list. Everything left out is not asked for."""

    kind: Kind = "rollouts"
    split: Literal["train", "validation", "test"] | None = None
    step_from: int | None = None
    step_to: int | None = None
    group: int | None = None
    prompt: int | None = None
    reward_from: float | None = None
    reward_to: float | None = None
    finish: Literal["stop", "length"] | None = None
    correct: Literal["yes", "no"] | None = None
    words: str | None = None
    sort: Literal["newest", "oldest", "best", "worst", "longest", "advantage"] = "newest"
    page: int = 1

    @property
    def conditions(self) -> list[tuple[str, str, Any]]:
        """(column, comparison, value) for each thing asked of the figures."""
        asked = [
            ("split", "equal", self.split),
            ("step", "greater_equal", self.step_from),
            ("step", "less_equal", self.step_to),
            ("group", "equal", self.group),
            ("prompt_index", "equal", self.prompt),
            ("reward", "greater_equal", self.reward_from),
            ("reward", "less_equal", self.reward_to),
            ("finish_reason", "equal", self.finish),
            ("is_correct", "equal", None if self.correct is None else self.correct == "yes"),
        ]
        return [(column, how, value) for column, how, value in asked if value is not None]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a completion is: the run's number on the page, the kind, the file's name without its ending, the row."""

    run: int
    kind: str
    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.run}:{self.kind}:{self.file}:{self.row}"

    @classmethod
    def read(cls, text: str) -> Address:
        """Of its text. Raises UserError."""
        parts = text.split(":")
        if len(parts) != 4 or not (parts[0].isdecimal() and parts[3].isdecimal()):
            raise UserError(f"{text!r} is no completion; follow a link of the list")
        return cls(int(parts[0]), parts[1], parts[2], int(parts[3]))


class Index:
    """The figures of every completion in one folder of a run; ``refresh`` adds what has been written since."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: list[Path] = []
        self.table = _empty()
        self._reading = Lock()  # requests come in threads

    def refresh(self) -> None:
        """Read the files that are new; all of them if some are gone."""
        with self._reading:
            self._refresh()

    def _refresh(self) -> None:
        import pyarrow as pa

        files = layout.parquet_files(self._folder)
        known = set(self._files)
        if not known <= set(files):
            self._files, self.table, known = [], _empty(), set()
        fresh = [path for path in files if path not in known]
        if not fresh:
            return
        with ThreadPoolExecutor(_THREADS) as pool:
            parts = pool.map(_figures, fresh, range(len(self._files), len(self._files) + len(fresh)))
            self.table = pa.concat_tables([self.table, *parts]).combine_chunks()
        self._files += fresh

    def select(self, query: Query) -> pa.Table:
        """The figures of the completions that ``query`` asks for, in its order."""
        import pyarrow.compute as pc

        table = self.table
        for column, how, value in query.conditions:
            table = table.filter(pc.call_function(how, [table[column], value]))
        if query.words:
            table = self._saying(table, query.words)
        return table.take(pc.sort_indices(table, sort_keys=_ORDERS[query.sort]))

    def read(self, places: pa.Table, columns: Sequence[str]) -> list[dict[str, Any]]:
        """``columns`` of the completions at ``places`` (their figures), in that order."""
        files, rows = places["file"].to_numpy(), places["row"].to_numpy()
        found: dict[tuple[int, int], dict[str, Any]] = {}
        for number in np.unique(files).tolist():
            wanted = rows[files == number]
            taken = _read(self._files[number], columns).take(wanted).to_pylist()
            found |= {(number, row): line for row, line in zip(wanted.tolist(), taken, strict=True)}
        return [found[place] for place in zip(files.tolist(), rows.tolist(), strict=True)]

    def one(self, file: str, row: int) -> dict[str, Any]:
        """Everything about one completion. Raises UserError for one that is not there."""
        path = next((path for path in self._files if path.stem == file), None)
        table = None if path is None else _read(path, None)
        if table is None or row >= table.num_rows:
            raise UserError(f"there is no completion {row} in {file!r}; follow a link of the list")
        return table.slice(row, 1).to_pylist()[0]

    def name(self, file: int) -> str:
        """Of a file, by its number in ``table``."""
        return self._files[file].stem

    def _saying(self, table: pa.Table, words: str) -> pa.Table:
        """Those whose prompt or text has ``words`` in it, in any case; reads the texts of the files in ``table``."""
        import pyarrow as pa
        import pyarrow.compute as pc

        numbers = np.unique(table["file"].to_numpy()).tolist()

        def hits(number: int) -> pa.Table:
            texts = _read(self._files[number], SHOWN)
            said = [pc.match_substring(texts[name], words, ignore_case=True) for name in SHOWN]
            rows = np.flatnonzero(pc.or_(*said).to_numpy(zero_copy_only=False)).astype(np.int32)
            return pa.table({"file": np.full(len(rows), number, np.int32), "row": rows})

        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(hits, numbers))
        if not found:
            return table
        return table.join(pa.concat_tables(found), ["file", "row"], join_type="inner")


_ORDERS = {
    "newest": [("step", "descending"), ("file", "ascending"), ("row", "ascending")],
    "oldest": [("step", "ascending"), ("file", "ascending"), ("row", "ascending")],
    "best": [("reward", "descending"), ("step", "descending"), ("row", "ascending")],
    "worst": [("reward", "ascending"), ("step", "descending"), ("row", "ascending")],
    "longest": [("length", "descending"), ("step", "descending"), ("row", "ascending")],
    "advantage": [("advantage", "descending"), ("step", "descending"), ("row", "ascending")],
}


def _figures(path: Path, number: int) -> pa.Table:
    """Those of one file, with its number and the number of each row."""
    import pyarrow as pa

    table = _read(path, FIGURES)
    file = pa.array(np.full(table.num_rows, number, np.int32))
    return table.append_column("file", file).append_column("row", pa.array(np.arange(table.num_rows, dtype=np.int32)))


def _read(path: Path, columns: Sequence[str] | None) -> pa.Table:
    """Of one file, columns in the order asked for. Raises UserError for one that is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = layout.schema()
    try:
        with pq.ParquetFile(path) as file:
            table = file.read(columns=None if columns is None else list(columns), use_threads=False)
        names = schema.names if columns is None else list(columns)
        return table.select(names).cast(pa.schema([schema.field(name) for name in names]))
    except (pa.ArrowException, OSError, KeyError) as error:
        raise damaged(str(path), error) from error


def _empty() -> pa.Table:
    import pyarrow as pa

    schema = layout.schema()
    kept = [schema.field(name) for name in FIGURES]
    return pa.schema([*kept, ("file", pa.int32()), ("row", pa.int32())]).empty_table()
