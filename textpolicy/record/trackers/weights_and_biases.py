"""Weights & Biases: a run of a project, sent as it goes or kept in the run's folder for ``wandb sync``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._system.extras import extra
from ...errors import UserError
from ...loop.metrics import Row
from ...types import Episode
from .figures import INSTALL, of_look, of_step

if TYPE_CHECKING:
    from ...config.settings import TrackingSettings


class WeightsAndBiases:
    """Its files are in RUN/wandb. Where the run is sent, and by whom, is as for any use of wandb (`wandb login`)."""

    def __init__(self, settings: TrackingSettings, folder: Path, config: Mapping[str, Any]) -> None:
        """Raises MissingDependencyError, and UserError where wandb refuses."""
        wandb = extra("wandb", INSTALL)
        mode = "offline" if settings.offline else None
        about = {"project": settings.project, "name": settings.name or folder.name, "config": dict(config)}
        try:
            self._run = wandb.init(dir=str(folder), mode=mode, **about)
        except wandb.errors.Error as error:
            raise UserError(
                f"wandb cannot begin a run ({error}); log in with 'wandb login', or set tracking.offline to true"
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # a look at the kept adapter comes last, of an earlier step

    def step(self, step: int, row: Row, episodes: Sequence[Episode]) -> None:
        self._run.log({"step": step, **of_step(row)})

    def evaluated(self, step: int, split: str, row: Mapping[str, Any], episodes: Sequence[Episode]) -> None:
        self._run.log({"step": step, **of_look(split, row)})

    def close(self) -> None:
        self._run.finish()
