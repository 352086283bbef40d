"""A batch as flat arrays, token after token and episode after episode, for losses that users write."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from ..errors import UserError
from ..mlx.score.gradients import Gradients
from ..mlx.score.micro_batches import Layout, logprobs_of, micro_batches, score
from ..types import Batch

# (N,) log-probs of the sampler, (N,) of the policy being trained, (N,) advantages, (B,) tokens of each
# sequence -> a scalar, or metrics
FlatFunction = Callable[[mx.array, mx.array, mx.array, mx.array], Any]


@dataclass(frozen=True, slots=True, eq=False)
class FlatTokens:
    """The N sampled tokens of B sequences in their own order: a user's loss sees all of them and need not be a sum."""

    batch: Batch  # (B, T), every row of which has a sampled token
    old: mx.array  # (N,) float32, of the distribution that sampled the token
    advantages: mx.array  # (N,) float32
    lengths: mx.array  # (B,) int32, sampled tokens of each sequence, 1 or more

    @classmethod
    def of(cls, batch: Batch) -> Self:
        """Rows in which nothing was sampled are left out. Raises UserError if that is all of them."""
        rows = np.flatnonzero(batch.weights.any(axis=1))
        if not len(rows):
            raise UserError("every completion in the buffer is empty; collect some that hold tokens")
        batch = batch.take(rows)
        sampled = batch.weights != 0
        return cls(
            batch=batch,
            old=mx.array(batch.logprobs[sampled]),
            advantages=mx.array(batch.advantages[sampled]),
            lengths=mx.array(sampled.sum(axis=1).astype(np.int32)),
        )

    def apply(self, fn: FlatFunction, logprobs: mx.array) -> Any:
        """``fn`` of the tokens, with (N,) ``logprobs`` for the policy being trained."""
        return fn(self.old, logprobs, self.advantages, self.lengths)

    def weighted(self, slopes: np.ndarray) -> Batch:
        """The batch with (N,) ``slopes`` in place of advantages."""
        advantages = np.zeros(self.batch.weights.shape, np.float32)
        advantages[self.batch.weights != 0] = slopes
        return replace(self.batch, advantages=advantages)


@dataclass(frozen=True, slots=True, eq=False)
class FlatPasses:
    """How ``model`` reads flat tokens: all sequences in one graph, or ``size`` of them at a time."""

    model: nn.Module
    gradients_of: Gradients
    size: int | None  # sequences of a micro-batch; None is all at once
    checkpoint_every: int

    @classmethod
    def of(cls, model: nn.Module, size: int | None, checkpoint_every: int, compiled: bool) -> Self:
        """``compiled`` micro-batches are compiled for shapes that come again."""
        gradients = Gradients(model, checkpoint_every=checkpoint_every, compiled=compiled)
        return cls(model, gradients, size, checkpoint_every)

    def apply(self, tokens: FlatTokens, fn: FlatFunction) -> Any:
        """``fn`` of the tokens, with the log-probs that the model gives them now."""
        now = logprobs_of(self.model, tokens.batch, sys.maxsize, self.size)
        return tokens.apply(fn, mx.array(now[tokens.batch.weights != 0]))

    def gradients(self, tokens: FlatTokens, loss_fn: FlatFunction) -> tuple[float, Any]:
        """The loss L, and its gradients by the trained parameters, whatever the size of micro-batches."""
        loss, grads = self._at_once(tokens, loss_fn) if self.size is None else self._in_parts(tokens, loss_fn)
        mx.eval(loss, grads)
        return float(loss.item()), grads

    def _at_once(self, tokens: FlatTokens, loss_fn: FlatFunction) -> tuple[Any, Any]:
        layout = Layout.build(tokens.batch)
        place = mx.array(np.flatnonzero(layout.rows.weights != 0).astype(np.int32))  # of each token in (B, T)

        def loss(model: nn.Module) -> mx.array:
            logprobs = score(model, layout, checkpoint_every=self.checkpoint_every).reshape(-1)[place]
            return tokens.apply(loss_fn, logprobs)

        return nn.value_and_grad(self.model, loss)(self.model)

    def _in_parts(self, tokens: FlatTokens, loss_fn: FlatFunction) -> tuple[Any, Any]:
        """dL = sum_n s_n d log p_n with s_n = dL / d log p_n, so the s are taken first and any split has this sum."""
        loss, slopes = self.apply(tokens, mx.value_and_grad(loss_fn, argnums=1))
        grads = None
        for _, layout in micro_batches(tokens.weighted(np.array(slopes)), sys.maxsize, self.size):
            _, grad = self.gradients_of(layout, weighted_sum)
            grads = grad if grads is None else tree_map(mx.add, grads, grad)
            mx.eval(grads)
        return loss, grads


def weighted_sum(logprobs: mx.array, rows: Any) -> tuple[mx.array, dict[str, mx.array]]:
    """An objective: log-probs times the rows' advantages."""
    return (logprobs * rows.advantages).sum(), {}


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
