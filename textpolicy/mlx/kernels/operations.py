"""The operations of a decoding step by MLX's own, on any device; the kernels of cuda.py stand in for them.

Called while a step is compiled, so that what lies between two matrix products becomes few kernels. A product of few
rows is much cheaper than launching it, hence LoRAs of joined layers are one product with a block-diagonal B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn
import numpy as np

HEAD_SIZES = range(2, 1025, 2)


def can_draw(logits: mx.array) -> bool:
    """Return False: tokens are drawn by sampling.py's operations."""
    return False


@dataclass(frozen=True, slots=True, eq=False)
class Sharing:
    """The prompts, of U, that R rows continue, and the rows of every prompt side by side."""

    parents: mx.array  # (R,) int32
    grid: mx.array  # (U, M) int32, the rows of each prompt; any row where a prompt has fewer than M
    place: mx.array  # (R,) int32, where the grid's U * M entries hold each row
    even: bool  # whether the grid holds all rows in order, so that nothing needs to be moved

    @classmethod
    def of(cls, parents: np.ndarray, prompts: int) -> Sharing:
        """Return the sharing of rows that continue the prompts ``parents`` (R,), of ``prompts``."""
        counts = np.bincount(parents, minlength=prompts)
        order = np.argsort(parents, kind="stable")
        column = np.arange(len(parents)) - np.repeat(np.cumsum(counts) - counts, counts)
        grid = np.zeros((prompts, max(1, int(counts.max(initial=0)))), np.int32)
        grid[parents[order], column] = order
        place = np.empty(len(parents), np.int32)
        place[order] = parents[order] * grid.shape[1] + column
        even = np.array_equal(grid.reshape(-1), np.arange(len(parents)))
        return cls(mx.array(parents.astype(np.int32)), mx.array(grid), mx.array(place), even)


def attend(
    queries: mx.array,
    own: Sequence[Sequence[mx.array]],
    prefix: Sequence[mx.array],
    sharing: Sharing,
    seen: mx.array,
    scale: float,
    sinks: mx.array | None = None,
) -> mx.array:
    """Return the attention (R, heads, 1, E) of each row's query over its shared prefix and its own slots.

    queries (R, heads, 1, D). The others are keys and values: each of ``own`` (R, kv heads, C_i, D) and (R, kv heads,
    C_i, E), ``prefix`` (U, kv heads, P, D) and (U, kv heads, P, E). seen (R, P + sum of C_i) bool marks the slots a
    row may attend to; ``sinks`` (heads,) are scores that take a share of each head's weights. The keys of a prompt
    are read once for all of its rows, which are rows of one product.
    """
    rows, heads, _, _ = queries.shape
    kv, prompts, slots = prefix[0].shape[1], prefix[0].shape[0], prefix[0].shape[2]
    across = sharing.grid.shape[1]

    def by_prompt(a: mx.array) -> mx.array:  # (R, kv heads, G, N) -> (U, kv heads, M * G, N)
        a = (a if sharing.even else a[sharing.grid]).reshape(prompts, across, kv, -1, a.shape[-1])
        return a.swapaxes(1, 2).reshape(prompts, kv, -1, a.shape[-1])

    def by_row(a: mx.array) -> mx.array:  # (U, M, kv heads, G, N) if even, which is no copy, else (R, kv heads, G, N)
        a = a.reshape(prompts, kv, across, -1, a.shape[-1]).swapaxes(1, 2)
        return a if sharing.even else a.reshape(-1, *a.shape[2:])[sharing.place]

    def alike(a: mx.array) -> mx.array:
        return a.reshape(prompts, across, *a.shape[1:]) if sharing.even else a

    q = queries.reshape(rows, kv, heads // kv, -1)
    scores = mx.concatenate(
        [by_row(by_prompt(q) @ prefix[0].swapaxes(2, 3)), *(alike(q @ keys.swapaxes(2, 3)) for keys, _ in own)],
        axis=-1,
    ).reshape(rows, kv, heads // kv, -1)
    scores = mx.where(seen[:, None, None], scores * scale, -mx.inf)
    if sinks is not None:
        sink = mx.broadcast_to(sinks.astype(scores.dtype).reshape(kv, -1, 1), (*scores.shape[:-1], 1))
        scores = mx.concatenate([scores, sink], axis=-1)
    masses = mx.softmax(scores, axis=-1, precise=True)
    out = by_row(by_prompt(masses[..., :slots]) @ prefix[1])
    for _, values in own:
        out = out + alike(masses[..., slots : slots + values.shape[2]] @ values)
        slots += values.shape[2]
    return out.reshape(rows, heads, 1, -1)


def spread(b: Sequence[mx.array]) -> mx.array:
    """Return the LoRAs' B (r_i, widths[i]) as blocks of one matrix (sum of ranks, sum of widths), zero elsewhere."""
    ends = list(accumulate(part.shape[1] for part in b))
    sides = [(end - part.shape[1], ends[-1] - end) for part, end in zip(b, ends, strict=True)]
    return mx.concatenate([mx.pad(part, [(0, 0), side]) for part, side in zip(b, sides, strict=True)])


def _with_loras(y: mx.array, b: mx.array) -> mx.array:
    """Return the outputs (N, W) of joined layers; y (N, W + ranks) has them without LoRAs, and x A; b is ``spread``."""
    width = b.shape[1]
    return y[:, :width] + y[:, width:] @ b


def add_lora(y: mx.array, b: mx.array, widths: Sequence[int]) -> list[mx.array]:
    """Return the outputs (N, widths[i]) of layers that each have a LoRA, from their joined product ``y``."""
    out = _with_loras(y, b)
    return [out[:, end - width : end] for end, width in zip(accumulate(widths), widths, strict=True)]


def heads(
    y: mx.array,
    b: mx.array,
    counts: tuple[int, int],
    norms: tuple[mx.array, mx.array] | None,
    epsilon: float,
    turns: tuple[mx.array, mx.array],
) -> list[mx.array]:
    """Return queries (N, Q, 1, D), keys and values (N, K, 1, D) of one token per row: LoRAs added, normed and rotated.

    As cuda.heads, but ``turns`` are the positions (N,) and the frequencies (D/2,) of the rotation.
    """
    (queries, keys), (positions, frequencies) = counts, turns
    z = _with_loras(y, b).reshape(len(y), queries + 2 * keys, -1)
    size = z.shape[-1]
    plain = z if norms is None else mx.fast.rms_norm(z, None, epsilon)
    turned = []
    for part, i in ((plain[:, :queries], 0), (plain[:, queries : queries + keys], 1)):
        part = (part if norms is None else part * norms[i])[:, :, None]
        turned.append(
            mx.fast.rope(part, size, traditional=False, base=None, scale=1.0, offset=positions, freqs=1 / frequencies)
        )
    return [*turned, z[:, queries + keys :, None]]


def add_and_norm(
    y: mx.array, b: mx.array, residual: mx.array, norm: mx.array, epsilon: float
) -> tuple[mx.array, mx.array]:
    """Return the sum (N, W) of ``residual`` and a layer's output, and its RMS norm with weights ``norm`` (W,)."""
    added = residual + _with_loras(y, b)
    return added, mx.fast.rms_norm(added, norm, epsilon)


def swiglu(y: mx.array, b: mx.array) -> mx.array:
    """Return SiLU(gate) * up (N, W) of two layers of W outputs each."""
    n, width = b.shape[1] // 2, b.shape[1]  # each half is added and multiplied in one kernel
    more = y[:, width:] @ b
    gate, up = y[:, :n] + more[:, :n], y[:, n:width] + more[:, n:]
    return nn.silu(gate) * up
