"""Run one token per row through a model built like Llama, a block as a few products and what lies between them.

With the kernels of cuda.py a block takes nine launches. In mlx-lm's code it takes twice as many, and in a decoding step
most of the time goes into launching them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama, qwen3, rope_utils

from . import operations
from .fused_linear import FusedLinear, View

_WIDEST = 8192  # outputs that one block of threads can add up and norm

# Queries, keys and values (R, heads, 1, D) of a step in one layer, and the scale; returns (R, heads, 1, D)
Attend = Callable[[mx.array, mx.array, mx.array, float], mx.array]


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """The fused layers of one block, and the frequencies (D/2,) float32 of its rotation."""

    heads: FusedLinear
    out: FusedLinear
    gate_and_up: FusedLinear
    down: FusedLinear
    frequencies: mx.array


def blocks_of(model: nn.Module, view: View, kernels: Any = operations) -> tuple[Block, ...]:
    """Return the blocks of ``model``, seen by ``view``; () unless it is built like Llama, and ``kernels`` suit it."""
    if type(model) not in (llama.Model, qwen3.Model):
        return ()
    joined = {tuple(map(id, fused.layers)): fused for fused in view.groups if fused.is_joined}
    found = [_block(layer.self_attn, layer.mlp, joined, kernels) for layer in model.layers]
    return tuple(block for block in found if block) if all(found) else ()


def _block(attention: Any, mlp: Any, joined: dict[tuple[int, ...], FusedLinear], kernels: Any) -> Block | None:
    if type(attention) not in (llama.Attention, qwen3.Attention) or type(mlp) not in (llama.MLP, qwen3.MLP):
        return None  # a window or another activation has been added
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
    if 2 * frequencies.size not in kernels.HEAD_SIZES or out.widths[0] > _WIDEST:
        return None
    return Block(heads, out, gate_and_up, down, frequencies)


def _frequencies(rope: Any) -> mx.array | None:
    """Return the angles (D/2,) float32 by which elements i and i + D/2 rotate per position; None if not supported."""
    if type(rope) not in (nn.RoPE, rope_utils.Llama3RoPE) or rope.traditional:
        return None
    if type(rope) is rope_utils.Llama3RoPE:
        return 1 / rope._freqs
    return rope.scale * rope.base ** (mx.arange(0, rope.dims, 2) / -rope.dims)


def logits(
    model: Any, blocks: Sequence[Block], tokens: mx.array, positions: mx.array, attend: Sequence[Attend], kernels: Any
) -> mx.array:
    """Return the logits (R, V) after ``tokens`` (R,) at ``positions`` (R,), given the view's ``model``.

    ``attend`` has one attention per layer; ``kernels`` are those that the view was made for.
    """
    body = model.model
    turns = positions, blocks[0].frequencies  # one rotation serves all blocks of these models
    if kernels is not operations:
        angles = positions[:, None] * blocks[0].frequencies
        turns = mx.cos(angles), mx.sin(angles)
    norms = [layer.input_layernorm for layer in body.layers] + [body.norm]
    h = body.embed_tokens(tokens)
    n = norms[0](h)
    for block, layer, attended, norm in zip(blocks, body.layers, attend, norms[1:], strict=True):
        attention, between = layer.self_attn, layer.post_attention_layernorm
        counts = (attention.n_heads, attention.n_kv_heads)
        q, k, v = kernels.heads(*block.heads.product(n), counts, *_norms(attention), turns)
        o = attended(q, k, v, attention.scale).reshape(len(tokens), -1)
        h, n = kernels.add_and_norm(*block.out.product(o), h, between.weight, between.eps)
        a = kernels.swiglu(*block.gate_and_up.product(n))
        h, n = kernels.add_and_norm(*block.down.product(a), h, norm.weight, norm.eps)
    return body.embed_tokens.as_linear(n) if model.args.tie_word_embeddings else model.lm_head(n)


def _norms(attention: Any) -> tuple[tuple[mx.array, mx.array] | None, float]:
    """Return the weights of Qwen3's norms over queries and keys, and their epsilon; None and 0 for Llama."""
    if not isinstance(attention, qwen3.Attention):
        return None, 0.0
    return (attention.q_norm.weight, attention.k_norm.weight), attention.q_norm.eps
