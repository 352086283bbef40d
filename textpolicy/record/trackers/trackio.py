"""trackio: a run of a project in its local database, for ``trackio show``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._system.extras import extra
from ...loop.metrics import Row
from ...types import Episode
from .figures import INSTALL, flat, of_look, of_step

if TYPE_CHECKING:
    from ...config.settings import TrackingSettings


class Trackio:
    """Its database is where trackio keeps them all (TRACKIO_DIR)."""

    def __init__(self, settings: TrackingSettings, folder: Path, config: Mapping[str, Any]) -> None:
        """Raises MissingDependencyError."""
        self._run = extra("trackio", INSTALL).init(
            project=settings.project,
            name=settings.name or folder.name,
            config=flat(config),
            embed=False,
            auto_log_gpu=False,  # of the machine; a step's row has what it took
            auto_log_cpu=False,
        )

    def step(self, step: int, row: Row, episodes: Sequence[Episode]) -> None:
        self._run.log(of_step(row), step=step)

    def evaluated(self, step: int, split: str, row: Mapping[str, Any], episodes: Sequence[Episode]) -> None:
        self._run.log(of_look(split, row), step=step)

    def close(self) -> None:
        self._run.finish()
