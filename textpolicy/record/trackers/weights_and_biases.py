"""Track a run in Weights & Biases, sent while it runs or kept in the run's folder for ``wandb sync``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._system.extras import extra
from ...errors import UserError
from .tracker import INSTALL, Tracker

if TYPE_CHECKING:
    from ...config.settings import TrackingSettings


def start(settings: TrackingSettings, folder: Path, config: Mapping[str, Any]) -> Tracker:
    """Start a wandb run with its files in RUN/wandb; account and server are wandb's own (`wandb login`).

    Raises MissingDependencyError, and UserError where wandb refuses.
    """
    wandb = extra("wandb", INSTALL)
    mode = "offline" if settings.offline else None
    about = {"project": settings.project, "name": settings.name or folder.name, "config": dict(config)}
    try:
        run = wandb.init(dir=str(folder), mode=mode, **about)
    except wandb.errors.Error as error:
        raise UserError(
            f"wandb cannot start a run ({error}); log in with 'wandb login', or set tracking.offline to true"
        ) from error
    run.define_metric("step")
    run.define_metric("*", step_metric="step")  # the last evaluation, of the kept adapter, has an earlier step
    return Tracker(lambda step, metrics: run.log({"step": step, **metrics}), run.finish)
