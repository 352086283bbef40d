"""The log-probs of a prompt in one prefill, and of tokens in its places: the likeliest, given ones, or ones drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...engine import Sampling
from ...errors import UserError
from ...serving import Alternatives, Read
from ...types import Bools, Floats, Ints, token_ids
from ..decode.sampling import Sampler, uniforms
from ..engine import pass_patches
from ..kernels.patching import patched
from ..kernels.plain import plain_operations
from ..read.context import Context
from ..score.logprobs import Split, tokens_at_once

_STREAM = 2**32  # of random numbers, which no completion of a request has
ABSENT = -99999.0  # the log-prob of an alternative that is not there


def likeliest(logprobs: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Return the k likeliest tokens (R, k) int32 of (R, V) ``logprobs``, most likely first, and their log-probs."""
    some = mx.argpartition(-logprobs, kth=k - 1, axis=-1)[:, :k] if k < logprobs.shape[-1] else None
    found = mx.argsort(-logprobs, axis=-1) if some is None else some
    values = mx.take_along_axis(logprobs, found, axis=-1)
    order = mx.argsort(-values, axis=-1)
    return mx.take_along_axis(found, order, axis=-1).astype(mx.int32), mx.take_along_axis(values, order, axis=-1)


@dataclass(frozen=True, slots=True)
class Drawing:
    """The K draws at each of N positions."""

    sampler: Sampler
    uniform: Floats  # (N, K) float32 in [0, 1)

    @classmethod
    def of(cls, k: int, sampling: Sampling, n: int) -> Self:
        """Return draws by the temperature and seed of ``sampling``, of every token."""
        uniform = uniforms(sampling.seed, _STREAM, n * k).reshape(n, k)
        return cls(Sampler(Sampling(1, temperature=sampling.temperature)), uniform)


@plain_operations()
def read(
    model: nn.Module,
    vocabulary: int,
    prompt: Ints,
    top: int,
    targets: Ints | None,
    last: Bools | None,
    drawing: Drawing | None = None,
) -> Read:
    """Return the log-probs of ``prompt`` (P,), as ``serving.Model.read`` says. Raises UserError."""
    size, k = len(prompt), min(top, vocabulary)
    if targets is not None and (targets.ndim != 2 or len(targets) != size - 1):
        raise UserError(
            f"the targets of a prompt of {size} tokens have the shape {targets.shape}; give ({size - 1}, K)"
        )
    if targets is not None:
        token_ids(np.maximum(targets, 0).reshape(-1), vocabulary)
    first = 1 if last is None else max(1, size - int(last.sum()))  # of those that are scored
    begin = first if targets is None and drawing is None else 1  # of those that are read
    logprobs = np.full(size, np.nan, np.float32)
    ids, values = np.zeros((size, k), np.int32), np.full((size, k), ABSENT, np.float32)
    asked = None if targets is None else np.zeros(targets.shape, np.float32)
    drawn = None
    if drawing is not None:
        drawn = Alternatives(np.zeros(drawing.uniform.shape, np.int32), np.zeros(drawing.uniform.shape, np.float32))
    if begin < size:
        split, context = Split.of(model), Context(model)
        with patched(model, pass_patches()):
            hidden = context.read(split.body, mx.array(prompt[:-1])[None])[0]  # (P - 1, D)
            rows = tokens_at_once(vocabulary)
            for a in range(begin, size, rows):
                b = min(a + rows, size)
                z = split.head(hidden[a - 1 : b - 1]).astype(mx.float32)
                l = z - mx.logsumexp(z, axis=-1, keepdims=True)  # (rows, V)
                logprobs[a:b] = np.array(mx.take_along_axis(l, mx.array(prompt[a:b, None]), axis=-1)[:, 0])
                if k:
                    ids[a:b], values[a:b] = (np.array(part) for part in likeliest(l, k))
                if asked is not None and targets is not None:
                    wanted = targets[a - 1 : b - 1]
                    found = mx.take_along_axis(l, mx.array(np.maximum(wanted, 0)), axis=-1)
                    asked[a - 1 : b - 1] = np.where(wanted >= 0, np.array(found), 0)
                if drawing is not None and drawn is not None:
                    uniform = drawing.uniform[a - 1 : b - 1]
                    state = mx.array(np.repeat(np.arange(b - a), uniform.shape[1]))
                    tokens = drawing.sampler(z, state, mx.array(uniform.reshape(-1))).tokens.reshape(uniform.shape)
                    drawn.tokens[a - 1 : b - 1] = np.array(tokens)
                    drawn.logprobs[a - 1 : b - 1] = np.array(mx.take_along_axis(l, tokens, axis=-1))
    logprobs[:first] = np.nan
    ids[:first], values[:first] = 0, ABSENT
    return Read(logprobs, Alternatives(ids, values) if k else None, asked, drawn)
