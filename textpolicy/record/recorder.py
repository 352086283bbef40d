"""``Recorder``: the sink that keeps every completion of a run in Parquet files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._system.files import fill_whole
from ..loop.metrics import Row
from ..types import Episode
from . import layout

if TYPE_CHECKING:
    import pyarrow as pa

Spell = Callable[[np.ndarray], Sequence[str]]  # (T,) token ids -> the text of each
_ZSTD = 3  # level
# A file is one step, so there is nothing to skip by statistics, and Zstandard alone beats dictionaries.
_SMALL: dict[str, Any] = {"store_schema": False, "write_statistics": False, "use_dictionary": False}


class Recorder:
    """Writes each step's completions to a file of their own, whole or not at all, before the next step begins."""

    def __init__(self, run: Path, spell: Spell) -> None:
        """``run`` is the run's folder; ``spell`` gives the text of each token, as ``TextGenerationEnv.pieces`` does."""
        self._run, self._spell = run, spell

    def step(self, step: int, row: Row, episodes: Sequence[Episode]) -> None:
        write_completions(layout.rollouts_path(self._run, step), self.table(step, "train", episodes))

    def evaluated(self, step: int, split: str, row: Mapping[str, Any], episodes: Sequence[Episode]) -> None:
        sampled = any(e.temperature != 0 for e in episodes)
        write_completions(layout.evals_path(self._run, split, step, sampled), self.table(step, split, episodes))

    def close(self) -> None:
        """Nothing is left to write."""

    def table(self, step: int, split: str, episodes: Sequence[Episode]) -> pa.Table:
        """The ``episodes`` as rows of ``layout.schema``."""
        import pyarrow as pa

        columns = {"step": [step] * len(episodes), "split": [split] * len(episodes), "sample": _places(episodes)}
        columns |= _facts(episodes) | _tokens(episodes, self._spell)
        schema = layout.schema()
        return pa.Table.from_arrays([pa.array(columns[f.name], f.type) for f in schema], schema=schema)


def write_completions(path: Path, table: pa.Table) -> None:
    """``table`` as the Parquet file ``path``, compact."""
    import pyarrow.parquet as pq

    def write(file: Any) -> None:
        pq.write_table(table, file, compression="zstd", compression_level=_ZSTD, **_SMALL)

    path.parent.mkdir(exist_ok=True)
    fill_whole(path, write)


def _facts(episodes: Sequence[Episode]) -> dict[str, Sequence[Any]]:
    """The columns with one value per completion."""
    return {
        "group": [e.group for e in episodes],
        "prompt_index": [e.prompt_index for e in episodes],
        "temperature": [e.temperature for e in episodes],
        "prompt": [_storable(e.prompt) for e in episodes],
        "text": [_storable(e.text) for e in episodes],
        "finish_reason": ["length" if e.truncated else "stop" for e in episodes],
        "reward": [_known(e.reward) for e in episodes],
        "is_correct": [e.is_correct for e in episodes],
        "scores": [[(name, _known(score)) for name, score in e.scores.items()] for e in episodes],
        "length": [int(e.mask.sum()) for e in episodes],
        "advantage": [e.credited and e.credited.advantage for e in episodes],
    }


def _tokens(episodes: Sequence[Episode], spell: Spell) -> dict[str, Sequence[Any]]:
    """The columns with a list per completion."""
    starts = [_prompt_length(e) for e in episodes]
    pairs = list(zip(episodes, starts, strict=True))
    credited = [(e.credited, n) for e, n in pairs]
    return {
        "prompt_tokens": [e.tokens[:n] for e, n in pairs],
        "tokens": [e.tokens[n:] for e, n in pairs],
        "pieces": [[_storable(piece) for piece in spell(e.tokens[n:])] for e, n in pairs],
        "sampled": [None if e.mask[n:].all() else e.mask[n:] for e, n in pairs],
        "logprobs": [e.logprobs[n:] for e, n in pairs],
        "entropy": [None if e.entropy is None else _rounded(e.entropy[n:]) for e, n in pairs],
        "credit": [c and c.credit[n:] for c, n in credited],
        "planning": [None if c is None or c.planning is None else c.planning[n:] for c, n in credited],
        "learner_logprobs": [None if e.learner is None else e.learner[n:] for e, n in pairs],
    }


def _prompt_length(episode: Episode) -> int:
    """Tokens before the first sampled one; all of them if nothing was sampled."""
    return int(np.argmax(episode.mask)) if episode.mask.any() else len(episode.mask)


def _places(episodes: Sequence[Episode]) -> list[int]:
    """The number of each completion in its group."""
    seen: dict[int, int] = {}
    places = []
    for e in episodes:
        places.append(seen.get(e.group, 0))
        seen[e.group] = places[-1] + 1
    return places


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _rounded(values: np.ndarray) -> np.ndarray:
    """To half precision, which halves what they take on disk."""
    return values.astype(np.float16).astype(np.float32)


def _storable(text: str) -> str:
    """Without lone surrogates, which UTF-8 has no bytes for."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
