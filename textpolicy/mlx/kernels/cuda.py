"""The CUDA kernels for decoding, and for the log-probs of given tokens.

Those for decoding are attention of one query per row, drawing a token, and the operations between two matrix products.
MLX's own attention plans anew for every length and is slower under a mask; its sampling passes over the logits many
times. These kernels take the length and the mask as data and read everything once. A decoding step is short and
spends most of its time launching kernels, so LoRA, norm, rotation and residual share one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import mlx.core as mx
import numpy as np

from .cuda_attention import ABSORB, ATTEND, ATTEND_MANY, PRODUCTS
from .cuda_source import ADD_AND_NORM, ADD_LORA, DRAW, HEADS, LOAD, MASSES, SCORE, SWIGLU

HEAD_SIZES = (64, 128)  # LANES divide a warp
_GROUPS = (4, 3, 2, 1)  # query heads per block of threads; they share their keys
_TILES = (2, 1)  # rows per block; with four, too few blocks fit a multiprocessor
_MANY = 64  # blocks of eight rows from which on half precision takes tensor cores
_BLOCKS = 256  # with fewer, some of a GPU's multiprocessors are idle


def is_default() -> bool:
    """Return whether these kernels are to be used: on an NVIDIA GPU, unless TEXTPOLICY_GENERIC_GPU is 1.

    With that variable an NVIDIA GPU takes the way of every other GPU: MLX's own operations, without these kernels.
    """
    return is_nvidia() and os.environ.get("TEXTPOLICY_GENERIC_GPU") != "1"


def is_nvidia() -> bool:
    """Return whether MLX's default device is an NVIDIA GPU."""
    return mx.default_device() == mx.Device(mx.gpu) and not mx.metal.is_available()


def can_attend(queries: mx.array, values: mx.array) -> bool:
    """Return whether ``attend`` supports these shapes: one query per row, heads of size 64 or 128."""
    size = queries.shape[-1]
    return is_default() and queries.shape[2] == 1 and size in HEAD_SIZES and values.shape[-1] == size


def can_draw(logits: mx.array) -> bool:
    """Return whether ``draw`` and ``score`` support these logits (C, V): V a multiple of 8."""
    return is_default() and logits.shape[-1] % 8 == 0


def attend(
    queries: mx.array,
    fresh: Sequence[mx.array],
    own: Sequence[mx.array],
    prefix: Sequence[mx.array],
    parents: mx.array,
    seen: mx.array,
    last: mx.array,
    scale: float,
) -> mx.array:
    """Return the attention (B, heads, 1, D) of each row's query over its shared prefix and its own slots.

    queries (B, heads, 1, D). The others are keys and values: ``fresh`` (B, kv heads, 1, D) belong to the query's
    token; ``own`` (B, kv heads, C, D), contiguous, in use up to slot ``last`` (n,) int32; ``prefix`` (U, kv heads,
    P, D), of which row b continues row ``parents[b]``. seen (B, P + C) bool marks the slots a row may attend to;
    the hidden ones are finite too. Writes ``fresh`` into slot ``last`` of ``own`` in place, without MLX's knowledge:
    copying the slots in each step would take longer than everything else, and each step waits for the previous one.
    """
    rows, heads, _, size = queries.shape
    per_kv, threads = heads // own[0].shape[1], 256
    group = next(g for g in range(8, 0, -1) if per_kv % g == 0)
    tile = 8
    has_products = int(mx.device_info().get("compute_capability_major", 8)) >= 8  # of bfloat16
    many = has_products and queries.dtype != mx.float32 and rows * heads // group >= tile * _MANY
    if not many:
        group = next(g for g in _GROUPS if per_kv % g == 0 and g * size <= 256)
        tile = next(t for t in _TILES if t == 1 or rows * heads // group >= t * _BLOCKS)
    sizes = {"D": size, "G": group, "PER_KV": per_kv, "HEADS": heads}
    [out] = _attend_kernel(scale, many)(
        inputs=[queries, *fresh, *own, *prefix, parents, seen, last],
        template=[("T", queries.dtype), *sizes.items(), *([] if many else [("THREADS", threads), ("TILE", tile)])],
        grid=(threads * (heads // group), -(-rows // tile), 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[queries.shape],
        output_dtypes=[queries.dtype],
    )
    return out


def add_lora(y: mx.array, b: mx.array, widths: Sequence[int]) -> list[mx.array]:
    """Return the outputs (N, widths[i]) of layers that each have a LoRA of rank r, from their joined product.

    y (N, sum of widths + layers * r) holds the layers' outputs without LoRAs, then each layer's x A; ``b`` (r, sum
    of widths) holds their B side by side, scales included. Widths and the width of y are multiples of 8.
    """
    rank, out = b.shape
    rows, wide = y.shape
    return _add_lora_kernel(tuple(widths))(
        inputs=[y, b],
        template=[("T", y.dtype), ("RANK", rank), ("OUT", out), ("WIDE", wide)],
        grid=(-(-out // 8), -(-rows // 8), 1),
        threadgroup=(min(128, -(-out // 8)), 1, 1),
        output_shapes=[(rows, width) for width in widths],
        output_dtypes=[y.dtype] * len(widths),
    )


def heads(
    y: mx.array,
    b: mx.array,
    counts: tuple[int, int],
    norms: tuple[mx.array, mx.array] | None,
    epsilon: float,
    turns: tuple[mx.array, mx.array],
) -> list[mx.array]:
    """Return queries (N, Q, 1, D), keys and values (N, K, 1, D) of one token per row: LoRAs added, normed and rotated.

    ``y`` and ``b`` are as in ``add_lora``, for the three layers in this order; counts are (Q, K). ``norms`` holds
    the weights (D,) of RMS norms with ``epsilon`` over each query and key, or None. Elements i and i + D/2 of both
    are rotated by the angles whose cosines and sines (N, D/2) float32 are ``turns``.
    """
    (queries, keys), size = counts, 2 * turns[0].shape[1]
    rank, out = b.shape
    rows, wide = y.shape
    every, threads, tile = queries + 2 * keys, 256, 4
    weights = norms or (b, b)  # not read without norms
    return _heads_kernel(epsilon)(
        inputs=[y, b, *weights, *turns],
        template=[
            ("T", y.dtype), ("D", size), ("QUERIES", queries), ("KEYS", keys), ("RANK", rank), ("OUT", out),
            ("WIDE", wide), ("NORMED", norms is not None), ("THREADS", threads),
        ],
        grid=(threads * -(-every * size // (8 * threads)), -(-rows // tile), 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(rows, queries, 1, size), (rows, keys, 1, size), (rows, keys, 1, size)],
        output_dtypes=[y.dtype] * 3,
    )  # fmt: skip


def add_and_norm(
    y: mx.array, b: mx.array, residual: mx.array, norm: mx.array, epsilon: float
) -> tuple[mx.array, mx.array]:
    """Return the sum (N, W) of ``residual`` and a layer's output, and its RMS norm with weights ``norm`` (W,).

    ``y`` and ``b`` are as in ``add_lora``, for one layer; W is a multiple of 8 and at most 8192.
    """
    rank, out = b.shape
    rows, wide = y.shape
    threads = 32 * -(-out // 256)
    added, normed = _add_and_norm_kernel(epsilon)(
        inputs=[y, b, residual, norm],
        template=[("T", y.dtype), ("RANK", rank), ("OUT", out), ("WIDE", wide), ("THREADS", threads)],
        grid=(threads * rows, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[residual.shape] * 2,
        output_dtypes=[y.dtype] * 2,
    )
    return added, normed


def swiglu(y: mx.array, b: mx.array) -> mx.array:
    """Return SiLU(gate) * up (N, W) of two layers of W outputs each; ``y`` and ``b`` are as in ``add_lora``."""
    rank, inner = b.shape[0], b.shape[1] // 2
    rows, wide = y.shape
    threads = min(128, -(-inner // 8))
    [out] = _swiglu_kernel()(
        inputs=[y, b],
        template=[("T", y.dtype), ("RANK", rank), ("INNER", inner), ("WIDE", wide), ("THREADS", threads)],
        grid=(threads * -(-inner // (8 * threads)), -(-rows // 4), 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(rows, inner)],
        output_dtypes=[y.dtype],
    )
    return out


def draw(logits: mx.array, state: mx.array, uniform: mx.array, temperature: float) -> tuple[Any, Any, Any]:
    """Return tokens, log-probs and entropies (R,) as ``sampling.draw`` does; logits (C, V) with V a multiple of 8."""
    rows, vocabulary = state.size, logits.shape[-1]
    [drawn] = _draw_kernel(temperature)(
        inputs=[logits, state.astype(mx.int32), uniform],
        template=[("T", logits.dtype), ("THREADS", 1024), ("BLOCKS", -(-vocabulary // 256))],
        grid=(1024 * rows, 1, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[(3 * rows,)],  # one array, for the host to read at once
        output_dtypes=[mx.int32],
    )
    return drawn[:rows], mx.view(drawn[rows : 2 * rows], mx.float32), mx.view(drawn[2 * rows :], mx.float32)


def score(logits: mx.array, targets: mx.array, temperatures: mx.array, slopes: bool = True) -> tuple[Any, Any, Any]:
    """Return log-probs of ``targets`` (N,) and entropies (N,), with the slopes (N, V) of the log-probs by the logits.

    logits (N, V) with V a multiple of 8, temperatures (N,) float32. The slopes are of the logits' type; without
    ``slopes`` they are not computed, and are (1,) of no meaning.
    """
    rows = len(logits)
    out = _score_kernel()(
        inputs=[logits, targets.astype(mx.int32), temperatures],
        template=[("T", logits.dtype), ("THREADS", 1024), ("SLOPES", slopes)],
        grid=(1024 * rows, 1, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[(rows,), (rows,), logits.shape if slopes else (1,)],
        output_dtypes=[mx.float32, mx.float32, logits.dtype],
    )
    return out[0], out[1], out[2]


def _kernel(name: str, inputs: Sequence[str], outputs: Sequence[str], source: str, load: str, **numbers: float) -> Any:
    """Return a kernel with ``numbers`` written into its source: reading them from an array in host memory is slow."""
    for key, number in numbers.items():
        source = source.replace(key, f"{np.float32(number)!s}f")
        name += f"_{np.float32(number).tobytes().hex()}"
    return mx.fast.cuda_kernel(f"textpolicy_{name}", list(inputs), list(outputs), source, header=load)


@cache
def _attend_kernel(scale: float, many: bool) -> Any:
    arrays = [f"{where}{what}" for where in ("fresh_", "", "prefix_") for what in ("keys", "values")]
    name, source, load = ("attend_many", ATTEND_MANY, PRODUCTS) if many else ("attend", ATTEND, ABSORB)
    return _kernel(name, ["queries", *arrays, "parents", "seen", "last"], ["out"], source, load, SCALE=scale)


@cache
def _add_lora_kernel(widths: tuple[int, ...]) -> Any:
    names = [f"out{i}" for i in range(len(widths))]
    ends = ", ".join(str(end) for end in accumulate(widths))
    source = ADD_LORA.replace("TARGETS", ", ".join(names)).replace("ENDS", ends)
    return _kernel("lora_" + "_".join(map(str, widths)), ["y", "b"], names, source, LOAD)


@cache
def _heads_kernel(epsilon: float) -> Any:
    names = ["y", "b", "query_norm", "key_norm", "cosines", "sines"]
    return _kernel("heads", names, ["queries", "keys", "values"], HEADS, LOAD, EPSILON=epsilon)


@cache
def _add_and_norm_kernel(epsilon: float) -> Any:
    names = ["y", "b", "residual", "norm"]
    return _kernel("add_and_norm", names, ["added", "normed"], ADD_AND_NORM, LOAD, EPSILON=epsilon)


@cache
def _swiglu_kernel() -> Any:
    return _kernel("swiglu", ["y", "b"], ["out"], SWIGLU, LOAD)


@cache
def _draw_kernel(temperature: float) -> Any:
    names = ["logits", "state", "uniform"]
    return _kernel("draw", names, ["drawn"], DRAW, LOAD, TEMPERATURE=temperature)


@cache
def _score_kernel() -> Any:
    names = ["logits", "targets", "temperatures"]
    return _kernel("score", names, ["logprobs", "entropy", "slopes"], SCORE, MASSES)
