"""Where the facts of a run go as it runs: the recorder, trackers and the terminal are sinks, all in one list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..loop.metrics import Row
from ..types import Episode


class Sink(Protocol):
    """Is told of every training step and of every look at held-out problems, in order."""

    def step(self, step: int, row: Row, episodes: Sequence[Episode]) -> None:
        """Training step ``step``, from 0, has been taken: its metrics, and every completion it sampled.

        An episode that was trained on says so in ``credited``.
        """

    def evaluated(self, step: int, split: str, row: Mapping[str, Any], episodes: Sequence[Episode]) -> None:
        """A look at ``split`` ("validation" or "test") after ``step`` steps: its figures, and every completion.

        ``row`` is the line of metrics.jsonl, whose ``kind`` is "eval" (greedy) or "eval_sampled".
        """

    def close(self) -> None:
        """The run has ended, well or not; called once."""


class Sinks:
    """Several sinks as one, told in order."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def step(self, step: int, row: Row, episodes: Sequence[Episode]) -> None:
        for sink in self._sinks:
            sink.step(step, row, episodes)

    def evaluated(self, step: int, split: str, row: Mapping[str, Any], episodes: Sequence[Episode]) -> None:
        for sink in self._sinks:
            sink.evaluated(step, split, row, episodes)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
