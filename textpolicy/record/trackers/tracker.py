"""``Tracker``: the sink that gives every tracker the same names for the same metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from ...loop.metrics import Row
from ...types import Episode

INSTALL = "textpolicy[trackers]"
_LABELS = ("kind", "step", "split")  # keys of a row of metrics.jsonl that are not metrics


class Tracker(ABC):
    """The base of a tracker, which logs the metrics of a step or an evaluation in its own way."""

    def step(self, step: int, row: Row, episodes: Sequence[Episode]) -> None:
        """Log every metric of a training step as "train/NAME"."""
        self.log(step, {f"train/{name}": float(value) for name, value in row.items() if name not in _LABELS})

    def evaluated(self, step: int, split: str, row: Mapping[str, Any], episodes: Sequence[Episode]) -> None:
        """Log every metric of an evaluation as "validation/NAME" or "test/NAME"; "@" becomes "_at_"."""
        self.log(step, {f"{split}/{k.replace('@', '_at_')}": float(v) for k, v in row.items() if k not in _LABELS})

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send ``metrics`` to the tracker."""

    @abstractmethod
    def close(self) -> None:
        """End the tracker's run."""
