"""The divergence of a teacher's distribution from the policy's, without an array of [tokens, vocabulary].

One chunk of tokens at a time goes through both heads, and yields d D / d hidden with D, as log-probs do (logprobs.py).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...losses import divergence
from ..kernels.gathers import take_rows
from ..kernels.patching import parameters
from .logprobs import Split, tokens_at_once
from .micro_batches import Layout, hidden_states


def token_divergences(
    student: Split,
    hidden: mx.array,
    teacher: Split,
    theirs: mx.array,
    temperatures: mx.array,
    beta: float,
    at_once: int | None = None,
) -> mx.array:
    """Return D_beta (N,) after hidden states (N, D) of the student and (N, E) of the teacher, ``at_once`` at a time.

    Its gradient is that of the student alone. By default there are half as many tokens in a chunk as for log-probs,
    since they have logits of two heads.
    """
    rows = at_once or max(1, tokens_at_once(student.head(hidden[:1]).shape[-1]) // 2)
    trained = student.trained()
    chunks: list[mx.array] = []
    for a, b in pairwise([*range(0, len(hidden), rows), len(hidden)]):
        h = hidden[a:b]
        if chunks:  # wait for the chunk before, so that their logits are never alive together
            [h] = mx.depends([h], [chunks[-1]])
        chunks.append(_chunk(student, trained, h, teacher, theirs[a:b], temperatures[a:b, None], beta))
    return mx.concatenate(chunks)


def _chunk(
    student: Split,
    trained: dict[str, mx.array],
    hidden: mx.array,
    teacher: Split,
    theirs: mx.array,
    temperatures: mx.array,
    beta: float,
) -> mx.array:
    def forward(trained: dict[str, mx.array], hidden: mx.array) -> mx.array:
        q = nn.log_softmax(teacher.head(theirs).astype(mx.float32) / temperatures)
        with parameters(student.model, trained):
            p = nn.log_softmax(student.head(hidden).astype(mx.float32) / temperatures)
        return divergence(p, mx.stop_gradient(q), beta, mx)

    if trained:  # the backward pass makes the logits again
        recomputed: Any = mx.checkpoint(forward)
        return recomputed(trained, hidden)

    def summed(hidden: mx.array) -> tuple[mx.array, mx.array]:
        found = forward({}, hidden)
        return found.sum(), found

    @mx.custom_function
    def scored(hidden: mx.array) -> list[mx.array]:
        (_, found), slopes = mx.value_and_grad(summed)(hidden)
        return [found, slopes]

    @scored.vjp
    def backward(hidden: mx.array, weights: list[mx.array], out: list[mx.array]) -> mx.array:
        return (weights[0][:, None] * out[1].astype(mx.float32)).astype(hidden.dtype)

    both: Any = scored(hidden)
    return both[0]


def divergences(
    model: nn.Module, layout: Layout, teacher: nn.Module, theirs: mx.array, beta: float, checkpoint_every: int = 0
) -> mx.array:
    """Return (B, T) D_beta at the rows' sampled targets, 0 elsewhere; ``theirs`` (N, E) are of ``teacher_states``."""
    hidden, temperatures = hidden_states(model, layout, checkpoint_every), mx.array(layout.temperatures)
    found = token_divergences(Split.of(model), hidden, Split.of(teacher), theirs, temperatures, beta)
    grid = mx.concatenate([found, mx.zeros(1)])[mx.array(layout.place)]
    return take_rows(grid, mx.array(layout.which))


def teacher_states(teacher: nn.Module, layout: Layout, read: Layout) -> mx.array:
    """Return the teacher's hidden states (N, E) before the N sampled tokens of ``layout``, in their order.

    ``read`` is the layout of the same rows after the teacher's own prompts; from the first sampled token on both are
    alike.
    """
    ours, theirs = layout.place[layout.which], read.place[read.which]
    live = layout.rows.weights != 0
    order = np.zeros(len(layout.targets), np.int32)
    order[ours[live]] = theirs[live]
    return hidden_states(teacher, read)[mx.array(order)]
