"""What trackers are told: the numbers of a step or a look under one naming, the settings as a flat dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...loop.metrics import Row

INSTALL = "textpolicy[trackers]"
_BESIDE = ("kind", "step", "split")  # of a row of metrics.jsonl: what it is of, not figures


def of_step(row: Row) -> dict[str, float]:
    """{"train/reward_mean": ...} for every number of a training step but its own."""
    return {f"train/{name}": float(value) for name, value in row.items() if name not in _BESIDE}


def of_look(split: str, row: Mapping[str, Any]) -> dict[str, float]:
    """{"validation/accuracy": ...} for every number of a look at held-out problems; "@" becomes "_at_"."""
    return {f"{split}/{k.replace('@', '_at_')}": float(v) for k, v in row.items() if k not in _BESIDE}


def flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """{"rollout.group_size": 8, ...}"""
    leaves: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{above}{name}.")
        else:
            leaves[above + name] = value
    return leaves
