"""Track a run in TensorBoard's event files in its folder, for ``tensorboard --logdir runs``."""

from __future__ import annotations

import time
from pathlib import Path

from ..._system.extras import extra
from .tracker import INSTALL, Tracker


def start(folder: Path) -> Tracker:
    """Open an event file in RUN/tensorboard, which does not need TensorFlow. Raises MissingDependencyError."""
    events = extra("tensorboard.compat.proto.event_pb2", INSTALL)
    summaries = extra("tensorboard.compat.proto.summary_pb2", INSTALL)
    writers = extra("tensorboard.summary.writer.event_file_writer", INSTALL)
    writer = writers.EventFileWriter(str(folder / "tensorboard"))

    def log(step: int, metrics: dict[str, float]) -> None:
        values = [summaries.Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        summary = summaries.Summary(value=values)
        writer.add_event(events.Event(wall_time=time.time(), step=step, summary=summary))

    return Tracker(log, writer.close, writer.flush)
