"""Rewards as an MLX array, for callers that compute with them."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx


def float_array(values: Sequence[float]) -> mx.array:
    """(B,) float32."""
    return mx.array(list(values), dtype=mx.float32)
