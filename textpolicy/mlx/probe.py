"""The facts about MLX on this machine that ``textpolicy validate`` reports."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import mlx.core as mx

from .blas import BUSY_ADVICE, SLOW_ADVICE, SLOW_GFLOPS, WAITING_ADVICE, blas_threads, matmul_gflops


def describe_mlx() -> dict[str, Any]:
    """Return version, device and the measured rate of a matrix product, with advice if it is slow."""
    rate = matmul_gflops()
    facts = {
        "available": True,
        "version": version("mlx"),
        "device": "cpu" if mx.default_device() == mx.cpu else "gpu",
        "matmul_gflops": round(rate, 1),
        "fast": rate >= SLOW_GFLOPS,
    }
    remedy = (SLOW_ADVICE, BUSY_ADVICE, WAITING_ADVICE)[min(blas_threads(), 2)]
    return facts if facts["fast"] else {**facts, "advice": f"matrix products are slow; {remedy}"}


def describe_models() -> dict[str, Any]:
    """Return whether the first built-in model is installed, and otherwise how to install it."""
    from .models import MODELS  # here, because it needs more than mlx

    name, entry = next(iter(MODELS.items()))
    if find_spec(entry.package) is not None:
        return {"available": True, "name": name}
    return {"available": False, "name": name, "advice": f"to have a small model to learn with: {entry.install}"}
