"""Resume a run that was cut short: check its folder and settings, and find the checkpoint to start from."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import model_validator

from .._system.faults import TRAIN_MATH, how_to_resume
from .._system.files import names, read_object
from .._system.lock import LOCK, RunLock
from .._system.terminal import counted
from ..config.settings import MONEY, Config, LocalPath, Positional, PositiveInt, check_config
from ..errors import UserError
from ..record.layout import CONFIG, EVALS, METRICS, REPORT, ROLLOUTS, SUMMARY, TASK, VERSIONS, parquet_files
from ..record.reader import ended
from .checkpoint import Checkpoint, Checkpoints

CHECKPOINTS = "checkpoints"
QUESTIONS = "questions"  # the entry of a run's versions with the digest of its task
BASE = "model "  # what the entries with digests of its base begin with
_ALWAYS = {"model", "task", "steps", "seed", "algorithm", "rollout"}  # in the config of a run of any version
_BEFORE_CONFIG = {LOCK, TASK, VERSIONS, *(f".{name}.new" for name in (TASK, VERSIONS, CONFIG))}  # files of a new run
_STEP, _LATER = re.compile(rb'"kind":\s*"train"'), re.compile(rb'"step":\s*[1-9]')  # in rows of metrics, if damaged
# settings without effect on the numbers
_FREE = ("output", "quiet", "machine.devices", "machine.deadline", *(f"tinker.{name}" for name in MONEY))


@dataclass(frozen=True, slots=True)
class Resumed:
    """The folder of a run to resume."""

    folder: Path
    checkpoint: Checkpoint | None  # None: the run was cut short before its first, and begins again
    remarks: tuple[str, ...] = ()  # to print


class TrainArguments(Config):
    """Train a model, or resume a run that was cut short."""

    config_file: Annotated[LocalPath | None, Positional] = None
    """TOML file of settings, which flags override."""
    resume: LocalPath | None = None
    """Resume the run in this folder, with its own settings."""
    allow: tuple[str, ...] = ()
    """With resume: settings that may differ from the run's own, such as steps,machine.threads, or sections."""
    dry_run: bool = False
    """With engine tinker: print what the run may cost, and exit."""
    expected_tokens: PositiveInt | None = None
    """In a dry run: also price episodes of this length."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.dry_run and self.engine != "tinker":
            raise ValueError(f"dry_run is for engine tinker, where tokens cost money, and engine is {self.engine}")
        if self.resume is not None and self.output is not None and self.output != self.resume:
            raise ValueError(f"output is {self.output} and resume {self.resume}; give one of them")
        return self

    @property
    def config(self) -> Config:
        """The settings of the run alone; those that were not given stay unset."""
        given = self.model_dump(exclude_unset=True, include={*Config.model_fields})
        return Config.model_validate(given if self.resume is None else {**given, "output": self.resume})


def reopen(
    config: Config, questions: str, base: Callable[[], Mapping[str, str]], allow: Sequence[str], held: ExitStack
) -> Resumed | None:
    """Return the run in ``config.output`` to resume, None for a new run. ``held`` keeps the folder locked.

    ``allow`` names the settings that may differ from those the run began with; "task" those, too, whose ``questions``,
    the digest of the task, differ, and "model" a model that is not what it was. ``base`` returns digests of that; if
    they are equal, it may have moved. Raises UserError for another kind of folder, a run that another process has or
    that is finished, changed settings and damaged checkpoints.
    """
    folder = config.output
    if folder is None or not os.path.exists(folder):
        if allow:
            raise UserError(f"--allow {','.join(allow)} needs a run to resume; name its folder with --resume")
        return None
    if not folder.is_dir() or not is_run(folder):
        raise UserError(f"the output folder {folder} exists; choose another or remove it")
    held.enter_context(RunLock(folder))
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    found = checkpoints.latest()
    if found.checkpoint is None:
        if found.faults:
            raise UserError(f"{found.faults[0]}, nor is any other; remove {folder} to begin again")
        if has_trained(folder):
            state = "is finished" if (folder / SUMMARY).exists() else "has made steps"
            raise UserError(
                f"the run in {folder} {state} and its checkpoints are gone, so it cannot resume; choose another output"
            )
        return Resumed(folder, None)
    done, began = found.checkpoint.step, found.checkpoint.state["config"]
    if config.steps < done:
        raise UserError(f"steps is {config.steps} and the run in {folder} has made {done}; set it to {done} or more")
    made = max(done, len(_STEP.findall(_metrics(folder))))
    if ended(folder) and config.steps <= made:
        raise UserError(
            f"the run in {folder} is finished, with {counted(made, 'step')}; choose another output, or train it "
            f"further with: {how_to_resume(folder)} --steps {2 * made} --allow steps"
        )
    new, now = (dict(leaves(json.loads(c.model_dump_json()))) for c in (Config(), config))
    then = {**new, **dict(leaves(began))}  # a setting that is younger than the run had its default
    asked = found.checkpoint.state["versions"].get(QUESTIONS, questions)
    if asked != questions:
        then["task"], now["task"] = (f"{x['task']} with questions {d}" for x, d in ((then, asked), (now, questions)))
    if other := other_base(found.checkpoint.state["versions"], digests := base()):
        then["model"], now["model"] = f"{then['model']} as it was", f"{now['model']} with another {other}"
    elif digests and {*digests} <= {*found.checkpoint.state["versions"]}:
        then["model"] = now["model"]
    refused = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key) and key not in _FREE]
    for name in allow:  # a setting, or a section of them
        if not any(f"{key}.".startswith(f"{name}.") for key in {*then, *now}):
            raise UserError(f"--allow names {name!r}, which is not a setting; name those that changed, such as steps")
        refused = [key for key in refused if not f"{key}.".startswith(f"{name}.")]
    if refused:
        changes = ", ".join(f"{key} {then.get(key)} -> {now.get(key)}" for key in refused)
        raise UserError(
            f"the run in {folder} began with other settings ({changes}); use those, or allow the change with: "
            f"--allow {shlex.quote(','.join(refused))}"
        )
    checkpoints.set_aside(done)
    return Resumed(folder, found.checkpoint, tuple(f"{fault}; resuming from step {done}" for fault in found.faults))


def is_run(folder: Path) -> bool:
    """Return whether ``folder`` is empty or a run's.

    A run's has two of its settings, versions and checkpoints, or what one that was cut short had before its settings.
    Raises UserError for a folder that cannot be read.
    """
    try:
        found = names(folder)
    except OSError as error:
        raise UserError(f"the output folder {folder} cannot be read ({error.strerror}); choose another") from error
    if not found or (LOCK in found and found <= _BEFORE_CONFIG):
        return True
    settled = False
    with suppress(UserError):  # damaged
        settled = (read_object(folder / CONFIG, "") or {}).keys() >= _ALWAYS
    return settled + (VERSIONS in found) + bool(Checkpoints(folder / CHECKPOINTS).steps()) >= 2


def has_trained(folder: Path) -> bool:
    """Return whether the run in ``folder`` has left anything that only a run with a checkpoint writes."""
    if any((folder / name).exists() for name in (SUMMARY, REPORT, "adapter")):
        return True
    evaluated = (path for path in parquet_files(folder / EVALS) if not path.stem.endswith("-000000"))
    if any(parquet_files(folder / ROLLOUTS)) or any(evaluated):
        return True
    rows = _metrics(folder)
    return bool(_STEP.search(rows) or _LATER.search(rows))


def _metrics(folder: Path) -> bytes:
    return path.read_bytes() if (path := folder / METRICS).is_file() else b""


def saved_values(folder: Path) -> dict[str, Any]:
    """Return the settings of the run in ``folder`` to resume it with. Raises UserError."""
    if (folder / TRAIN_MATH).exists():
        raise UserError(f"{folder} is a run of train_math; resume it with: {how_to_resume(folder)}")
    return {**saved_settings(folder), "output": folder}


def saved_settings(folder: Path) -> dict[str, Any]:
    """Return the settings that the run in ``folder`` wrote, checked. Raises UserError."""
    path = folder / CONFIG
    values = read_object(path, "restore it, or give the folder of another run")
    if values is None:
        raise UserError(f"{folder} is not a run folder (it has no {path.name}); give the folder of a run")
    check_config(values, str(path))
    return values


def other_base(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return the parts of a run's base, such as "chat template, weights", whose digests changed; "" if none did."""
    return ", ".join(k.removeprefix(BASE) for k in now if k.startswith(BASE) and then.get(k, now[k]) != now[k])


def changed_versions(then: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Return a sentence on the versions that changed since the run began; None if none did."""
    differing = [f"{k} {then.get(k)} -> {now.get(k)}" for k in sorted({*then, *now}) if then.get(k) != now.get(k)]
    if not differing:
        return None
    return (
        f"not the same code or platform as before ({', '.join(differing)}): from here on bits may differ from an "
        "uninterrupted run"
    )


def leaves(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting as its dotted name and value."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{key}.")
        else:
            yield above + key, value
