"""The ``Tracker``, the sink that gives every tracker the same names for the same metrics, and each of them once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...loop.metrics import Row
from ...types import Episode

INSTALL = "textpolicy[trackers]"
_LABELS = ("kind", "step", "split")  # keys of a row of metrics.jsonl that are not metrics
logger = logging.getLogger(__name__)


class Opened(NamedTuple):
    """The run in a tracker, as its library opened it."""

    mark: str  # by which it is found again
    held: int | None  # how many rows of metrics.jsonl it has, the first ones; None: all that were sent
    log: Callable[[int, dict[str, float]], object]  # (step, metrics by name)
    end: Callable[[int], object]  # with 0 for a run that is done, else its exit code


@dataclass
class Tracker:
    """The sink of one tracker. It takes no row twice, and nothing more after it has failed."""

    name: str
    log: Callable[[int, dict[str, float]], object]
    end: Callable[[int], object]
    sent: set[tuple[Any, ...]] = field(default_factory=set)  # kinds, splits and steps of the rows that it has
    exit_code: int = 0  # of the run, when it ends
    lost: bool = False

    def step(self, step: int, row: Row, episodes: Sequence[Episode]) -> None:
        """Log every metric of a training step as "train/NAME"."""
        self.send({"kind": "train", **row, "step": step})

    def evaluated(self, step: int, split: str, row: Mapping[str, Any], episodes: Sequence[Episode]) -> None:
        """Log every metric of an evaluation as "validation/NAME" or "test/NAME"; "@" becomes "_at_"."""
        self.send({**row, "step": step, "split": split})

    def send(self, row: Mapping[str, Any]) -> None:
        """Log the numbers of a row of metrics.jsonl."""
        name = (row["kind"], row.get("split"), row["step"])
        if name in self.sent:
            return
        self.sent.add(name)
        place = row.get("split", "train")
        numbers = {k: v for k, v in row.items() if k not in _LABELS and isinstance(v, int | float)}
        self._call(self.log, row["step"], {f"{place}/{k.replace('@', '_at_')}": float(v) for k, v in numbers.items()})

    def close(self) -> None:
        """End the tracker's run with the exit code of this one."""
        self._call(self.end, self.exit_code)

    def _call(self, function: Callable[..., object], *values: Any) -> None:
        """Call the library; after its first failure warn once and stop, for the run's folder has every metric."""
        if self.lost:
            return
        try:
            function(*values)
        except Exception as error:  # noqa: BLE001 - of a library, a disk or a server, which must not end the run
            self.lost = True
            logger.warning("%s gets no more metrics of this run, which are in its folder: %s", self.name, error)
