"""The running sums down an axis that is not the last, as Mamba-2's layers take them, for GPUs.

There MLX 0.32.4 computes such a sum in blocks, of which it starts too many for some shapes: these read and write beyond
the array (benchmarks/upstream/running_sums.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx_lm.models import ssm


def running_sum(array: mx.array, axis: int) -> mx.array:
    """Return ``mx.cumsum(array, axis)``, by sums along the last axis of a copy, as is its gradient."""

    @mx.custom_function
    def added(array: mx.array) -> mx.array:
        return mx.cumsum(mx.contiguous(array.swapaxes(axis, -1)), axis=-1).swapaxes(axis, -1)

    @added.vjp
    def backward(array: mx.array, slope: mx.array, _: mx.array) -> mx.array:
        return mx.cumsum(mx.contiguous(slope.swapaxes(axis, -1)), axis=-1, reverse=True).swapaxes(axis, -1)

    result: Any = added(array)
    return result


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
