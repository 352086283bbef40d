"""Write settings, durations and the order of names as people do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from .._system.terminal import counted

_ALONE = ("algorithm.name", "task", "model")  # settings whose value says enough


def natural(value: Any) -> tuple[int, float, list[tuple[int, str]]]:
    """Return a key that orders numbers by size and words by the numbers in them, r2 before r10; nothing comes first."""
    if isinstance(value, int | float):
        return 1, value, []
    parts = re.split(r"0*([0-9]+)", "" if value is None else str(value))
    # numbers by their length first, for int() refuses those of thousands of digits
    return (0 if value is None else 2), 0.0, [(len(part) if i % 2 else 0, part) for i, part in enumerate(parts)]


def duration(seconds: float) -> str:
    """Return a time in one or two units: 0.4 s, 45 s, 4 min 43 s, 25 min, 1 h 2 min, 2 d 3 h."""
    if not isfinite(seconds):
        return "unknown"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole, minutes = round(seconds), round(seconds / 60)
    if whole < 60 or (600 <= whole < 3600 and minutes < 60):
        return f"{whole} s" if whole < 60 else f"{minutes} min"
    (count, rest), units = divmod(whole, 60), ("min", "s")
    if whole >= 600:
        (count, rest), units = divmod(minutes, 60), ("h", "min")
    if minutes >= 1440:
        (count, rest), units = divmod(round(seconds / 3600), 24), ("d", "h")
    return f"{count} {units[0]} {rest} {units[1]}" if rest else f"{count} {units[0]}"


def setting(name: str, value: Any, among: Sequence[str] = ()) -> str:
    """Return a flat setting in words, short where no other of those ``among`` which it stands ends alike."""
    shown = str(value)
    if value is None:
        shown = "by default"
    elif isinstance(value, bool):
        shown = "on" if value else "off"
    elif isinstance(value, float):
        shown = f"{value:g}"
    elif isinstance(value, list | tuple):
        shown = ", ".join(map(str, value)) or "none"
    if name in _ALONE:
        return f"{name.split('.')[0]} {shown}" if value is None else shown
    last = name.rpartition(".")[2]
    alike = sum(other.rpartition(".")[2] == last for other in among) > 1
    return f"{(name if alike else last).replace('_', ' ').replace('.', ' ')} {shown}"


def folder_names(folders: Sequence[Path]) -> list[str]:
    """Return the ends of the ``folders``' paths, with as many parts as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def title_of(settings: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Return the title of runs with these flat ``settings``, in arms with these ``names``."""
    tasks = {str(s["task"]) for s in settings if s.get("task")}
    what = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    if len(names) > 3:
        what = f"{len(names)} settings compared"
    return f"{what} on {tasks.pop()}" if len(tasks) == 1 else what


def in_points(*shares: float, sign: str = "", decimals: int = 1) -> list[str]:
    """Return shares as percentage points, with more ``decimals`` where different ones, or 0 and another, look alike."""
    points = [100 * share + 0.0 for share in shares]
    for digits in range(decimals, 14):
        texts = [f"{x:{sign}.{digits}f}" for x in points]
        if len({0.0, *map(float, texts)}) == len({0.0, *points}):
            break
    return [text.replace("-", "+" if sign else "") if float(text) == 0 else text for text in texts]


def stage_line(stage: Mapping[str, Any]) -> str:
    """Return what was measured at the end of a stage, an entry of ``RecordedRun.stages``, in words."""
    names = {
        "accuracy": "of the validation problems right, greedy",
        "loss": "nats per token on held-out demonstrations",
    }
    told = []
    for name in [name for name in stage if name not in ("stage", "steps", "end")]:
        value = f"{stage[name]:.3f}" if name == "loss" else f"{stage[name]:.1%}"
        told.append(f"{value} {names[name]}" if name in names else f"{name} {value}")
    return f"after {stage['stage']}, {counted(stage['steps'], 'step')}: {', '.join(told) or 'not evaluated'}"
