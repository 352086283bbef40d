"""Read a run folder back: its settings, its metrics and every completion as tables."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._system.files import local_path, parse_json, read_object
from ..errors import UserError
from . import layout

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.compute as pc

_EVALUATIONS = ("eval", "eval_sampled")
_NEEDED = {"train": ("step",), "eval": ("step", "accuracy", "problems"), "eval_sampled": ("step",)}  # numbers
_COUNTS = (
    "sample_seconds", "update_seconds", "sampled_tokens", "trained_tokens", "peak_memory_bytes", "num_datums",
)  # fmt: skip
_WORDS = ("algorithm", "advantage_mode", "transform_mode", "condition")  # in the rows of train_math
_ANOTHER = "give the folder of a run, if another program or an earlier version wrote this one"
_DAMAGED = "the run folder is damaged"
_LONGEST = 200  # characters of a file shown in an error


@dataclass(frozen=True)
class RecordedRun:
    """The contents of a run folder at the first read; load it again to see what a running one has written since.

    Tables are pyarrow's; ``run.metrics.to_pandas()`` makes data frames of them, with pandas installed.
    """

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved settings."""
        return read_object(self.folder / layout.CONFIG, _DAMAGED) or {}

    @cached_property
    def versions(self) -> dict[str, str]:
        """The versions of the packages that ran it."""
        return read_object(self.folder / layout.VERSIONS, _DAMAGED) or {}

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The record written at the end of the run; {} before."""
        return read_object(self.folder / layout.SUMMARY, _DAMAGED) or {}

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, and of train_math's evals.jsonl. Raises UserError for a line that no run writes.

        A last line without a line end is still being written, and left out.
        """
        found: list[dict[str, Any]] = []
        # What the rows of a file leave out: train_math's have no split, and an older one's no kind.
        for name, kind, left_out in (
            (layout.METRICS, "train", {}),
            (layout.MATH_EVALS, "eval", {"split": "validation"}),
        ):
            path, of_run = self.folder / name, False
            try:
                lines = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.is_file() else []
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error.strerror}); {_DAMAGED}") from error
            given = left_out if any(b'"kind"' in line for line in lines) else {"kind": kind, **left_out}
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"line {number} of {path}"
                    found.append(parse_row(line, where, given, "remove the line" if of_run else _ANOTHER))
                    of_run = True
        return found

    @cached_property
    def stages(self) -> list[dict[str, Any]]:
        """The stages so far, in order: ``stage``, its ``steps``, those done at its ``end``, and what was measured then.

        That is the greedy ``accuracy`` on the validation problems, avg@n and pass@n where they were sampled, and the
        ``loss`` on held-out demonstrations. A run without stages has none.
        """
        found: list[dict[str, Any]] = []
        for row in self.rows:
            if row["kind"] == "train" and "stage" in row:
                if not found or found[-1]["stage"] != row["stage"]:
                    found.append({"stage": row["stage"], "steps": 0})
                found[-1] |= {"steps": found[-1]["steps"] + 1, "end": row["step"] + 1}
        for row in self.rows:
            if row["kind"] == "eval_loss" or (row["kind"] in _EVALUATIONS and row["split"] == "validation"):
                measured = {name: row[name] for name in row if name in ("accuracy", "loss") or "@" in name}
                for stage in found:
                    if stage["end"] == row["step"]:
                        stage |= measured
        return found

    @cached_property
    def metrics(self) -> pa.Table:
        """The table with one row per training step; null where a step has no such metric."""
        return self._table(("train",))

    @cached_property
    def evaluations(self) -> pa.Table:
        """The table with one row per evaluation: step, split, accuracy, problems; avg@n and pass@n where it sampled."""
        return self._table(_EVALUATIONS)

    @cached_property
    def rollouts(self) -> pa.Table:
        """The table of all training completions; ``read`` is cheaper for some columns or rows."""
        return self.read("rollouts")

    @cached_property
    def evals(self) -> pa.Table:
        """The table of all completions of all evaluations."""
        return self.read("evals")

    def read(self, kind: str, columns: Sequence[str] | None = None, where: pc.Expression | None = None) -> pa.Table:
        """Return ``columns`` (None: all) of the rows of "rollouts" or "evals" that match ``where``, in order.

        Raises UserError for a damaged file.
        """
        import pyarrow as pa
        import pyarrow.dataset as ds

        files = layout.parquet_files(self.folder / kind)
        names = None if columns is None else list(columns)
        if not files:
            empty = layout.schema().empty_table()
            return empty if names is None else empty.select(names)
        try:
            if odd := [path for path in files if not path.is_file()]:  # pyarrow waits for whoever writes to a pipe
                raise OSError(f"{odd[0].name} is not a file")
            paths = [os.path.join(".", path) for path in files]  # or pyarrow takes s3:x for an address and ~ for home
            data = ds.dataset(paths, schema=layout.schema(), format="parquet")
            return data.to_table(columns=names, filter=where)
        except (pa.ArrowException, OSError) as error:
            raise damaged(f"a file in {files[0].parent}", error) from error

    def _table(self, kinds: Collection[str]) -> pa.Table:
        """Return the rows of ``kinds`` as a table with a column for every name in any of them."""
        import pyarrow as pa

        rows = [row for row in self.rows if row["kind"] in kinds]
        names = dict.fromkeys(name for row in rows for name in row)
        return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})


def load_run(run: Path | str) -> RecordedRun:
    """Load a folder made by `textpolicy train`, finished or not. Raises UserError for any other folder."""
    folder = Path(local_path(run))
    if not (folder / layout.METRICS).is_file():
        raise UserError(f"{folder} is not a run folder (it has no {layout.METRICS}); give the folder of a run")
    return RecordedRun(folder)


def flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Flatten nested settings: {"rollout": {"group_size": 8}} -> {"rollout.group_size": 8}."""
    leaves: dict[str, Any] = {}
    for name, value in config.items():
        leaves |= flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {above + name: value}
    return leaves


def damaged(what: str, error: Exception) -> UserError:
    """Return the error for completions that cannot be read."""
    reason = " ".join(str(error).split())[:_LONGEST]
    return UserError(f"{what} is not a valid Parquet file of completions ({reason}); remove it, or restore it")


def ended(folder: Path) -> bool:
    """Return whether the run in ``folder`` has ended: summary.json, which it writes last, is there and sound."""
    try:
        return read_object(folder / layout.SUMMARY, _DAMAGED) is not None
    except UserError:
        return False


def marks(row: Mapping[str, Any]) -> str | None:
    """Return 1 or 0 for each problem of an evaluation, solved or not; None where its ``row`` does not say for each."""
    solved = row.get("solved")
    told = isinstance(solved, str) and not set(solved) - {"0", "1"} and len(solved) == row["problems"]
    return solved if told else None


def parse_row(line: bytes, where: str, given: Mapping[str, str], advice: str) -> dict[str, Any]:
    """Parse and check one line that leaves out what is ``given``. Raises UserError, which ends with the ``advice``."""
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); {advice}") from error
    if not isinstance(row, dict) or not isinstance(kind := (row := {**given, **row}).get("kind"), str):
        raise UserError(f"{where} is not a row of a run (an object with a kind); {advice}")
    if kind == "train":  # train_math also writes words, and null where nothing could be scored
        row = {name: value for name, value in row.items() if value is not None and name not in _WORDS}
    # A metric may be NaN or infinite; an integer has 64 bits.
    numbers = {k: v for k, v in row.items() if isinstance(v, float) or (isinstance(v, int) and abs(v) < 2**63)}
    if wrong := [name for name in _NEEDED.get(kind, ()) if not math.isfinite(numbers.get(name, math.nan))]:
        raise UserError(f"{where} has no number as its {wrong[0]}; {advice}")
    if kind == "eval" and not (0 <= numbers["accuracy"] <= 1 <= numbers["problems"] == int(numbers["problems"])):
        raise UserError(f"{where} has an accuracy of {row['accuracy']} on {row['problems']} problems; {advice}")
    if wrong := [name for name in _COUNTS if kind == "train" and not 0 <= numbers.get(name, 0) < math.inf]:
        raise UserError(f"{where} has a {wrong[0]} of {numbers[wrong[0]]}; {advice}")
    if kind == "train" and (odd := [name for name in row if name not in ("kind", "stage", *numbers)]):
        raise UserError(f"{where} has a metric that is not a number ({odd[0][:_LONGEST]!r}); {advice}")
    if kind in _EVALUATIONS and not isinstance(row.get("split"), str):
        raise UserError(f"{where} does not name its split; {advice}")
    return row
