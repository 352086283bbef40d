"""Log-probs of sampled tokens from a model's hidden states, without an array of [tokens, vocabulary].

A chunk of tokens at a time goes through the model's own head. Where the head is frozen, the chunk also
yields d log p / d hidden, (N, D), so the backward pass is a product with that and nothing is computed twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..adapters.merging import trainable
from ..adapters.tinylora import SharedVectors
from ..kernels.exponentials import exp_without_gradient
from ..kernels.patching import Path, StandIn, child, parameters, with_child

logger = logging.getLogger(__name__)

_LOGITS = {mx.cpu: 2**22, mx.gpu: 2**24}  # of one chunk: small ones stay in a CPU's cache, a GPU wants large products
_FEWEST = 64  # tokens of a chunk, below which the product with the head gets slow
BYTES_PER_LOGIT = 50  # at the peak, since MLX allocates some steps ahead; measured on a CPU

_NO_HEAD = "the model in %s has no head apart from its body, so an update makes the logits of all positions at once"
_paths: dict[type, Path] = {}  # of each class of models seen


class Scored(NamedTuple):
    """What a model says of N tokens."""

    logprobs: mx.array  # (N,) float32
    entropy: mx.array | None  # (N,) float32, nats, of the distributions they are drawn from; carries no gradient


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """A model in two: a body, which ends in hidden states, and a head, which makes logits of each of them.

    Both run the model's own code, with a stand-in for the body, so that tied and quantised heads, scaled
    and capped logits are what they are in the model.
    """

    model: nn.Module
    path: Path  # from the model to its body; () if it has none: then all is body and the head does nothing

    @classmethod
    def of(cls, model: nn.Module) -> Split:
        """Looked for once per class of models, with a pass over three tokens."""
        kind = type(model)
        if kind not in _paths:
            _paths[kind] = _find_body(model)
            if not _paths[kind]:
                logger.warning(_NO_HEAD, kind.__module__)
        return cls(model, _paths[kind])

    def body(self, tokens: mx.array, cache: Any = None) -> mx.array:
        """Hidden states (B, T, D) of (B, T) ``tokens`` read after ``cache``."""
        return _outputs(self.model, self.path, tokens, cache)[-1] if self.path else self.model(tokens, cache=cache)

    def head(self, hidden: mx.array) -> mx.array:
        """Logits (N, V) of hidden states (N, D)."""
        if not self.path:
            return hidden
        model = with_child(self.model, self.path, lambda body: StandIn(body, lambda *_, **__: hidden[None]))
        return model(mx.zeros((1, len(hidden)), mx.int32))[0]

    def trained(self) -> dict[str, mx.array]:
        """The trained parameters that the head may use, by name: those outside the model's blocks.

        A TinyLoRA's vectors lie outside, and only blocks read them.
        """
        blocks = {id(block) for block in self.model.layers}
        modules = self.model.named_modules()
        inside = tuple(f"{name}." for name, m in modules if id(m) in blocks or isinstance(m, SharedVectors))
        everything = trainable(self.model) if self.path else {}
        return {name: value for name, value in everything.items() if not name.startswith(inside)}


def token_logprobs(
    split: Split,
    hidden: mx.array,
    targets: mx.array,
    temperatures: mx.array,
    *,
    entropy: bool = False,
    gradient: bool = True,
    at_once: int | None = None,
) -> Scored:
    """Log-probs of (N,) ``targets`` after hidden states (N, D), each at its temperature (N,), ``at_once`` at a time.

    Without ``gradient`` they are cheaper and must not be differentiated.
    """
    rows = at_once or tokens_at_once(split.head(hidden[:1]).shape[-1])  # a shape is known without being computed
    trained = split.trained() if gradient else {}

    def one(hidden: mx.array, targets: mx.array, temperatures: mx.array) -> Any:
        if trained:
            return _recomputed(split, trained, hidden, targets, temperatures, entropy)
        if gradient:
            return _with_slopes(split.head, hidden, targets, temperatures, entropy)
        return _scored(split.head(hidden), targets, temperatures, entropy)

    edges = [*range(0, len(targets), rows), len(targets)]
    chunks: list[Scored] = []
    for a, b in pairwise(edges):
        h = hidden[a:b]
        if chunks:  # wait for the chunk before, so that their logits are never alive together
            [h] = mx.depends([h], [chunks[-1].logprobs])
        chunks.append(one(h, targets[a:b], temperatures[a:b]))
    entropies = [c.entropy for c in chunks if c.entropy is not None]
    return Scored(mx.concatenate([c.logprobs for c in chunks]), mx.concatenate(entropies) if entropy else None)


def tokens_at_once(vocabulary: int) -> int:
    """Tokens of one chunk on the default device."""
    return max(_FEWEST, _LOGITS[mx.default_device().type] // vocabulary)


def _scored(logits: mx.array, targets: mx.array, temperatures: mx.array, entropy: bool) -> Scored:
    z = logits.astype(mx.float32) / temperatures[:, None]
    shifted, mass, total = _softmax_parts(z)
    picked = mx.take_along_axis(shifted, targets[:, None], axis=-1)[:, 0]
    return Scored(picked - mx.log(total), _entropy(shifted, mass, total) if entropy else None)


def _with_slopes(
    head: Callable[[mx.array], mx.array], hidden: mx.array, targets: mx.array, temperatures: mx.array, entropy: bool
) -> Scored:
    """With z = head(hidden) / temperature and p = softmax(z): log p_target, whose slope by z is onehot - p.

    The slope is taken back to ``hidden`` at once. As each log-prob depends on its own hidden state only,
    the gradient of their weighted sum is those rows times the weights.
    """

    def forward(hidden: mx.array) -> tuple[mx.array, list[mx.array]]:
        z = head(hidden).astype(mx.float32) / temperatures[:, None]
        shifted, mass, total = _softmax_parts(mx.stop_gradient(z), exp_without_gradient)
        picked = mx.take_along_axis(shifted, targets[:, None], axis=-1)[:, 0]
        slope = (mx.arange(z.shape[-1]) == targets[:, None]) - mass / total[:, None]
        out = [picked - mx.log(total)] + ([_entropy(shifted, mass, total)] if entropy else [])
        return (z * slope).sum(), out

    @mx.custom_function
    def scored(hidden: mx.array) -> list[mx.array]:
        (_, out), slopes = mx.value_and_grad(forward)(hidden)
        return [*out, slopes]

    @scored.vjp
    def backward(hidden: mx.array, weights: list[mx.array], out: list[mx.array]) -> mx.array:
        return (weights[0][:, None] * out[-1].astype(mx.float32)).astype(hidden.dtype)

    out: Any = scored(hidden)
    return Scored(out[0], out[1] if entropy else None)


def _recomputed(
    split: Split,
    trained: dict[str, mx.array],
    hidden: mx.array,
    targets: mx.array,
    temperatures: mx.array,
    entropy: bool,
) -> Scored:
    """For a head that is trained itself: the backward pass makes the logits again, with gradients for ``trained``."""

    def forward(trained: dict[str, mx.array], hidden: mx.array) -> list[mx.array]:
        with parameters(split.model, trained):
            scored = _scored(split.head(hidden), targets, temperatures, entropy)
        return [scored.logprobs] + ([] if scored.entropy is None else [mx.stop_gradient(scored.entropy)])

    out: Any = mx.checkpoint(forward)(trained, hidden)
    return Scored(out[0], out[1] if entropy else None)


def _softmax_parts(z: mx.array, exp: Callable[[mx.array], mx.array] = mx.exp) -> tuple[mx.array, mx.array, mx.array]:
    """z - max z (N, V), the exponentials of that (N, V) and their sums (N,)."""
    shifted = z - z.max(axis=-1, keepdims=True)
    mass = exp(shifted)
    return shifted, mass, mass.sum(axis=-1)


def _entropy(shifted: mx.array, mass: mx.array, total: mx.array) -> mx.array:
    """H = log sum_v e_v - sum_v e_v z_v / sum_v e_v of shifted logits z with e = exp z, (N,)."""
    return mx.log(total) - (mass * mx.maximum(shifted, -1e30)).sum(axis=-1) / total  # 0 * -inf is not a number


# Finding where a model's body ends


def _outputs(model: nn.Module, path: Path, tokens: mx.array, cache: Any = None) -> list[Any]:
    """What the module at ``path`` returns each time it is called while ``model`` reads ``tokens``."""
    seen: list[Any] = []

    def watched(module: Any) -> StandIn:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(module(*args, **kwargs))
            return seen[-1]

        return StandIn(module, call)

    with_child(model, path, watched)(tokens, cache=cache)
    return seen


def _find_body(model: nn.Module, path: Path = ()) -> Path:
    """The path to a module whose output alone decides the logits, each position its own; () if there is none."""
    tokens = mx.array([[0, 1, 2]])
    logits = model(tokens)
    for name in [name for name, part in child(model, path).items() if isinstance(part, nn.Module)]:
        here = (*path, name)
        outputs = _outputs(model, here, tokens)
        if len(outputs) != 1 or not isinstance(outputs[0], mx.array) or outputs[0].shape[:2] != (1, 3):
            continue
        reversed_ = Split(model, here).head(outputs[0][0, ::-1])[::-1]
        if mx.abs(reversed_ - logits[0]).max() > 0.01 * mx.abs(logits).max():
            continue
        # What is as wide as the logits has made them already: a model within the model, or the head itself.
        found = here if outputs[0].shape[-1] != logits.shape[-1] else _find_body(model, here)
        if found:
            return found
    return ()
