"""The trackers, sinks that send a run's metrics to TensorBoard, Weights & Biases, trackio or MLflow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._system.extras import extra
from ..._system.files import parse_json, read_object, write_whole
from ...errors import TextPolicyError, UserError
from .tracker import INSTALL, Opened, Tracker

if TYPE_CHECKING:
    from ...config.settings import Config, TrackingSettings

MARKS = "trackers.json"  # in a run's folder: by what each tracker finds its run again
_ADVICE = {
    "wandb": "log in with 'wandb login', or set tracking.offline to true",
    "mlflow": "correct tracking.uri, or leave it out to keep files in the run's folder",
}


def require(settings: TrackingSettings) -> None:
    """Check that every tracker is installed and accepts the run. Raises UserError or MissingDependencyError."""
    from . import mlflow, weights_and_biases

    for name in settings.to:
        extra(name, INSTALL)
        with _refusals(name):
            if name == "wandb":
                weights_and_biases.check(settings)
            elif name == "mlflow":
                mlflow.check(settings)


def open_trackers(config: Config, folder: Path, before: bytes = b"", kept: int = 0) -> list[Tracker]:
    """Open a sink for each tracker that ``config`` names, for the run in ``folder``, in which it may be known already.

    ``before`` is the metrics.jsonl that a resumed run found, of which the first ``kept`` bytes stay. What a tracker has
    of it is not sent again, and what it lacks of the part that stays is sent now. Raises UserError and
    MissingDependencyError.
    """
    if not config.tracking.to:
        return []
    rows, stay = _rows(before), len(_rows(before[:kept]))
    path, trackers = folder / MARKS, list[Tracker]()
    advice = "remove it, and the trackers get a new run"
    marks = read_object(path, advice) or {}
    if odd := [name for name, mark in marks.items() if not isinstance(mark, str | None)]:
        raise UserError(f"{path} knows the run of {odd[0]} by what is no text; {advice}")
    for name in config.tracking.to:
        with _refusals(name):
            opened = _open(name, config, folder, marks.get(name))
        held = len(rows) if opened.held is None else opened.held
        sent = {(row["kind"], row.get("split"), row["step"]) for row in rows[:held]}
        trackers.append(Tracker(name, opened.log, opened.end, sent))
        marks[name] = opened.mark
        for row in rows[held:stay]:
            trackers[-1].send(row)
    write_whole(path, json.dumps(marks, indent=2) + "\n")
    return trackers


def _open(name: str, config: Config, folder: Path, mark: str | None) -> Opened:
    from . import mlflow, tensorboard, trackio, weights_and_biases

    settings, resolved = config.tracking, config.model_dump(mode="json")
    match name:
        case "tensorboard":
            return tensorboard.start(folder)
        case "wandb":
            return weights_and_biases.start(settings, folder, resolved, mark)
        case "trackio":
            return trackio.start(settings, folder, resolved, mark)
        case _:
            return mlflow.start(settings, folder, resolved, mark)


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Turn whatever a tracker's library raises into a UserError."""
    try:
        yield
    except TextPolicyError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        advice = _ADVICE.get(name, f"fix that, or leave {name} out of tracking.to")
        raise UserError(f"{name} cannot start a run ({reason}); {advice}") from error


def _rows(lines: bytes) -> list[dict[str, Any]]:
    """Return the complete rows of a metrics file, which may be damaged where it is about to be cut back."""
    rows = []
    for line in lines.rpartition(b"\n")[0].splitlines():
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"kind", "step"} <= row.keys():
            rows.append(row)
    return rows
