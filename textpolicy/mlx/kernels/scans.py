"""The running sums of Mamba-2's layers, for GPUs.

There MLX 0.32.4 reads and writes beyond an array that it sums along an axis of one element, where that is part of a
longer row (its pull request 4430; benchmarks/upstream/running_sums.py). One completion of one token alone meets it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx_lm.models import ssm


def running_sum(array: mx.array, axis: int) -> mx.array:
    """Return ``mx.cumsum(array, axis)``, which is ``array`` itself if the axis has one element."""
    return array if array.shape[axis] == 1 else mx.cumsum(array, axis=axis)


def ssm_update(*arguments: Any, **named: Any) -> tuple[mx.array, mx.array]:
    """Return mlx-lm's function of this name with ``running_sum`` for ``mx.cumsum``."""
    before = vars(ssm)["mx"]
    vars(ssm)["mx"] = SimpleNamespace(**{**vars(before), "cumsum": running_sum})
    try:
        return _ssm_update(*arguments, **named)
    finally:
        vars(ssm)["mx"] = before


_ssm_update = ssm.ssm_update


def patches() -> Mapping[str, Callable[..., Any]]:
    """Return the function that replaces mlx-lm's of the same name on a GPU; empty on a CPU."""
    return {} if mx.default_device() == mx.Device(mx.cpu) else {"ssm_update": ssm_update}
