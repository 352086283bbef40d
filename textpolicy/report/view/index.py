"""Index a run's completions by step, reward and the like, so that a page lists and filters without reading tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, StringConstraints

from ...config.settings import Section
from ...errors import UserError
from ...record import layout
from ...record.reader import damaged

if TYPE_CHECKING:
    import pyarrow as pa

Kind = Literal["rollouts", "evals"]
Stamp = tuple[int, int, int, int]  # the times of the last change of a file's text and of its entry in ns, bytes, inode
FIGURES = (
    "step", "split", "group", "sample", "prompt_index", "temperature", "finish_reason",
    "reward", "is_correct", "length", "advantage",
)  # fmt: skip
SHOWN = ("prompt", "text")  # in a line of the list
OPTIONAL = ("sampled", "entropy", "credit", "planning", "learner_logprobs")  # values of tokens that may be missing
LIMIT = 2**31  # of the whole numbers in the files
Whole = Annotated[int, Field(ge=0, lt=LIMIT)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
_THREADS = 4
_ORDERS = {
    "newest": [("step", "descending"), ("file", "ascending"), ("row", "ascending")],
    "oldest": [("step", "ascending"), ("file", "ascending"), ("row", "ascending")],
    "best": [("reward", "descending"), ("step", "descending"), ("row", "ascending")],
    "worst": [("reward", "ascending"), ("step", "descending"), ("row", "ascending")],
    "longest": [("length", "descending"), ("step", "descending"), ("row", "ascending")],
    "spread": [("spread", "descending"), ("step", "descending"), ("row", "ascending")],
    "advantage": [("advantage", "descending"), ("step", "descending"), ("row", "ascending")],
}


class Query(Section):
    """The filter and the order of a list of completions. A field that is not given filters nothing."""

    run: Whole = 0  # its number on the page
    kind: Kind = "rollouts"
    split: Literal["train", "validation", "test"] | None = None
    step_from: Whole | None = None
    step_to: Whole | None = None
    group: Whole | None = None
    prompt: Whole | None = None
    reward_from: Finite | None = None
    reward_to: Finite | None = None
    finish: Literal["stop", "length"] | None = None
    correct: Literal["yes", "no"] | None = None
    words: Annotated[str, StringConstraints(max_length=1000)] | None = None
    sort: Literal["newest", "oldest", "best", "worst", "longest", "spread", "advantage"] = "newest"
    page: Whole = 1


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
        parts = re.fullmatch(r"([0-9]{1,9}):([^:]+):(.+):([0-9]{1,9})", text)
        if parts is None:
            raise UserError(f"{text[:100]!r} is not the address of a completion; follow a link of the list")
        return cls(int(parts[1]), parts[2], parts[3], int(parts[4]))


class Index:
    """The figures of every completion in one folder of a run; ``refresh`` adds what has been written since.

    Beside ``FIGURES``, ``table`` has the number of a completion's file and its row there, a ``key`` of its group, and
    the ``spread`` of the group: the standard deviation of its rewards, null where none is scored.
    """

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa

        self._folder = folder
        self._known: dict[Path, tuple[Stamp, pa.Table]] = {}  # the figures of each file, and its stamp at the time
        self.files: list[Path] = []  # the column "file" of ``table`` counts them
        placed = [("file", pa.int32()), ("row", pa.int32()), ("key", pa.int64()), ("spread", pa.float64())]
        self.table = pa.schema([*(layout.schema().field(name) for name in FIGURES), *placed]).empty_table()
        self._reading = Lock()  # requests come in threads

    def refresh(self) -> Index:
        """Read what is new or was replaced, forget what is gone, and return all as it is now. Raises UserError."""
        with self._reading:
            stamps = {path: stamp for path in layout.parquet_files(self._folder) if (stamp := stamp_of(path))}
            if stamps == {path: stamp for path, (stamp, _) in self._known.items()}:
                return copy(self)
            known = {path: self._known[path] for path in stamps if path in self._known}
            fresh = [path for path, stamp in stamps.items() if path not in known or known[path][0] != stamp]
            with ThreadPoolExecutor(_THREADS) as pool:
                tables: list[pa.Table] = list(pool.map(partial(_read, columns=FIGURES), fresh))
            known |= {path: (stamps[path], table) for path, table in zip(fresh, tables, strict=True)}
            self._known = {path: known[path] for path in stamps}  # in the order of the files
            self.files, self.table = list(stamps), _placed([table for _, table in self._known.values()], self.table)
            return copy(self)  # which a later refresh leaves as it is

    def select(self, query: Query) -> pa.Table:
        """Return the figures of the completions that match ``query``, in its order; words match in any case."""
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
            table = table.filter(self._say(query.words, table))
        return table.take(pc.sort_indices(table, sort_keys=_ORDERS[query.sort]))

    def grouped(self, query: Query) -> pa.Table:
        """Return what ``select`` does, but the completions of a group together, where the first of them is."""
        table = self.select(query)
        _, first, group = np.unique(table["key"].to_numpy(), return_index=True, return_inverse=True)
        return table.take(np.lexsort([table["row"].to_numpy(), first[group]]))

    def _say(self, words: str, table: pa.Table) -> np.ndarray:
        """Return for each completion of ``table`` whether its prompt or text has the ``words``, (N,) bool."""
        import pyarrow.compute as pc

        def hits(number: int) -> np.ndarray:
            texts = self._rows(number, rows[files == number], SHOWN)
            found = [pc.match_substring(texts[name], words, ignore_case=True).fill_null(False) for name in SHOWN]
            return pc.or_(*found).to_numpy(zero_copy_only=False)

        files, rows = table["file"].to_numpy(), table["row"].to_numpy()
        numbers, said = np.unique(files).tolist(), np.zeros(len(table), bool)
        with ThreadPoolExecutor(_THREADS) as pool:
            for number, found in zip(numbers, pool.map(hits, numbers), strict=True):
                said[files == number] = found
        return said

    def read(self, places: pa.Table, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Return ``columns`` of the completions at ``places`` (their figures), in that order."""
        files, rows = places["file"].to_numpy(), places["row"].to_numpy()
        found: dict[tuple[int, int], dict[str, Any]] = {}
        for number in np.unique(files).tolist():
            wanted = rows[files == number]
            taken = self._rows(number, wanted, columns).to_pylist()
            found |= {(number, row): line for row, line in zip(wanted.tolist(), taken, strict=True)}
        return [found[place] for place in zip(files.tolist(), rows.tolist(), strict=True)]

    def prompts(self, wanted: Sequence[int]) -> dict[int, str]:
        """Return the text of each of the prompts ``wanted``, as it was drawn last."""
        indices = self.table["prompt_index"].fill_null(-1).to_numpy()[::-1]
        found, first = np.unique(indices, return_index=True)
        places = self.table.take(len(indices) - 1 - first[np.isin(found, wanted)])
        lines = zip(places["prompt_index"].to_pylist(), self.read(places, ["prompt"]), strict=True)
        return {index: line["prompt"] or "" for index, line in lines}

    def _rows(self, number: int, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Return some ``rows`` of a file. Raises UserError if it is no longer the file whose figures are known."""
        path = self.files[number]
        table = _read(path, columns)
        if stamp_of(path) != self._known[path][0]:
            raise UserError(f"{path} has just been replaced; reload the page")
        return table.take(rows)

    def one(self, file: str, row: int) -> dict[str, Any]:
        """Return every column of one completion. Raises UserError if there is no such completion."""
        path = next((path for path in self.files if path.stem == file), None)
        table = None if path is None else _read(path, None)
        if table is None or row >= table.num_rows:
            raise UserError(f"there is no completion {row} in {file!r}; follow a link of the list")
        [found] = table.slice(row, 1).to_pylist()
        per_token = [found[name] for name in ("tokens", "pieces", "logprobs")]
        per_token += [found[name] for name in OPTIONAL if found[name] is not None]
        if len({None if values is None else len(values) for values in per_token} | {len(found["tokens"] or ())}) > 1:
            raise damaged(str(path), ValueError(f"row {row} does not have one value for each token"))
        return found


def stamp_of(path: Path) -> Stamp | None:
    """Return what changes when a file is replaced or written to; None if there is no such file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def _placed(tables: Sequence[pa.Table], empty: pa.Table) -> pa.Table:
    """Return the figures of all files as one table, with the columns of ``Index``."""
    import pyarrow as pa

    if not tables:
        return empty.slice(0, 0)
    sizes = [len(table) for table in tables]
    table = pa.concat_tables(tables).combine_chunks()
    file = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    row = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])
    key = file.astype(np.int64) * LIMIT + table["group"].fill_null(0).to_numpy()
    _, group = np.unique(key, return_inverse=True)
    reward = table["reward"].fill_null(np.nan).to_numpy()
    scored = np.flatnonzero(np.isfinite(reward))
    of, x, groups = group[scored], reward[scored], int(group.max(initial=-1)) + 1
    low, high = np.full(groups, np.inf), np.full(groups, -np.inf)
    np.minimum.at(low, of, x)
    np.maximum.at(high, of, x)
    count = np.maximum(np.bincount(of, minlength=groups), 1)
    with np.errstate(over="ignore", invalid="ignore"):  # rewards may be as large as numbers get
        mean = np.bincount(of, x, groups) / count
        deviation = np.sqrt(np.bincount(of, (x - mean[of]) ** 2, groups) / count)
    deviation = np.where(low < high, deviation, np.where(low == high, 0.0, np.nan))  # exactly 0 where all are equal
    columns = {"file": file, "row": row, "key": key}
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    return table.append_column("spread", pa.array(deviation[group], from_pandas=True))


def _read(path: Path, columns: Sequence[str] | None) -> pa.Table:
    """Read one file, its columns in the order given. Raises UserError for a damaged one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = layout.schema()
    try:
        if not path.is_file():  # a pipe would wait for whoever writes to it
            raise OSError("it is not a file")
        with path.open("rb") as opened, pq.ParquetFile(opened) as file:  # a path may look like an address
            table = file.read(columns=None if columns is None else list(columns), use_threads=False)
        names = schema.names if columns is None else list(columns)
        return table.select(names).cast(pa.schema([schema.field(name) for name in names]))
    except (pa.ArrowException, OSError, KeyError) as error:
        raise damaged(str(path), error) from error
