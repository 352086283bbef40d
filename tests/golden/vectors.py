"""How golden vectors are read and compared; each ``check_<file>.py`` beside this runs those of one file.

A check module has ``check(case) -> list[Answer]``, which recomputes what the case expects through the
package's public functions, raises ``UnknownCase`` for a kind it does not know, and may have
``NOT_TARGETS``: {pattern of an expected key: why we do not reproduce it}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np


class UnknownCase(Exception):  # noqa: N818  (it names a case)
    """A vector that no check knows how to run."""


@dataclass(frozen=True)
class Case:
    """One vector; ``inputs``, ``params`` and ``expected`` as the file has them."""

    file: str
    id: str
    inputs: dict[str, Any]
    params: dict[str, Any]
    expected: Any
    tolerance: dict[str, dict[str, float]]

    def array(self, name: str) -> np.ndarray:
        """An input as float64, absent values as NaN."""
        return numbers(self.inputs[name])


@dataclass(frozen=True)
class Answer:
    """The result of our code where the case expects ``key`` ("" for the whole of it)."""

    key: str
    value: Any
    precision: str = "float64"  # or "float32", for MLX: which of the file's tolerances holds
    atol: float | None = None  # instead of it, where the case names a Monte-Carlo tolerance


def read(folder: Path) -> Iterator[Case]:
    """Every vector in ``folder``."""
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        for case in content["cases"]:
            yield Case(path.stem, *(case[k] for k in ("id", "inputs", "params", "expected")), content["tolerance"])


def numbers(value: Any) -> np.ndarray:
    """Nested lists as float64; null and the strings "nan", "inf", "-inf" as what they stand for."""
    if isinstance(value, list):
        return np.array([numbers(v) for v in value], np.float64)
    return np.array(math.nan if value is None else float(value))


def raised(call: Callable[[], Any]) -> str:
    """The name of the built-in error that ``call`` raises, "" for none."""
    try:
        call()
    except ValueError:
        return "ValueError"
    except TypeError:
        return "TypeError"
    return ""


def verify(case: Case, answers: list[Answer], not_targets: dict[str, str]) -> None:
    """Compare every answer, and demand one for every expected key that is a target."""
    assert answers, f"{case.file}/{case.id}: nothing was compared"
    for answer in answers:
        expected = case.expected if answer.key == "" else case.expected[answer.key]
        bounds = {"rtol": 0.0, "atol": answer.atol} if answer.atol is not None else case.tolerance[answer.precision]
        _same(answer.value, expected, bounds, f"{case.file}/{case.id}: {answer.key}")
    if any(answer.key == "" for answer in answers):
        return
    skipped = {"upstream*": "what version 0.1.11 did", **not_targets}
    answered = {answer.key for answer in answers}
    open_keys = [k for k in case.expected if k not in answered and not any(fnmatchcase(k, p) for p in skipped)]
    assert not open_keys, f"{case.file}/{case.id}: nothing checks {', '.join(open_keys)}"


def _same(actual: Any, expected: Any, bounds: dict[str, float], where: str) -> None:
    if isinstance(expected, dict):
        assert set(actual) == set(expected), f"{where}: {sorted(actual)} instead of {sorted(expected)}"
        for key, value in expected.items():
            _same(actual[key], value, bounds, f"{where}.{key}")
    elif _numeric(expected):
        np.testing.assert_allclose(np.asarray(actual, np.float64), numbers(expected), **bounds, err_msg=where)
    elif isinstance(expected, list):
        assert len(actual) == len(expected), f"{where}: {len(actual)} entries instead of {len(expected)}"
        for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
            _same(one, other, bounds, f"{where}[{i}]")
    else:
        assert actual == expected, f"{where}: {actual!r} instead of {expected!r}"


def _numeric(value: Any) -> bool:
    """A number, or a rectangle of them."""
    if isinstance(value, list):
        shapes = {np.shape(v) for v in value if isinstance(v, list)}
        return bool(value) and len(shapes) <= 1 and all(map(_numeric, value))
    return value in ("nan", "inf", "-inf") or (isinstance(value, int | float) and not isinstance(value, bool))
