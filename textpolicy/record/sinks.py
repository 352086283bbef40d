"""The sinks, which receive the facts of a run while it runs: the recorder, the trackers and the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..loop.metrics import Row
from ..types import Episode


class Sink(Protocol):
    """The receiver of every training step and every evaluation, in order."""

    def step(self, step: int, row: Row, episodes: Sequence[Episode]) -> None:
        """Receive training step ``step``, from 0: its metrics, and every completion it sampled.

        ``credited`` is set on the episodes that were trained on.
        """

    def evaluated(self, step: int, split: str, row: Mapping[str, Any], episodes: Sequence[Episode]) -> None:
        """Receive an evaluation on ``split`` ("validation" or "test") after ``step`` steps, with every completion.

        ``row`` is the line of metrics.jsonl, whose ``kind`` is "eval" (greedy) or "eval_sampled".
        """

    def close(self) -> None:
        """Finish; called once, however the run ended. A sink with nothing to finish inherits this."""
        return


@dataclass(frozen=True)
class Sinks(Sink):
    """The union of several sinks, called in order."""

    sinks: Sequence[Sink]

    def step(self, step: int, row: Row, episodes: Sequence[Episode]) -> None:
        """Pass a training step to every sink."""
        for sink in self.sinks:
            sink.step(step, row, episodes)

    def evaluated(self, step: int, split: str, row: Mapping[str, Any], episodes: Sequence[Episode]) -> None:
        """Pass an evaluation to every sink."""
        for sink in self.sinks:
            sink.evaluated(step, split, row, episodes)

    def close(self) -> None:
        """Close every sink."""
        for sink in self.sinks:
            sink.close()
