"""The rows of a file or data set as prompts: JSONL, CSV, Parquet, or any iterable of mappings."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from .._system.extras import extra
from ..errors import UserError, unknown_name
from ..rewards.contract import RewardFunction
from .single_turn import TextGenerationEnv
from .text.conversation import Prompt

Row = Mapping[str, Any]


def env_from_rows(
    rows: Iterable[Row],
    reward_fn: RewardFunction,
    *,
    tokenizer: Any,
    prompt: str | Callable[[Row], Prompt] = "prompt",
    limit: int | None = None,
    **settings: Any,
) -> TextGenerationEnv:
    """Return an environment with a prompt for each of the ``rows``, at most ``limit`` of them.

    ``rows`` are mappings: a ``datasets.Dataset`` of Hugging Face yields them, ``read_rows`` reads them from a file.
    ``prompt`` names the column with the text (or messages), or is a function from a row to it. The reward
    gets the whole row as ``example``, so every column reaches it. The other ``settings`` are those of
    ``TextGenerationEnv``. Raises UserError.
    """
    kept = [dict(row) for row in islice(rows, limit)]
    if not kept:
        raise UserError("there are no rows to make prompts of; give at least one")
    if not callable(prompt):
        for row in kept:
            if prompt not in row:
                raise unknown_name("column", prompt, row)
    prompts = [prompt(row) if callable(prompt) else row[prompt] for row in kept]
    return TextGenerationEnv(prompts, reward_fn, tokenizer=tokenizer, examples=kept, **settings)


def read_rows(path: str | Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Return the first ``limit`` rows (None: all) of a .jsonl, .csv or .parquet file.

    The cells of a CSV file are text; those of the others keep their types. Raises UserError for a file that cannot be
    read, with the number of the bad line, and MissingDependencyError for Parquet without pyarrow.
    """
    path = Path(path)
    if path.suffix not in READERS:
        raise unknown_name("kind of file called", path.suffix or path.name, READERS)
    try:
        return list(islice(READERS[path.suffix](path), limit))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}); check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it") from error
    except csv.Error as error:
        raise UserError(f"{path} is not a valid CSV file ({error}); fix it") from error


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"line {number} of {path} is not JSON ({error}); fix it") from error
            if not isinstance(row, dict):
                raise UserError(f"line {number} of {path} is not a JSON object; write {{column: value, ...}}")
            yield row


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        for row in rows:
            if None in row or None in row.values():
                raise UserError(f"line {rows.line_num} of {path} does not have as many cells as the header; fix it")
            yield row


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    parquet = extra("pyarrow.parquet", "textpolicy[data]")
    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:  # pyarrow's ArrowInvalid
        raise UserError(f"{path} is not a Parquet file ({error}); check it") from error
    with file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
