"""Read the entries of an example: right answers, lists of texts, cells that hold nothing."""

from __future__ import annotations

import numbers
import reprlib
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

from ..errors import UserError

REFERENCES = ("answer", "label", "ground_truth")  # entries that may hold the correct answer, the first that is there


def references(example: Mapping[str, Any], names: Sequence[str] = REFERENCES) -> list[str]:
    """Return the right answers of ``example``, as texts: its first entry of ``names`` that holds anything.

    A list holds answers of which each is right. Raises UserError when there is none, or one is neither text nor number.
    """
    for value in (example.get(name) for name in names):
        listed = value.tolist() if isinstance(value, np.ndarray) else value
        found = list(listed) if isinstance(listed, list | tuple | Set) else [listed]
        answers = [a for a in found if not missing(a) and not (isinstance(a, str) and not a.strip())]
        if strange := [a for a in answers if not isinstance(a, str | numbers.Number | np.generic)]:
            raise UserError(
                f"the reference {shown(strange[0])} is a {type(strange[0]).__name__}; give a text, a number, or "
                "a list of those of which each is right"
            )
        if answers:  # a column of whole numbers with a cell missing is read as one of floats
            return [str(int(a) if isinstance(a, float) and a.is_integer() else a) for a in answers]
    raise UserError(f"the example {shown(dict(example))} has no correct answer; give it the entry {names[0]!r}")


def texts(name: str, value: Any) -> list[str]:
    """Return the list of texts that ``name`` holds, none if it is missing. Raises UserError for anything else."""
    listed = value.tolist() if isinstance(value, np.ndarray) else value
    if missing(listed):
        return []
    if not isinstance(listed, list | tuple | Set) or not all(isinstance(t, str) and t.strip() for t in listed):
        raise UserError(f"{name} is {shown(value)}; give a list of texts, such as ['sun', 'moon']")
    return list(listed)


def missing(cell: Any) -> bool:
    """Return whether a cell holds nothing: None, or NaN in any of its kinds (float, NaT, pandas.NA, Decimal)."""
    if cell is None or isinstance(cell, str | Sequence | Mapping | np.ndarray):
        return cell is None
    same = cell == cell  # only what stands for nothing differs from itself; pandas.NA does not even say
    return type(same).__name__ == "NAType" or (isinstance(same, bool | np.bool_) and not same)


def shown(value: Any) -> str:
    """Return ``value`` as errors show it, in one line and shortened."""
    return " ".join(reprlib.repr(value).split())
