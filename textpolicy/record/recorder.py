"""The ``Recorder``, the sink that keeps every completion of a run in Parquet files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._system.files import fill_whole
from ..loop.metrics import Row
from ..types import Episode
from . import layout
from .sinks import Sink

Spell = Callable[[np.ndarray], Sequence[str]]  # (T,) token ids -> the text of each
# A file is one step, so there is nothing to skip by statistics, and Zstandard alone beats dictionaries.
_COMPACT: dict[str, Any] = {
    "compression": "zstd", "compression_level": 3, "store_schema": False, "write_statistics": False,
    "use_dictionary": False,
}  # fmt: skip


@dataclass(frozen=True)
class Recorder(Sink):
    """Write each step's completions to a file of their own, atomically, before the next step begins."""

    run: Path  # its folder
    spell: Spell  # gives each token's text, as ``TextGenerationEnv.pieces``

    def step(self, step: int, row: Row, episodes: Sequence[Episode]) -> None:
        """Write the completions of a training step; nothing where none were sampled."""
        if episodes:
            self._write(layout.rollouts_path(self.run, step), step, "train", episodes)

    def evaluated(self, step: int, split: str, row: Mapping[str, Any], episodes: Sequence[Episode]) -> None:
        """Write the held-out completions of an evaluation after ``step`` steps."""
        kind = f"{split}-sampled" if any(e.temperature != 0 for e in episodes) else split
        self._write(self.run / layout.EVALS / f"{kind}-{step:06d}.parquet", step, split, episodes)

    def _write(self, path: Path, step: int, split: str, episodes: Sequence[Episode]) -> None:
        """Write the ``episodes`` as rows of ``layout.schema`` to the Parquet file ``path``."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        places: list[int] = []  # of each completion in its group
        seen: dict[int, int] = {}
        for e in episodes:
            places.append(seen.get(e.group, 0))
            seen[e.group] = places[-1] + 1
        # Tokens before the first sampled one; all of them if nothing was sampled.
        starts = [int(np.argmax(e.mask)) if e.mask.any() else len(e.mask) for e in episodes]
        pairs = list(zip(episodes, starts, strict=True))
        credited = [(e.credited, n) for e, n in pairs]
        columns: dict[str, Sequence[Any]] = {
            "step": [step] * len(episodes),
            "split": [split] * len(episodes),
            "group": [e.group for e in episodes],
            "sample": places,
            "prompt_index": [e.prompt_index for e in episodes],
            "temperature": [e.temperature for e in episodes],
            "prompt": [_storable(e.prompt) for e in episodes],
            "text": [_storable(e.text) for e in episodes],
            "finish_reason": ["length" if e.truncated else "stop" for e in episodes],
            "reward": [_null_for_nan(e.reward) for e in episodes],
            "is_correct": [e.is_correct for e in episodes],
            "scores": [[(name, _null_for_nan(score)) for name, score in e.scores.items()] for e in episodes],
            "length": [int(e.mask.sum()) for e in episodes],
            "advantage": [e.credited and e.credited.advantage for e in episodes],
            "prompt_tokens": [e.tokens[:n] for e, n in pairs],
            "tokens": [e.tokens[n:] for e, n in pairs],
            "pieces": [[_storable(piece) for piece in self.spell(e.tokens[n:])] for e, n in pairs],
            "sampled": [None if e.mask[n:].all() else e.mask[n:] for e, n in pairs],
            "logprobs": [e.logprobs[n:] for e, n in pairs],
            # Rounding to half precision halves the bytes on disk.
            "entropy": [
                None if e.entropy is None else e.entropy[n:].astype(np.float16).astype(np.float32) for e, n in pairs
            ],
            "credit": [c and c.credit[n:] for c, n in credited],
            "planning": [None if c is None or c.planning is None else c.planning[n:] for c, n in credited],
            "learner_logprobs": [None if e.learner is None else e.learner[n:] for e, n in pairs],
        }
        schema = layout.schema()
        table = pa.Table.from_arrays([pa.array(columns[f.name], f.type) for f in schema], schema=schema)
        path.parent.mkdir(exist_ok=True)
        fill_whole(path, lambda file: pq.write_table(table, file, **_COMPACT))


def _null_for_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def _storable(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
