"""Results as values that JSON has."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from math import isfinite
from typing import Any


def plain(value: Any) -> Any:
    """Dataclasses as dicts, tuples as lists; a number that is infinite or NaN, which JSON lacks, as None."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not isfinite(value) else value
