"""A run folder read back: settings, metrics and every completion as tables."""

from __future__ import annotations

import json
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
    """The same of the Parquet ``files``."""
    import pyarrow.dataset as ds

    if not files:
        empty = layout.schema().empty_table()
        return empty if columns is None else empty.select(list(columns))
    data = ds.dataset([str(path) for path in files], schema=layout.schema(), format="parquet")
    return data.to_table(columns=None if columns is None else list(columns), filter=where)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON Lines file; a last line without its end, which is still being written, is left out."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n") and line.strip()]


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
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); the run folder is damaged") from error
