"""The flat arrays of a batch, token after token and episode after episode, for losses that users write."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from ..errors import UserError
from ..mlx.kernels.plain import plain_operations
from ..mlx.score.micro_batches import Gradients, Layout, logprobs_of, micro_batches, score
from ..types import Batch, Episode

# (N,) log-probs of the sampler, (N,) of the policy being trained, (N,) advantages, (B,) tokens of each
# sequence -> a scalar, or metrics
FlatFunction = Callable[[mx.array, mx.array, mx.array, mx.array], Any]


@dataclass(frozen=True, slots=True, eq=False)
class FlatTokens:
    """The N sampled tokens of B sequences in order: a user's loss sees all of them and need not be a sum."""

    batch: Batch  # (B, T), every row of which has a sampled token
    old: mx.array  # (N,) float32, of the distribution that sampled the token
    advantages: mx.array  # (N,) float32
    lengths: mx.array  # (B,) int32, sampled tokens of each sequence, 1 or more

    @classmethod
    def of(cls, episodes: Sequence[Episode], advantages: np.ndarray) -> Self:
        """Pack the episodes with (N,) ``advantages`` of their sampled tokens, leaving out rows without such tokens.

        Raises UserError if no row has any.
        """
        ends = np.cumsum([int(e.mask.sum()) for e in episodes])
        rows = [np.zeros(len(e.tokens), np.float32) for e in episodes]  # 0 on the prompt
        for row, e, part in zip(rows, episodes, np.split(advantages, ends[:-1]), strict=True):
            row[e.mask] = part
        batch = Batch.pack(episodes, rows)
        kept = np.flatnonzero(batch.weights.any(axis=1))
        if not len(kept):
            raise UserError("every completion in the buffer is empty; collect some that hold tokens")
        batch = batch.take(kept)
        sampled = batch.weights != 0
        return cls(
            batch=batch,
            old=mx.array(batch.logprobs[sampled]),
            advantages=mx.array(batch.advantages[sampled]),
            lengths=mx.array(sampled.sum(axis=1).astype(np.int32)),
        )

    def apply(self, fn: FlatFunction, logprobs: mx.array) -> Any:
        """Return ``fn`` of the tokens, with (N,) ``logprobs`` for the policy being trained."""
        return fn(self.old, logprobs, self.advantages, self.lengths)


@dataclass(frozen=True, slots=True, eq=False)
class FlatPasses:
    """The passes of ``model`` over flat tokens: all sequences in one graph, or ``size`` of them at a time."""

    model: nn.Module
    gradients_of: Gradients
    size: int | None  # sequences of a micro-batch; None is all at once
    checkpoint_every: int

    def apply(self, tokens: FlatTokens, fn: FlatFunction) -> Any:
        """Return ``fn`` of the tokens, with the log-probs that the model gives them now."""
        now = logprobs_of(self.model, tokens.batch, sys.maxsize, self.size)
        return tokens.apply(fn, mx.array(now[tokens.batch.weights != 0]))

    @plain_operations()
    def gradients(self, tokens: FlatTokens, loss_fn: FlatFunction) -> tuple[float, Any]:
        """Return the loss L and its gradients by the trainable parameters, which no micro-batch size changes.

        In micro-batches dL = sum_n s_n d log p_n with s_n = dL / d log p_n: the s are computed first, and any split
        has the same sum.
        """
        if self.size is None:
            layout = Layout.build(tokens.batch)
            place = mx.array(np.flatnonzero(layout.rows.weights != 0).astype(np.int32))  # of each token in (B, T)

            def loss_of(model: nn.Module) -> mx.array:
                logprobs = score(model, layout, checkpoint_every=self.checkpoint_every).reshape(-1)[place]
                return tokens.apply(loss_fn, logprobs)

            loss, grads = nn.value_and_grad(self.model, loss_of)(self.model)
        else:
            loss, slopes = self.apply(tokens, mx.value_and_grad(loss_fn, argnums=1))
            weighted = np.zeros(tokens.batch.weights.shape, np.float32)
            weighted[tokens.batch.weights != 0] = np.array(slopes)
            grads = None
            for _, layout in micro_batches(replace(tokens.batch, advantages=weighted), sys.maxsize, self.size):
                _, grad = self.gradients_of(layout, weighted_sum)
                grads = grad if grads is None else tree_map(mx.add, grads, grad)
                mx.eval(grads)
        mx.eval(loss, grads)
        return float(loss.item()), grads


def weighted_sum(logprobs: mx.array, rows: Any) -> tuple[mx.array, dict[str, mx.array]]:
    """Return the objective sum_n log p_n a_n, with the rows' advantages a."""
    return (logprobs * rows.advantages).sum(), {}


def advantages_per_group(
    advantage_fn: Callable[[mx.array], Any], rewards: np.ndarray, groups: np.ndarray
) -> np.ndarray:
    """Return (B,) float32: ``advantage_fn`` of the scored rewards of each group, one group at a time.

    ``rewards`` (B,) float32 are NaN where unscorable: those get 0 and are not passed to ``advantage_fn``.
    """
    scored = ~np.isnan(rewards)
    out = np.zeros(len(rewards), np.float32)
    for group in np.unique(groups[scored]):
        members = scored & (groups == group)
        values = np.asarray(advantage_fn(mx.array(rewards[members])))
        if values.shape != (members.sum(),) or not np.isfinite(values).all():
            raise UserError(
                f"advantage_fn returned {values.tolist()} for the rewards {rewards[members].tolist()} of a group; "
                "return one finite number for each"
            )
        out[members] = values
    return out


def transformed(transform: Callable[[mx.array, Any], Any], advantages: np.ndarray, batch: dict[str, Any]) -> np.ndarray:
    """Return (N,) float32: a user's transform of (N,) advantages. Raises UserError for another shape."""
    values = np.asarray(transform(mx.array(advantages), batch))
    if values.shape != advantages.shape or not np.isfinite(values).all():
        raise UserError(
            f"advantage_transform_fn returned an array {values.shape} for {advantages.shape} advantages, or one that "
            "is not finite; return one finite number for each token"
        )
    return values.astype(np.float32)


def mlx_arrays(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``data`` with MLX arrays in place of NumPy arrays."""
    return {name: mx.array(value) if isinstance(value, np.ndarray) else value for name, value in data.items()}
