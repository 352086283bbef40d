"""The rows of a file or data set as prompts: JSONL, CSV, Parquet, or any iterable of mappings."""

from __future__ import annotations

import csv
import json
import numbers
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .._system.extras import extra
from .._system.files import local_path
from ..errors import UserError, unknown_name
from ..rewards.contract import RewardFunction
from ..rewards.example import missing
from .single_turn import TextGenerationEnv
from .text.conversation import Prompt

Row = Mapping[str, Any]
Rows = str | Path | Iterable[Row]
_LONGEST = 2**31 - 1  # characters of a CSV cell; Python's own limit is 131072
_SPELT = re.compile(
    r"""\s*[\[(]?\s*\{\s*['"](?:role|content|from)['"]\s*:.*\}[\s,]*[\])]?\s*""", re.DOTALL
)  # messages, as CSV has them
AS_ROWS = (  # the ways to the rows of containers that are none
    "data['train'] of a dict of splits, [{'question': text}, ...] for texts, frame.to_dict('records') of pandas, "
    "table.to_pylist() of Arrow"
)


def env_from_rows(
    rows: Rows,
    reward_fn: RewardFunction,
    *,
    tokenizer: Any,
    prompt: str | Callable[[Row], Prompt] = "prompt",
    limit: int | None = None,
    **settings: Any,
) -> TextGenerationEnv:
    """Return an environment with a prompt for each of the ``rows``, at most ``limit`` of them.

    ``rows`` are mappings, as a ``datasets.Dataset`` of Hugging Face yields them, or a file for ``read_rows``.
    ``prompt`` names the column with the text (or messages), or is a function from a row to it. The reward
    gets the whole row as ``example``, so every column reaches it. The other ``settings`` are those of
    ``TextGenerationEnv``. Raises UserError.
    """
    kept = rows_of(rows, limit)
    if not kept:
        raise UserError("there are no rows to make prompts of; give at least one")
    prompts = [prompt(row) if callable(prompt) else prompt_of(row, prompt, n) for n, row in enumerate(kept, 1)]
    return TextGenerationEnv(prompts, reward_fn, tokenizer=tokenizer, examples=kept, **settings)


def rows_of(rows: Rows, limit: int | None = None) -> list[dict[str, Any]]:
    """Return the first ``limit`` of the ``rows``, those of a file if it is a path. Raises UserError for no rows."""
    if isinstance(rows, str | Path):
        return read_rows(rows, limit)
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        keys = f" with the keys {', '.join(map(str, rows)):.200}" if isinstance(rows, Mapping) else ""
        raise UserError(
            f"the rows are of the type {type(rows).__name__}{keys}; give mappings from column to value: {AS_ROWS}"
        )
    kept = []
    for number, row in enumerate(islice(rows, limit), 1):
        if not isinstance(row, Mapping):
            raise UserError(
                f"row {number} of the {type(rows).__name__} is a {type(row).__name__}, not a mapping from column to "
                f"value; give those: {AS_ROWS}"
            )
        kept.append(dict(row))
    return kept


def prompt_of(row: Row, column: str, number: int, source: str = "the rows") -> Prompt:
    """Return the text or the messages in a ``column`` of row ``number``; a number becomes text. Raises UserError."""
    where = f"row {number} of {source}"
    if column not in row:
        raise unknown_name(f"column in {where} called", column, map(str, row))
    cell = row[column].tolist() if isinstance(row[column], np.ndarray) else row[column]  # as pandas reads Parquet
    if missing(cell) or (
        isinstance(cell, str | list | tuple) and not (cell.strip() if isinstance(cell, str) else cell)
    ):
        raise UserError(f"{where} has nothing in its column {column!r}; fill it in, or leave the row out")
    if isinstance(cell, str) and _SPELT.fullmatch(cell):
        raise UserError(
            f"the column {column!r} of {where} holds chat messages that were written as text; keep them as lists, in a "
            ".jsonl or .parquet file"
        )
    if isinstance(cell, numbers.Number) and not isinstance(cell, bool):
        return str(cell)
    messages = isinstance(cell, list | tuple) and all(isinstance(m, Mapping) and "role" in m for m in cell)
    if not isinstance(cell, str) and not messages:
        raise UserError(
            f"the column {column!r} of {where} holds a {type(cell).__name__}; give a text, or a list of "
            "{'role', 'content'} messages"
        )
    return list(cell) if messages else cell


def read_rows(path: str | Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Return the first ``limit`` rows (None: all) of a .jsonl, .csv or .parquet file.

    The cells of a CSV file are text; those of the others keep their types. A byte order mark is passed over. Raises
    UserError for a file that cannot be read, with the number of the bad line, or that has two columns of one name, and
    MissingDependencyError for Parquet without pyarrow.
    """
    path = Path(local_path(path))
    kind = path.suffix.lower()
    if kind not in READERS:
        raise unknown_name("kind of file called", path.suffix or path.name, READERS)
    try:
        return list(islice(READERS[kind](path), limit))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}); check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it") from error
    except csv.Error as error:
        raise UserError(f"{path} is not a valid CSV file ({error}); fix it") from error


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            where, text = f"line {number} of {path}", line.removeprefix("\ufeff")
            if not text.strip():
                continue
            try:
                row = json.loads(text, object_pairs_hook=partial(_pairs, where))
            except UserError:
                raise
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not JSON ({error}); fix it") from error
            if not isinstance(row, dict):
                raise UserError(f"{where} is not a JSON object; write {{column: value, ...}}")
            yield row


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    before = csv.field_size_limit(_LONGEST)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            header = next(filter(None, rows), [])
            _pairs(str(path), [(name, None) for name in header])
            for cells in rows:
                if len(cells) != len(header) and cells:
                    where = f"line {rows.line_num} of {path}"
                    raise UserError(f"{where} does not have as many cells as the header; fix it")
                if cells:
                    yield dict(zip(header, cells, strict=True))
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    parquet = extra("pyarrow.parquet", "textpolicy[data]")
    with path.open("rb") as opened:  # pyarrow takes a path such as s3:x for an address
        try:
            file = parquet.ParquetFile(opened)
        except ValueError as error:  # pyarrow's ArrowInvalid
            raise UserError(f"{path} is not a Parquet file ({error}); check it") from error
        _pairs(str(path), [(name, None) for name in file.schema_arrow.names])
        for batch in file.iter_batches():
            yield from batch.to_pylist()


def _pairs(where: str, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return the columns of a row by their names. Raises UserError where two have one name."""
    row = dict(pairs)
    if len(row) != len(pairs):
        twice = next(name for name in row if [n for n, _ in pairs].count(name) > 1)
        raise UserError(f"{where} names {twice!r} twice; rename one")
    return row


READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
