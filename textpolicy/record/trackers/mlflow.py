"""MLflow: a run of an experiment, in files beside the run or on a tracking server."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._system.extras import extra
from ...loop.metrics import Row
from ...types import Episode
from .figures import INSTALL, flat, of_look, of_step

if TYPE_CHECKING:
    from ...config.settings import TrackingSettings

logger = logging.getLogger(__name__)
_LONGEST = 500  # characters of a parameter that every store takes


class MLflow:
    """Writes RUN/mlflow, unless ``settings.uri`` names a server or another store."""

    def __init__(self, settings: TrackingSettings, folder: Path, config: Mapping[str, Any]) -> None:
        """Raises MissingDependencyError."""
        tracking, self._entities = extra("mlflow.tracking", INSTALL), extra("mlflow.entities", INSTALL)
        self._refusal: type[Exception] = extra("mlflow.exceptions", INSTALL).MlflowException
        self._lost = False
        if settings.uri is None:
            os.environ.setdefault(
                "MLFLOW_ALLOW_FILE_STORE", "true"
            )  # files need no database, and MLflow asks for leave
        self._client = tracking.MlflowClient(settings.uri or (folder / "mlflow").absolute().as_uri())
        known = self._client.get_experiment_by_name(settings.project)
        experiment = known.experiment_id if known else self._client.create_experiment(settings.project)
        self._run = self._client.create_run(experiment, run_name=settings.name or folder.name).info.run_id
        parameters = [self._entities.Param(k, str(v)[:_LONGEST]) for k, v in flat(config).items()]
        self._client.log_batch(self._run, params=parameters)

    def step(self, step: int, row: Row, episodes: Sequence[Episode]) -> None:
        self._write(step, of_step(row))

    def evaluated(self, step: int, split: str, row: Mapping[str, Any], episodes: Sequence[Episode]) -> None:
        self._write(step, of_look(split, row))

    def close(self) -> None:
        self._tell(self._client.set_terminated)

    def _write(self, step: int, figures: Mapping[str, float]) -> None:
        now = int(1000 * time.time())  # ms
        metrics = [self._entities.Metric(_allowed(name), value, now, step) for name, value in figures.items()]
        self._tell(self._client.log_batch, metrics=metrics)

    def _tell(self, call: Callable[..., object], **what: Any) -> None:
        """A server that is gone does not end the run, whose folder has every figure; it is not asked again."""
        if self._lost:
            return
        try:
            call(self._run, **what)
        except self._refusal as error:
            self._lost = True
            logger.warning("MLflow gets no more figures of this run, which are in its folder: %s", error)


def _allowed(name: str) -> str:
    """A reward may be called anything; MLflow takes letters, digits and a few signs, and no figure inside another."""
    split, _, figure = name.partition("/")
    return split + "/" + re.sub(r"[^\w. :-]", "_", figure.replace("/", "."))
