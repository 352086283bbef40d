"""The Metal kernels for decoding, beside the CUDA ones of cuda.py: the same functions, in simpler code.

No Mac has run them: tests compile the source that MLX generates as C++ and run its threads (metal_emulator.py). So
whoever chooses them checks their first step against MLX's own operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import mlx.core as mx
import numpy as np

from .metal_source import ADD_AND_NORM, ADD_LORA, ATTEND, CHOOSE, DRAW, HEADS, SWIGLU

HEAD_SIZES = (64, 128)  # the 32 lanes of a simdgroup divide half of them
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
_THREADS = 256
_ROWS = 4  # rows for which a thread reads B once
_GROUP = 8  # at most so many query heads per threadgroup; they share their keys
_BLOCK = 256  # tokens that are summed up as one
_BLOCKS = 2560  # of them; with more their sums would not fit into the 32 KB that a threadgroup has
_LOWEST = -3.4e38  # below every score, and finite: its difference from itself is 0


def is_default() -> bool:
    """Return whether MLX's default device is an Apple GPU."""
    return mx.default_device() == mx.Device(mx.gpu) and mx.metal.is_available()


def can_attend(queries: mx.array, values: mx.array) -> bool:
    """Return whether ``attend`` supports these shapes: one query per row, heads of size 64 or 128."""
    size = queries.shape[-1]
    fits = queries.shape[2] == 1 and size in HEAD_SIZES and values.shape[-1] == size
    return is_default() and fits and queries.dtype in DTYPES and values.dtype in DTYPES


def can_draw(logits: mx.array) -> bool:
    """Return whether ``draw`` supports these logits (C, V): V at most 655,360."""
    return is_default() and logits.dtype in DTYPES and logits.shape[-1] <= _BLOCK * _BLOCKS


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

    The arguments are those of cuda.py's ``attend``; keys and values have one type, which may differ from the queries'.
    Writes ``fresh`` into slot ``last`` of ``own`` in place, without MLX's knowledge. MLX lets kernels of one command
    buffer, and command buffers, overlap unless one reads what it knows the other writes. The next step's kernel comes
    after this one all the same, as its query follows from this one's output through kernels that MLX does order, and
    each such barrier or fence covers all that came before. Whatever else reads ``own`` (to copy, pad or gather it)
    has no such chain: wait for this step's tokens first (``mx.eval``).
    """
    rows, heads, _, size = queries.shape
    per_kv = heads // own[0].shape[1]
    group = next(g for g in range(_GROUP, 0, -1) if per_kv % g == 0)
    sizes = {"D": size, "G": group, "PER_KV": per_kv, "HEADS": heads, "THREADS": _THREADS}
    [out] = _attend_kernel(scale)(
        inputs=[queries, *fresh, *own, *prefix, parents, seen, last],
        template=[("T", queries.dtype), ("S", own[0].dtype), *sizes.items()],
        grid=(_THREADS * (heads // group), rows, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[queries.shape],
        output_dtypes=[queries.dtype],
    )
    return out


def add_lora(y: mx.array, b: mx.array, widths: Sequence[int]) -> list[mx.array]:
    """Return the outputs (N, widths[i]) of layers that each have a LoRA of rank r, from their joined product.

    y (N, sum of widths + layers * r) holds the layers' outputs without LoRAs, then each layer's x A; ``b`` (r, sum
    of widths) holds their B side by side, scales included.
    """
    rank, out = b.shape
    rows, wide = y.shape
    return _add_lora_kernel(tuple(widths))(
        inputs=[y, b],
        template=[("T", y.dtype), ("RANK", rank), ("OUT", out), ("WIDE", wide), ("ROWS", _ROWS)],
        grid=(out, -(-rows // _ROWS), 1),
        threadgroup=(min(_THREADS, out), 1, 1),
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

    ``y`` and ``b`` are as in ``add_lora``, for the three layers in this order; counts are (Q, K), and D is one of
    ``HEAD_SIZES``. ``norms`` holds the weights (D,) of RMS norms with ``epsilon`` over each query and key, or None.
    Elements i and i + D/2 of both are rotated by the angles whose cosines and sines (N, D/2) float32 are ``turns``.
    """
    (queries, keys), size = counts, 2 * turns[0].shape[1]
    rank, out = b.shape
    rows, wide = y.shape
    lanes = 32 * (queries + 2 * keys)
    weights = norms or (b, b)  # not read without norms
    return _heads_kernel(epsilon)(
        inputs=[y, b, *weights, *turns],
        template=[
            ("T", y.dtype), ("D", size), ("QUERIES", queries), ("KEYS", keys), ("RANK", rank), ("OUT", out),
            ("WIDE", wide), ("NORMED", norms is not None), ("ROWS", _ROWS),
        ],
        grid=(lanes, -(-rows // _ROWS), 1),
        threadgroup=(min(_THREADS, lanes), 1, 1),
        output_shapes=[(rows, queries, 1, size), (rows, keys, 1, size), (rows, keys, 1, size)],
        output_dtypes=[y.dtype] * 3,
    )  # fmt: skip


def add_and_norm(
    y: mx.array, b: mx.array, residual: mx.array, norm: mx.array, epsilon: float
) -> tuple[mx.array, mx.array]:
    """Return the sum (N, W) of ``residual`` and a layer's output, and its RMS norm with weights ``norm`` (W,).

    ``y`` and ``b`` are as in ``add_lora``, for one layer.
    """
    rank, out = b.shape
    rows, wide = y.shape
    added, normed = _add_and_norm_kernel(epsilon)(
        inputs=[y, b, residual, norm],
        template=[("T", y.dtype), ("RANK", rank), ("OUT", out), ("WIDE", wide), ("THREADS", _THREADS)],
        grid=(_THREADS * rows, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[residual.shape] * 2,
        output_dtypes=[y.dtype] * 2,
    )
    return added, normed


def swiglu(y: mx.array, b: mx.array) -> mx.array:
    """Return SiLU(gate) * up (N, W) of two layers of W outputs each; ``y`` and ``b`` are as in ``add_lora``."""
    rank, inner = b.shape[0], b.shape[1] // 2
    rows, wide = y.shape
    [out] = _swiglu_kernel()(
        inputs=[y, b],
        template=[("T", y.dtype), ("RANK", rank), ("INNER", inner), ("WIDE", wide), ("ROWS", _ROWS)],
        grid=(inner, -(-rows // _ROWS), 1),
        threadgroup=(min(_THREADS, inner), 1, 1),
        output_shapes=[(rows, inner)],
        output_dtypes=[y.dtype],
    )
    return out


def draw(logits: mx.array, state: mx.array, uniform: mx.array, temperature: float) -> tuple[Any, Any, Any]:
    """Return tokens, log-probs and entropies (R,) as ``sampling.draw`` does above temperature 0; logits (C, V)."""
    rows = state.size
    out = _draw_kernel(temperature)(
        inputs=[logits, state.astype(mx.int32), uniform],
        template=[("THREADS", _THREADS), ("BLOCKS", -(-logits.shape[-1] // _BLOCK))],
        grid=(_THREADS * rows, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(rows,)] * 3,
        output_dtypes=[mx.int32, mx.float32, mx.float32],
    )
    return out[0], out[1], out[2]


def _kernel(
    name: str, inputs: Sequence[str], outputs: Sequence[str], source: str, header: str = "", **numbers: float
) -> Any:
    """Return a kernel with ``numbers`` written into its source."""
    for key, number in numbers.items():
        source = source.replace(key, f"{np.float32(number)!s}f")
        name += f"_{np.float32(number).tobytes().hex()}"
    return mx.fast.metal_kernel(f"textpolicy_{name}", list(inputs), list(outputs), source, header=header)


@cache
def _attend_kernel(scale: float) -> Any:
    arrays = [f"{where}{what}" for where in ("fresh_", "", "prefix_") for what in ("keys", "values")]
    names = ["queries", *arrays, "parents", "seen", "last"]
    return _kernel("attend", names, ["out"], ATTEND, SCALE=scale, LOWEST=_LOWEST)


@cache
def _add_lora_kernel(widths: tuple[int, ...]) -> Any:
    names, ends = [f"out{i}" for i in range(len(widths))], list(accumulate(widths))

    def chosen(values: Sequence[object]) -> str:
        return "".join(f"column < {end} ? {v} : " for end, v in zip(ends[:-1], values, strict=False)) + str(values[-1])

    starts = [0, *ends[:-1]]
    which = (f"layer = {chosen(range(len(widths)))}", f"start = {chosen(starts)}", f"width = {chosen(widths)}")
    layer = f"const int {', '.join(which)};\n  device T* to = {chosen(names)};"
    source = ADD_LORA.replace("LAYER", layer)
    return _kernel("lora_" + "_".join(map(str, widths)), ["y", "b"], names, source)


@cache
def _heads_kernel(epsilon: float) -> Any:
    names = ["y", "b", "query_norm", "key_norm", "cosines", "sines"]
    return _kernel("heads", names, ["queries", "keys", "values"], HEADS, EPSILON=epsilon)


@cache
def _add_and_norm_kernel(epsilon: float) -> Any:
    names = ["y", "b", "residual", "norm"]
    return _kernel("add_and_norm", names, ["added", "normed"], ADD_AND_NORM, EPSILON=epsilon)


@cache
def _swiglu_kernel() -> Any:
    return _kernel("swiglu", ["y", "b"], ["out"], SWIGLU)


@cache
def _draw_kernel(temperature: float) -> Any:
    names = ["logits", "state", "random"]
    return _kernel("draw", names, ["tokens", "logprobs", "entropy"], DRAW, CHOOSE, TEMPERATURE=temperature)
