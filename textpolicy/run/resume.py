"""Going on with a run that was cut short: whether its folder is one, what of its settings differ, where to begin."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from .._system.faults import TRAIN_MATH, how_to_resume
from .._system.lock import LOCK, RunLock
from ..config.settings import MONEY, Config, PositiveInt, check_config
from ..errors import UserError
from ..record.layout import CONFIG, SUMMARY, TASK, VERSIONS
from .checkpoint import Checkpoint, Checkpoints

CHECKPOINTS = "checkpoints"
_FIRST = {
    LOCK,
    TASK,
    VERSIONS,
    *(f".{name}.new" for name in (TASK, VERSIONS, CONFIG)),
}  # what a folder holds before its config
_FREE = ("output", "quiet", *(f"tinker.{name}" for name in MONEY))  # settings that say nothing about the numbers


@dataclass(frozen=True, slots=True)
class Resumed:
    """A run folder to go on in."""

    folder: Path
    checkpoint: Checkpoint | None  # None: it was cut short before its first, and begins again
    remarks: tuple[str, ...] = ()  # sentences to say


class TrainArguments(Config):
    """Train a model, or go on with a run that was cut short."""

    resume: Path | None = None
    """Go on with the run in this folder, with its own settings."""
    allow: tuple[str, ...] = ()
    """With resume: settings that may differ from the run's own, such as steps,machine.threads, or sections."""

    dry_run: bool = False
    """With engine tinker: say what the run may cost, and end."""
    expected_tokens: PositiveInt | None = None
    """In a dry run: also price episodes of this length."""

    @model_validator(mode="after")
    def _dry_run_has_a_price(self) -> Self:
        if self.dry_run and self.engine != "tinker":
            raise ValueError(f"dry_run is for engine tinker, where tokens cost money, and engine is {self.engine}")
        return self

    @model_validator(mode="after")
    def _one_folder(self) -> Self:
        if self.resume is not None and self.output is not None and self.output != self.resume:
            raise ValueError(f"output is {self.output} and resume {self.resume}; give one of them")
        return self

    @property
    def config(self) -> Config:
        """The settings alone; what nobody gave counts as not given."""
        given = self.model_dump(exclude_unset=True, exclude={"resume", "allow", "dry_run", "expected_tokens"})
        return Config.model_validate(given if self.resume is None else {**given, "output": self.resume})


def run_to_resume(arguments: Sequence[str]) -> Path | None:
    """The folder after --resume, read before all else because its settings are the defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--resume", type=Path)
    try:
        return parser.parse_known_args(arguments)[0].resume
    except argparse.ArgumentError as error:
        raise UserError(f"{error.message} after --resume; name the folder of a run") from error


def reopen(config: Config, allow: Sequence[str], held: ExitStack) -> Resumed | None:
    """What to go on with in ``config.output``; None for a run that is new. ``held`` keeps the folder locked.

    ``allow`` names the settings that may differ from those the run began with. Raises UserError for a folder that
    is no run, one that another process has, a run that is finished, changed settings and damaged checkpoints.
    """
    folder = config.output
    if folder is None or not folder.exists():
        if allow:
            raise UserError(f"--allow {','.join(allow)} is for a run that goes on; name its folder with --resume")
        return None
    if not _is_run(folder):
        raise UserError(f"the output folder {folder} exists; choose another or remove it")
    held.enter_context(RunLock(folder))
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    found = checkpoints.latest()
    if found.checkpoint is None:
        if found.faults:
            raise UserError(f"{found.faults[0]}, nor is any other; remove {folder} to begin again")
        return Resumed(folder, None)
    _refuse_finished(folder, found.checkpoint, config)
    _refuse_changed(folder, found.checkpoint, config, allow)
    checkpoints.set_aside(found.checkpoint.step)
    steps = f"; going on from the one of step {found.checkpoint.step}"
    return Resumed(folder, found.checkpoint, tuple(fault + steps for fault in found.faults))


def saved_values(folder: Path) -> dict[str, Any]:
    """The settings of the run in ``folder``, unchecked. Raises UserError."""
    path = folder / CONFIG
    if (folder / TRAIN_MATH).exists():
        raise UserError(f"{folder} is a run of train_math; resume it with: {how_to_resume(folder)}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder} is no run folder ({path.name} cannot be read); give the folder of a run") from error
    check_config(values, str(path))
    return {**values, "output": folder}


def changed_versions(then: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """A sentence on what the run was computed with and is not now; None if there is no difference."""
    differing = [f"{k} {then.get(k)} -> {now.get(k)}" for k in sorted({*then, *now}) if then.get(k) != now.get(k)]
    if not differing:
        return None
    return (
        f"not the same code or platform as before ({', '.join(differing)}): from here on bits may differ from a run "
        "in one go"
    )


def _is_run(folder: Path) -> bool:
    """Whether it holds a run, or was just made for one."""
    if not folder.is_dir():
        return False
    return (folder / CONFIG).is_file() or {p.name for p in folder.iterdir()} <= _FIRST


def _refuse_finished(folder: Path, checkpoint: Checkpoint, config: Config) -> None:
    done, then = checkpoint.step, checkpoint.state["config"]["steps"]
    if config.steps < done:
        raise UserError(f"steps is {config.steps} and the run in {folder} has made {done}; set it to {done} or more")
    if (folder / SUMMARY).exists() and done >= then and config.steps == then:
        raise UserError(
            f"the run in {folder} is finished, with {done} steps; choose another output, or train it further with: "
            f"{how_to_resume(folder)} --steps {2 * done} --allow steps"
        )


def _refuse_changed(folder: Path, checkpoint: Checkpoint, config: Config, allow: Sequence[str]) -> None:
    then, now = (dict(_leaves(c)) for c in (checkpoint.state["config"], json.loads(config.model_dump_json())))
    changed = [k for k in sorted({*then, *now}) if then.get(k) != now.get(k) and k not in _FREE]
    if unknown := [name for name in allow if not any(_covers(name, k) for k in {*then, *now})]:
        raise UserError(f"--allow names {unknown[0]!r}, which is no setting; name those that changed, such as steps")
    refused = [k for k in changed if not any(_covers(name, k) for name in allow)]
    if refused:
        what = ", ".join(f"{k} {then.get(k)} -> {now.get(k)}" for k in refused)
        raise UserError(
            f"the run in {folder} began with other settings ({what}); give its own, or allow the change with: "
            f"--allow {shlex.quote(','.join(refused))}"
        )


def _covers(name: str, key: str) -> bool:
    """Whether ``name`` is the setting ``key``, or the section it is in."""
    return key == name or key.startswith(f"{name}.")


def _leaves(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield above + key, value
