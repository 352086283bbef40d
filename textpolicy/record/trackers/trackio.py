"""Track a run in trackio's local database, for ``trackio show``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._system.extras import extra
from ..reader import flat
from .tracker import INSTALL, Opened

if TYPE_CHECKING:
    from ...config.settings import TrackingSettings


def start(settings: TrackingSettings, folder: Path, config: Mapping[str, Any], mark: str | None = None) -> Opened:
    """Start a run in trackio's own database (TRACKIO_DIR), or the one with the id ``mark`` again.

    Raises MissingDependencyError.
    """
    trackio, storage = extra("trackio", INSTALL), extra("trackio.sqlite_storage", INSTALL).SQLiteStorage
    about = {
        "project": settings.project,
        "name": settings.name or folder.name,
        "config": flat(config),
        "embed": False,
        "auto_log_gpu": False,  # of the machine; a step's row has what the run used
        "auto_log_cpu": False,
    }
    run = trackio.init(**about, resume="allow" if mark else "never")
    if mark is not None and run.id != mark:  # the last run of this name is another folder's
        run = trackio.init(**about, resume="never")
    held = len(storage.get_logs(run.project, run.name, run_id=run.id)) if run.id == mark else 0
    return Opened(run.id, held, lambda step, metrics: run.log(metrics, step=step), lambda code: run.finish())
