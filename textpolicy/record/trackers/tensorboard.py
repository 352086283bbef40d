"""TensorBoard: event files in the run's folder, for ``tensorboard --logdir runs``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..._system.extras import extra
from ...types import Episode
from .tracker import INSTALL, Tracker


class TensorBoard(Tracker):
    """The writer of RUN/tensorboard, which does not need TensorFlow."""

    def __init__(self, folder: Path) -> None:
        """Open the event file. Raises MissingDependencyError."""
        self._event = extra("tensorboard.compat.proto.event_pb2", INSTALL)
        self._summary = extra("tensorboard.compat.proto.summary_pb2", INSTALL)
        writer = extra("tensorboard.summary.writer.event_file_writer", INSTALL)
        self._writer = writer.EventFileWriter(str(folder / "tensorboard"))

    def evaluated(self, step: int, split: str, row: Mapping[str, Any], episodes: Sequence[Episode]) -> None:
        """Log the metrics of an evaluation, and flush the file."""
        super().evaluated(step, split, row, episodes)
        self._writer.flush()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one event with all of ``metrics``."""
        values = [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        summary = self._summary.Summary(value=values)
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
