"""One token for every row through a model built like Llama, nine kernels a block: the products and what is between.

As mlx-lm writes it a block has twice as many, and in a decoding step most of them wait more than they work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama, qwen3, rope_utils

from . import cuda
from .fused_linear import Together, View

_WIDEST = 8192  # of what one block of threads can add up and norm

# Queries, keys and values (R, heads, 1, D) of a step in one layer, and the scale; returns (R, heads, 1, D)
Attend = Callable[[mx.array, mx.array, mx.array, float], mx.array]


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """The joined layers of one block, and the frequencies (D/2,) float32 of its rotation."""

    heads: Together
    out: Together
    gate_and_up: Together
    down: Together
    frequencies: mx.array


def blocks_of(model: nn.Module, view: View) -> tuple[Block, ...]:
    """Those of ``model``, of which ``view`` is one; () if it is not built like Llama, or not joined by the kernel."""
    if type(model) not in (llama.Model, qwen3.Model):
        return ()
    joined = {tuple(map(id, together.layers)): together for together in view.groups if together.by_kernel}
    found = [_block(layer.self_attn, layer.mlp, joined) for layer in model.layers]
    return tuple(block for block in found if block) if all(found) else ()


def _block(attention: Any, mlp: Any, joined: dict[tuple[int, ...], Together]) -> Block | None:
    heads = joined.get((id(attention.q_proj), id(attention.k_proj), id(attention.v_proj)))
    out = joined.get((id(attention.o_proj),))
    gate_and_up = joined.get((id(mlp.gate_proj), id(mlp.up_proj)))
    down = joined.get((id(mlp.down_proj),))
    if heads is None or out is None or gate_and_up is None or down is None:
        return None
    frequencies = _frequencies(attention.rope)
    if frequencies is None or 2 * frequencies.size * attention.n_heads != heads.widths[0]:
        return None
    mx.eval(frequencies)
    if 2 * frequencies.size not in cuda.HEAD_SIZES or out.widths[0] > _WIDEST:
        return None
    return Block(heads, out, gate_and_up, down, frequencies)


def _frequencies(rope: Any) -> mx.array | None:
    """(D/2,) float32: what numbers i and i + D/2 of a head turn by from one position to the next."""
    if type(rope) not in (nn.RoPE, rope_utils.Llama3RoPE) or rope.traditional:
        return None
    if type(rope) is rope_utils.Llama3RoPE:
        return 1 / rope._freqs
    return rope.scale * rope.base ** (mx.arange(0, rope.dims, 2) / -rope.dims)


def logits(
    model: Any, blocks: Sequence[Block], tokens: mx.array, positions: mx.array, attend: Sequence[Attend]
) -> mx.array:
    """(R, V) after (R,) ``tokens`` at ``positions`` (R,); ``model`` is the view's, ``attend`` has one per layer."""
    body = model.model
    angles = positions[:, None] * blocks[0].frequencies  # one rotation serves all blocks of these models
    turns = mx.cos(angles), mx.sin(angles)
    norms = [layer.input_layernorm for layer in body.layers] + [body.norm]
    h = body.embed_tokens(tokens)
    n = norms[0](h)
    for block, layer, attended, norm in zip(blocks, body.layers, attend, norms[1:], strict=True):
        attention, between = layer.self_attn, layer.post_attention_layernorm
        counts = (attention.n_heads, attention.n_kv_heads)
        q, k, v = cuda.heads(*block.heads.product(n), counts, *_norms(attention), turns)
        o = attended(q, k, v, attention.scale).reshape(len(tokens), -1)
        h, n = cuda.add_and_norm(*block.out.product(o), h, between.weight, between.eps)
        a = cuda.swiglu(*block.gate_and_up.product(n))
        h, n = cuda.add_and_norm(*block.down.product(a), h, norm.weight, norm.eps)
    return body.embed_tokens.as_linear(n) if model.args.tie_word_embeddings else model.lm_head(n)


def _norms(attention: Any) -> tuple[tuple[mx.array, mx.array] | None, float]:
    """Weights of the norms over queries and keys, which Qwen3 has, and their epsilon."""
    if not isinstance(attention, qwen3.Attention):
        return None, 0.0
    return (attention.q_norm.weight, attention.k_norm.weight), attention.q_norm.eps
