"""The ``Tracker``, the sink that gives every tracker the same names for the same metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...loop.metrics import Row
from ...types import Episode

INSTALL = "textpolicy[trackers]"
_LABELS = ("kind", "step", "split")  # keys of a row of metrics.jsonl that are not metrics


@dataclass(frozen=True)
class Tracker:
    """The sink of one tracker, made of its functions; ``flush`` is called after each evaluation."""

    log: Callable[[int, dict[str, float]], object]  # (step, metrics by name)
    close: Callable[[], None]
    flush: Callable[[], object] | None = None

    def step(self, step: int, row: Row, episodes: Sequence[Episode]) -> None:
        """Log every metric of a training step as "train/NAME"."""
        self.log(step, {f"train/{name}": float(value) for name, value in row.items() if name not in _LABELS})

    def evaluated(self, step: int, split: str, row: Mapping[str, Any], episodes: Sequence[Episode]) -> None:
        """Log every metric of an evaluation as "validation/NAME" or "test/NAME"; "@" becomes "_at_"."""
        self.log(step, {f"{split}/{k.replace('@', '_at_')}": float(v) for k, v in row.items() if k not in _LABELS})
        if self.flush is not None:
            self.flush()
