"""Draw one token per row, with its exact log-prob and the entropy of the distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ...engine import Sampling
from ..kernels import cuda
from ..kernels.exponentials import exp_without_gradient

_BLOCK = 256  # tokens per partial sum: float32 sums stay short, so the tail is not lost to rounding


class Draw(NamedTuple):
    """The tokens of one decoding step with their log-probs and entropies, (R,) each."""

    tokens: mx.array  # int32
    logprobs: mx.array  # float32, of the distribution drawn from (at temperature 1 when greedy)
    entropy: mx.array  # float32, nats, of the same distribution


class Sampler:
    """The drawing of tokens by the settings of a ``Sampling``: by the kernel of a device, or by MLX's operations.

    ``compiled`` fuses these, once for each shape of the input; None does so on a GPU only.
    """

    def __init__(self, sampling: Sampling, compiled: bool | None = None, kernels: Any = cuda):
        filters = Keep(sampling.top_k, sampling.top_p, sampling.min_p)
        keep = None if filters == Keep() else filters  # None where every token may be drawn
        self._draw: Callable[..., Any] = partial(draw, temperature=sampling.temperature, keep=keep)
        if mx.default_device() == mx.Device(mx.gpu) if compiled is None else compiled:
            self._draw = mx.compile(self._draw)
        self._kernels, self._temperature = kernels, sampling.temperature if keep is None else 0.0  # 0: no kernel

    def __call__(self, logits: mx.array, state: mx.array, uniform: mx.array) -> Draw:
        """Return a token for each of R rows; row r draws from row ``state[r]`` of the (C, V) ``logits``."""
        if self._temperature > 0 and self._kernels.can_draw(logits):
            return Draw(*self._kernels.draw(logits, state, uniform, self._temperature))
        return Draw(*self._draw(logits, state, uniform))


@dataclass(frozen=True, slots=True)
class Keep:
    """The tokens that may be drawn at all; the filters apply in this order, after the temperature."""

    top_k: int = 0  # the k most likely; 0 is all
    top_p: float = 1.0  # the smallest set whose probability reaches it
    min_p: float = 0.0  # those at least this likely compared with the likeliest


def draw(
    logits: mx.array, state: mx.array, uniform: mx.array, temperature: float = 1.0, keep: Keep | None = None
) -> Draw:
    """Return a token for each of R rows; row r draws from row ``state[r]`` of the (C, V) ``logits``.

    Tokens are drawn by inverse CDF, from (R,) ``uniform`` numbers in [0, 1).
    """
    logits = logits.astype(mx.float32) / (temperature or 1.0)
    if keep is not None:  # -inf on the tokens that may not be drawn
        if 0 < keep.top_k < logits.shape[-1]:
            kth = mx.topk(logits, keep.top_k, axis=-1).min(axis=-1, keepdims=True)
            logits = _likeliest(logits, kth, keep.top_k)
        if keep.top_p < 1:
            ordered = -mx.sort(-logits, axis=-1)
            mass = mx.softmax(ordered, axis=-1)
            count = mx.maximum((mx.cumsum(mass, axis=-1) - mass < keep.top_p).sum(axis=-1, keepdims=True), 1)
            logits = _likeliest(logits, mx.take_along_axis(ordered, count - 1, axis=-1), count)
        if keep.min_p > 0:
            logits = mx.where(logits >= logits.max(axis=-1, keepdims=True) + math.log(keep.min_p), logits, -mx.inf)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    mass = exp_without_gradient(shifted)
    log_total = mx.log(mass.sum(axis=-1))
    mean = (mass * mx.maximum(shifted, -1e30)).sum(axis=-1) / mass.sum(axis=-1)  # 0 * -inf is not a number
    if temperature == 0:
        tokens = mx.argmax(shifted, axis=-1)[state]
    else:  # the first token at which the running sum of mass[state[r]] exceeds uniform[r] times its sum
        rows, vocabulary = mass.shape
        blocks = mx.pad(mass, [(0, 0), (0, -vocabulary % _BLOCK)]).reshape(rows, -1, _BLOCK)
        running = mx.cumsum(blocks.sum(axis=-1), axis=-1)[state]
        point = (uniform * running[:, -1])[:, None]
        block = mx.minimum((running <= point).sum(axis=-1, keepdims=True), running.shape[1] - 1)
        before = mx.where(block > 0, mx.take_along_axis(running, mx.maximum(block - 1, 0), axis=-1), 0)
        inside = blocks[state, block[:, 0]]
        passed = mx.cumsum(inside, axis=-1) > point - before
        # rounding may leave no token passed; then the block's likeliest one is drawn
        within = mx.where(passed.any(axis=-1), mx.argmax(passed, axis=-1), mx.argmax(inside, axis=-1))
        tokens = block[:, 0] * _BLOCK + within
    return Draw(tokens.astype(mx.int32), shifted[state, tokens] - log_total[state], (log_total - mean)[state])


def _likeliest(logits: mx.array, last: mx.array, count: mx.array | int) -> mx.array:
    """Return (R, V) ``logits`` with -inf on all but the ``count`` largest; of equal ones the first count, as in argmax.

    ``last`` (R, 1) is the smallest that is kept.
    """
    above, tied = logits > last, logits == last
    room = count - above.sum(axis=-1, keepdims=True)
    return mx.where(above | (tied & (mx.cumsum(tied.astype(mx.int32), axis=-1) <= room)), logits, -mx.inf)


def uniforms(seed: int, row: int, count: int) -> np.ndarray:
    """Return the ``count`` random numbers of one sequence, which depend on the run's seed and its row alone."""
    return np.random.default_rng([seed, row]).random(count, np.float32)
