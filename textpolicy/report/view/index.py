"""Index a run's completions by step, reward and the like, so that a page lists and filters without reading tokens."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

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
SHOWN = ("prompt", "text")  # in a line of the list
_THREADS = 4
_ORDERS = {
    "newest": [("step", "descending"), ("file", "ascending"), ("row", "ascending")],
    "oldest": [("step", "ascending"), ("file", "ascending"), ("row", "ascending")],
    "best": [("reward", "descending"), ("step", "descending"), ("row", "ascending")],
    "worst": [("reward", "ascending"), ("step", "descending"), ("row", "ascending")],
    "longest": [("length", "descending"), ("step", "descending"), ("row", "ascending")],
    "advantage": [("advantage", "descending"), ("step", "descending"), ("row", "ascending")],
}


class Query(Section):
    """The filter and the order of a list of completions. A field that is not given filters nothing."""

    run: Annotated[int, Field(ge=0)] = 0  # its number on the page
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


@dataclass(frozen=True, slots=True)
class Address:
    """The place of a completion: the run's number, the kind, the file's name without its suffix, the row."""

    run: int
    kind: str
    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.run}:{self.kind}:{self.file}:{self.row}"

    @classmethod
    def read(cls, text: str) -> Address:
        """Parse what ``str`` gives. Raises UserError."""
        parts = text.split(":")
        if len(parts) != 4 or not (parts[0].isdecimal() and parts[3].isdecimal()):
            raise UserError(f"{text!r} is not the address of a completion; follow a link of the list")
        return cls(int(parts[0]), parts[1], parts[2], int(parts[3]))


class Index:
    """The figures of every completion in one folder of a run; ``refresh`` adds what has been written since."""

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa

        self._folder = folder
        self.files: list[Path] = []  # the column "file" of ``table`` counts them
        schema = layout.schema()
        figures = [schema.field(name) for name in FIGURES]
        self.table = pa.schema([*figures, ("file", pa.int32()), ("row", pa.int32())]).empty_table()
        self._reading = Lock()  # requests come in threads

    def refresh(self) -> None:
        """Read the files that are new; all of them if some are gone. Raises UserError for a damaged file."""
        import pyarrow as pa

        with self._reading:
            files = layout.parquet_files(self._folder)
            known = set(self.files)
            if not known <= set(files):
                self.files, self.table, known = [], self.table.slice(0, 0), set()
            fresh = [path for path in files if path not in known]
            if not fresh:
                return
            with ThreadPoolExecutor(_THREADS) as pool:
                tables: list[pa.Table] = list(pool.map(partial(_read, columns=FIGURES), fresh))
            placed = [self.table]
            for number, table in enumerate(tables, len(self.files)):
                file, row = np.full(len(table), number, np.int32), np.arange(len(table), dtype=np.int32)
                placed.append(table.append_column("file", pa.array(file)).append_column("row", pa.array(row)))
            self.table = pa.concat_tables(placed).combine_chunks()
            self.files += fresh

    def select(self, query: Query) -> pa.Table:
        """Return the figures of the completions that match ``query``, in its order; words match in any case."""
        import pyarrow as pa
        import pyarrow.compute as pc

        table = self.table
        for column, comparison, value in (
            ("split", "equal", query.split),
            ("step", "greater_equal", query.step_from),
            ("step", "less_equal", query.step_to),
            ("group", "equal", query.group),
            ("prompt_index", "equal", query.prompt),
            ("reward", "greater_equal", query.reward_from),
            ("reward", "less_equal", query.reward_to),
            ("finish_reason", "equal", query.finish),
            ("is_correct", "equal", None if query.correct is None else query.correct == "yes"),
        ):
            if value is not None:
                table = table.filter(pc.call_function(comparison, [table[column], value]))
        if query.words:  # reads the texts of the files that are left
            words = query.words

            def hits(number: int) -> pa.Table:
                texts = _read(self.files[number], SHOWN)
                matches = [pc.match_substring(texts[name], words, ignore_case=True) for name in SHOWN]
                rows = np.flatnonzero(pc.or_(*matches).to_numpy(zero_copy_only=False)).astype(np.int32)
                return pa.table({"file": np.full(len(rows), number, np.int32), "row": rows})

            with ThreadPoolExecutor(_THREADS) as pool:
                found = list(pool.map(hits, np.unique(table["file"].to_numpy()).tolist()))
            if found:
                table = table.join(pa.concat_tables(found), ["file", "row"], join_type="inner")
        return table.take(pc.sort_indices(table, sort_keys=_ORDERS[query.sort]))

    def read(self, places: pa.Table, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Return ``columns`` of the completions at ``places`` (their figures), in that order."""
        files, rows = places["file"].to_numpy(), places["row"].to_numpy()
        found: dict[tuple[int, int], dict[str, Any]] = {}
        for number in np.unique(files).tolist():
            wanted = rows[files == number]
            taken = _read(self.files[number], columns).take(wanted).to_pylist()
            found |= {(number, row): line for row, line in zip(wanted.tolist(), taken, strict=True)}
        return [found[place] for place in zip(files.tolist(), rows.tolist(), strict=True)]

    def one(self, file: str, row: int) -> dict[str, Any]:
        """Return every column of one completion. Raises UserError if there is no such completion."""
        path = next((path for path in self.files if path.stem == file), None)
        table = None if path is None else _read(path, None)
        if table is None or row >= table.num_rows:
            raise UserError(f"there is no completion {row} in {file!r}; follow a link of the list")
        return table.slice(row, 1).to_pylist()[0]


def _read(path: Path, columns: Sequence[str] | None) -> pa.Table:
    """Read one file, its columns in the order given. Raises UserError for a damaged one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = layout.schema()
    try:
        with path.open("rb") as opened, pq.ParquetFile(opened) as file:  # a path may look like an address
            table = file.read(columns=None if columns is None else list(columns), use_threads=False)
        names = schema.names if columns is None else list(columns)
        return table.select(names).cast(pa.schema([schema.field(name) for name in names]))
    except (pa.ArrowException, OSError, KeyError) as error:
        raise damaged(str(path), error) from error
