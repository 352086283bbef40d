"""The measurements of ``textpolicy validate --train`` that need MLX: peaks, and whether two equal updates are equal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..losses import Surrogate
from ..types import Batch
from .engine import MLXEngine, PolicyObjective
from .state import restore_training_state, training_state


def active_bytes() -> float:
    """Return the bytes of all arrays in memory."""
    return float(mx.get_active_memory())


def measured(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return what ``run`` returns, the seconds that it takes, and the peak memory meanwhile, in bytes."""
    mx.reset_peak_memory()
    started = time.perf_counter()
    result = run()
    return result, time.perf_counter() - started, float(mx.get_peak_memory())


def learn_twice(engine: MLXEngine, batch: Batch, surrogate: Surrogate) -> dict[str, Any]:
    """Return figures of three gradients of ``batch`` and of three updates, of which the last two start alike."""
    gradients = [dict(tree_flatten(engine.gradients(batch, PolicyObjective(surrogate))[1])) for _ in range(3)]
    whole = sum(g.square().sum() for g in gradients[0].values())
    change = sum((a - gradients[0][name]).square().sum() for name, a in gradients[1].items())
    differs = first_difference(gradients[1], gradients[2])
    mx.eval(change, whole)
    del gradients
    mx.reset_peak_memory()
    peak = engine.update(batch, surrogate, 1e-4)["peak_memory_bytes"]
    before = {name: mx.array(value) for name, value in training_state(engine.model, engine.optimizer).items()}
    mx.eval(before)
    after = []
    for _ in range(2):
        restore_training_state(engine.model, engine.optimizer, before, path=Path(engine.model.model_type))
        started = time.perf_counter()
        metrics = engine.update(batch, surrogate, 1e-4)
        seconds = time.perf_counter() - started
        after.append(training_state(engine.model, engine.optimizer))
    differs = differs or first_difference(*after)
    return {
        "gradient_change_when_compiled": float((change / whole).sqrt().item()),
        "bit_for_bit": differs is None,
        **({} if differs is None else {"first_difference": differs}),
        "updated": metrics["updated"] == 1,
        "update_peak_gb": peak / 1e9,
        "update_tokens_per_second": float((batch.weights != 0).sum()) / seconds,
    }


def first_difference(a: Mapping[str, mx.array], b: Mapping[str, mx.array]) -> str | None:
    """Return the first name whose arrays in ``a`` and ``b`` differ in a bit, or that one of them lacks; or None."""
    for name in (*a, *(name for name in b if name not in a)):
        if name not in a or name not in b or (a[name].shape, a[name].dtype) != (b[name].shape, b[name].dtype):
            return name
        x, y = (array[name].reshape(-1).view(mx.uint8) for array in (a, b))
        if not mx.array_equal(x, y).item():
            return name
    return None
