"""Track a run in MLflow, as a run of an experiment, in files beside the run or on a tracking server."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._system.extras import extra
from ..reader import flat
from .tracker import INSTALL, Opened

if TYPE_CHECKING:
    from ...config.settings import TrackingSettings

_LONGEST = 500  # characters of a parameter that every store takes
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"


def check(settings: TrackingSettings) -> None:
    """Raise the library's error where the server or store of ``settings.uri`` refuses or does not answer."""
    if settings.uri is None:
        return
    before = os.environ.get(_RETRIES)
    os.environ.setdefault(_RETRIES, "1")  # its seven take minutes where nobody listens
    try:
        extra("mlflow.tracking", INSTALL).MlflowClient(settings.uri).get_experiment_by_name(settings.project)
    finally:
        if before is None:
            del os.environ[_RETRIES]


def start(settings: TrackingSettings, folder: Path, config: Mapping[str, Any], mark: str | None = None) -> Opened:
    """Start a run in RUN/mlflow, or in the server or store of ``settings.uri``, or the one with the id ``mark`` again.

    Raises MissingDependencyError, and the library's errors.
    """
    tracking, entities = extra("mlflow.tracking", INSTALL), extra("mlflow.entities", INSTALL)
    refusal: type[Exception] = extra("mlflow.exceptions", INSTALL).MlflowException
    if settings.uri is None:  # files need no database, but MLflow wants explicit permission
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    client = tracking.MlflowClient(settings.uri or (folder / "mlflow").absolute().as_uri())
    held: int | None = 0
    if mark is not None:
        try:
            client.update_run(mark, status="RUNNING")
            held = None
        except refusal:  # it was removed there
            mark = None
    if mark is None:
        known = client.get_experiment_by_name(settings.project)
        experiment = known.experiment_id if known else client.create_experiment(settings.project)
        mark = client.create_run(experiment, run_name=settings.name or folder.name).info.run_id
        client.log_batch(mark, params=[entities.Param(k, str(v)[:_LONGEST]) for k, v in flat(config).items()])

    def log(step: int, metrics: dict[str, float]) -> None:
        now = int(1000 * time.time())  # ms
        client.log_batch(mark, metrics=[entities.Metric(_allowed(k), v, now, step) for k, v in metrics.items()])

    return Opened(mark, held, log, lambda code: client.set_terminated(mark, "FAILED" if code else "FINISHED"))


def _allowed(name: str) -> str:
    """Return a metric's name as MLflow allows it: letters, digits and a few signs, and only one "/"."""
    split, _, metric = name.partition("/")
    return split + "/" + re.sub(r"[^\w. :-]", "_", metric.replace("/", "."))
