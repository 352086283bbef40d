"""A batch as flat arrays, token after token and episode after episode, for losses that users write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import UserError
from ..types import Batch
from .scoring import Layout, score

# (N,) log-probs of the sampler, (N,) of the policy being trained, (N,) advantages, (B,) tokens of each
# sequence -> a scalar, or metrics
FlatFunction = Callable[[mx.array, mx.array, mx.array, mx.array], Any]


@dataclass(frozen=True, slots=True, eq=False)
class FlatTokens:
    """The N sampled tokens of a batch in its own order, all in one graph: a user's loss need not be a sum."""

    layout: Layout
    place: mx.array  # (N,) int32, of each token in the flattened (B, T) log-probs
    old: mx.array  # (N,) float32, of the distribution that sampled the token
    advantages: mx.array  # (N,) float32
    lengths: mx.array  # (B,) int32, sampled tokens of each sequence, 1 or more

    @classmethod
    def of(cls, batch: Batch) -> Self:
        """Rows in which nothing was sampled are left out. Raises UserError if that is all of them."""
        rows = np.flatnonzero(batch.weights.any(axis=1))
        if not len(rows):
            raise UserError("every completion in the buffer is empty; collect some that hold tokens")
        layout = Layout.build(batch.take(rows))
        sampled = layout.rows.weights != 0
        return cls(
            layout=layout,
            place=mx.array(np.flatnonzero(sampled).astype(np.int32)),
            old=mx.array(layout.rows.logprobs[sampled]),
            advantages=mx.array(layout.rows.advantages[sampled]),
            lengths=mx.array(sampled.sum(axis=1).astype(np.int32)),
        )

    def apply(self, model: nn.Module, fn: FlatFunction) -> Any:
        """``fn`` of the tokens, with the log-probs that ``model`` gives them now."""
        return fn(self.old, score(model, self.layout).reshape(-1)[self.place], self.advantages, self.lengths)

    def gradients(self, model: nn.Module, loss_fn: FlatFunction) -> tuple[float, Any]:
        """The loss, and its gradients by the trainable parameters of ``model``."""
        loss, grads = nn.value_and_grad(model, lambda m: self.apply(m, loss_fn))(model)
        mx.eval(loss, grads)
        return float(loss.item()), grads


def advantages_per_group(
    advantage_fn: Callable[[mx.array], Any], rewards: np.ndarray, groups: np.ndarray
) -> np.ndarray:
    """(B,) float32: ``advantage_fn`` of the scored rewards of each group; no group sees another's.

    ``rewards`` (B,) float32 are NaN where unscorable: those get 0 and are not shown to ``advantage_fn``.
    """
    scored = ~np.isnan(rewards)
    out = np.zeros(len(rewards), np.float32)
    for group in np.unique(groups[scored]):
        members = scored & (groups == group)
        values = np.asarray(advantage_fn(mx.array(rewards[members])))
        if values.shape != (members.sum(),) or not np.isfinite(values).all():
            raise UserError(
                f"advantage_fn made {values.tolist()} of the rewards {rewards[members].tolist()} of a group; "
                "return one finite number for each"
            )
        out[members] = values
    return out


def transformed(transform: Callable[[mx.array, Any], Any], advantages: np.ndarray, batch: dict[str, Any]) -> np.ndarray:
    """(N,) float32 -> (N,): what a user's transform makes of the advantages. Raises UserError for another shape."""
    values = np.asarray(transform(mx.array(advantages), batch))
    if values.shape != advantages.shape or not np.isfinite(values).all():
        raise UserError(
            f"advantage_transform_fn made an array {values.shape} of {advantages.shape} advantages, or one that is "
            "not finite; return one finite number for each token"
        )
    return values.astype(np.float32)


def mlx_arrays(data: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` with MLX arrays in place of NumPy's."""
    return {name: mx.array(value) if isinstance(value, np.ndarray) else value for name, value in data.items()}
