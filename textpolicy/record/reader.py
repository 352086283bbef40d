"""A run folder read back: settings, metrics and every completion as tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from . import layout

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.compute as pc

_LOOKS = ("eval", "eval_sampled")
_NEEDED = {"train": ("step",), "eval": ("step", "accuracy", "problems"), "eval_sampled": ("step",)}  # numbers
_LONGEST = 200  # characters of a file that are shown


@dataclass(frozen=True)
class RecordedRun:
    """A run as it was when first asked; load it again to see what a running one has written since.

    Tables are pyarrow's; ``run.metrics.to_pandas()`` makes data frames of them, with pandas installed.
    """

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved settings."""
        return _json(self.folder / layout.CONFIG)

    @cached_property
    def versions(self) -> dict[str, str]:
        return _json(self.folder / layout.VERSIONS)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What the run said at its end; {} before."""
        return _json(self.folder / layout.SUMMARY)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """metrics.jsonl as it is, without a line that is still being written."""
        return read_rows(self.folder / layout.METRICS)

    @cached_property
    def metrics(self) -> pa.Table:
        """One row per training step; null where a step has no such figure."""
        return as_table(row for row in self.rows if row["kind"] == "train")

    @cached_property
    def looks(self) -> pa.Table:
        """One row per look at held-out problems: step, split, accuracy, problems; of a sampled one avg@n, pass@n."""
        return as_table(row for row in self.rows if row["kind"] in _LOOKS)

    @cached_property
    def rollouts(self) -> pa.Table:
        """Every completion of training; ``read`` gets some columns or rows for less."""
        return self.read("rollouts")

    @cached_property
    def evals(self) -> pa.Table:
        """Every completion of every look at held-out problems."""
        return self.read("evals")

    def read(self, kind: str, columns: Sequence[str] | None = None, where: pc.Expression | None = None) -> pa.Table:
        """``columns`` (None: all) of the rows of "rollouts" or "evals" for which ``where`` holds, in order."""
        return read_completions(layout.parquet_files(self.folder / kind), columns, where)


def load_run(run: Path | str) -> RecordedRun:
    """The run in a folder that `textpolicy train` made, finished or not. Raises UserError for another folder."""
    folder = Path(run)
    if not (folder / layout.METRICS).is_file():
        raise UserError(f"{folder} is no run folder (it has no {layout.METRICS}); give the folder of a run")
    return RecordedRun(folder)


def read_completions(
    files: Sequence[Path], columns: Sequence[str] | None = None, where: pc.Expression | None = None
) -> pa.Table:
    """The same of the Parquet ``files``. Raises UserError for one that is damaged."""
    import pyarrow as pa
    import pyarrow.dataset as ds

    if not files:
        empty = layout.schema().empty_table()
        return empty if columns is None else empty.select(list(columns))
    try:
        data = ds.dataset([str(path) for path in files], schema=layout.schema(), format="parquet")
        return data.to_table(columns=None if columns is None else list(columns), filter=where)
    except (pa.ArrowException, OSError) as error:
        raise damaged(f"a file in {files[0].parent}", error) from error


def damaged(what: str, error: Exception) -> UserError:
    """The sentence on completions that cannot be read."""
    said = " ".join(str(error).split())[:_LONGEST]
    return UserError(f"{what} is no sound Parquet file of completions ({said}); remove it, or put it back")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line without its end, which is still being written, is left out.

    Raises UserError for a line that no run writes.
    """
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return [_row(line, f"line {n} of {path}") for n, line in enumerate(whole.splitlines(), 1) if line.strip()]


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); remove the line") from error
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
        raise UserError(f"{where} is no row of a run (an object with a kind); remove the line")
    needed: dict[str, Any] = {name: row.get(name) for name in _NEEDED.get(row["kind"], ())}
    if wrong := [name for name, v in needed.items() if not (_is_number(v) and math.isfinite(v))]:
        raise UserError(f"{where} has no number as its {wrong[0]}; remove the line")
    if row["kind"] == "train" and (odd := [name for name, v in row.items() if name != "kind" and not _is_number(v)]):
        raise UserError(f"{where} has a figure that is no number ({odd[0][:_LONGEST]!r}); remove the line")
    if row["kind"] in _LOOKS and not isinstance(row.get("split"), str):
        raise UserError(f"{where} does not say of which split it is; remove the line")
    return row


def _is_number(value: object) -> bool:
    """Also one that is not finite, which a step may come to."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def as_table(rows: Iterable[dict[str, Any]]) -> pa.Table:
    """Flat records -> a table with a column for every name in any of them."""
    import pyarrow as pa

    kept = list(rows)
    names = list(dict.fromkeys(name for row in kept for name in row))
    return pa.table({name: pa.array([row.get(name) for row in kept]) for name in names})


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); the run folder is damaged") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object; the run folder is damaged")
    return values
