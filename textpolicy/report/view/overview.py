"""Sum up runs for the first page: held-out accuracy, settings that are not the defaults, and runs by setting."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...config.settings import Config
from ...doctor.facts import Evaluation
from ...errors import UserError
from ...record.reader import flat
from ..arms import differences
from ..learning import Outcome, outcome
from .runs import ViewedRun

_ALWAYS = ("model", "task", "algorithm.name", "seed")


@dataclass(frozen=True, slots=True)
class Entry:
    """The line of a run in the list of runs."""

    run: ViewedRun
    settings: Mapping[str, Any]
    outcome: Outcome | None
    steps: int
    reward: float | None  # mean of the last step
    error: str = ""  # why the folder cannot be read


@dataclass(frozen=True, slots=True)
class Value:
    """The runs that have one value of one setting."""

    setting: str
    value: Any
    runs: int
    after: Sequence[float]  # held-out accuracy of those that have it


def unusual(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flat settings that are not at their defaults, after the few that name the run."""
    defaults = flat(json.loads(Config().model_dump_json()))
    named = {name: settings[name] for name in _ALWAYS if name in settings}
    return named | {n: v for n, v in settings.items() if v != defaults.get(n) and n not in ("output", "quiet")}


def entries(runs: Sequence[ViewedRun]) -> list[Entry]:
    """Return the lines of the list of runs. One that cannot be read says why."""
    found: list[Entry] = []
    for run in runs:
        try:
            recorded = run.recorded
            rewards = [row.get("reward_mean") for row in recorded.rows if row["kind"] == "train"]
            last = rewards[-1] if rewards else None
            found.append(Entry(run, flat(recorded.config), outcome(recorded), len(rewards), last))
        except UserError as error:
            found.append(Entry(run, {}, None, 0, None, str(error)))
    return found


def by_setting(found: Sequence[Entry]) -> list[Value]:
    """Return what was reached with each value of each setting that differs."""
    readable = [entry for entry in found if not entry.error]
    values: list[Value] = []
    for name in differences([entry.settings for entry in readable]):
        grouped: dict[str, list[Entry]] = {}
        for entry in readable:
            grouped.setdefault(repr(entry.settings.get(name)), []).append(entry)
        for same in sorted(grouped.values(), key=lambda same: _ordered(same[0].settings.get(name))):
            after = [e.outcome.after.rate.value for e in same if e.outcome is not None and e.outcome.after is not None]
            values.append(Value(name, same[0].settings.get(name), len(same), after))
    return values


def arranged(found: Sequence[Entry], column: str, falling: bool) -> list[Entry]:
    """Return the lines ordered by a column: after, before, change, steps, reward, or a setting; unknown ones last."""

    def value(entry: Entry) -> Any:
        match column, entry.outcome:
            case "steps" | "reward", _:
                return getattr(entry, column)
            case "before", Outcome(before=before):
                return before.rate.value
            case "after", Outcome(after=Evaluation() as after):
                return after.rate.value
            case "change", Outcome() as outcome:
                return outcome.points
            case _:
                return entry.settings.get(column)

    known = [entry for entry in found if (v := value(entry)) is not None and v == v]
    rest = [entry for entry in found if entry not in known]
    return sorted(known, key=lambda entry: _ordered(value(entry)), reverse=falling) + rest


def _ordered(value: Any) -> tuple[int, float, str]:
    """Return a key that orders numbers by size, and whatever else by its words."""
    if isinstance(value, int | float):
        return 0, float(value), ""
    return 1, 0.0, str(value)
