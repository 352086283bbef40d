"""The log-probs of sampled tokens from a model's hidden states, without an array of [tokens, vocabulary].

One chunk of tokens at a time goes through the model's own head. Where the head is frozen, the chunk also
yields d log p / d hidden, (N, D), so the backward pass is a product with that and nothing is computed twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..adapters.merging import trainable
from ..adapters.tinylora import SharedVectors
from ..kernels import cuda
from ..kernels.exponentials import exp_without_gradient
from ..kernels.patching import Path, StandIn, child, parameters, with_child

logger = logging.getLogger(__name__)

_LOGITS = {mx.cpu: 2**22, mx.gpu: 2**24}  # of one chunk: few stay in a CPU's cache, a GPU wants large products
_FEWEST = 64  # tokens of a chunk, below which the product with the head gets slow

_paths: dict[type, Path] = {}  # of each class of models seen


class Scored(NamedTuple):
    """The scores of N tokens."""

    logprobs: mx.array  # (N,) float32, or (N, K) of K targets each
    entropy: mx.array | None  # (N,) float32, nats, of the distributions they are drawn from


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """The two parts of a model: a body, which ends in hidden states, and a head, which turns each into logits.

    Both run the model's own code, with a stand-in for the body, so that tied and quantised heads, scaled
    and capped logits are those of the model.
    """

    model: nn.Module
    path: Path  # from the model to its body; (): the body is the whole model, and the head does nothing

    @classmethod
    def of(cls, model: nn.Module) -> Split:
        """Return the parts of ``model``, found once per class of models with a pass over three tokens."""
        kind = type(model)
        if kind not in _paths:
            _paths[kind] = _find_body(model)
            if not _paths[kind]:
                logger.warning(
                    "the model in %s has no head apart from its body, so an update makes the logits of all positions "
                    "at once",
                    kind.__module__,
                )
        return cls(model, _paths[kind])

    def body(self, tokens: mx.array, cache: Any = None) -> mx.array:
        """Return hidden states (B, T, D) of (B, T) ``tokens`` read after ``cache``."""
        return _outputs(self.model, self.path, tokens, cache)[-1] if self.path else self.model(tokens, cache=cache)

    def head(self, hidden: mx.array) -> mx.array:
        """Return logits (N, V) of hidden states (N, D)."""
        if not self.path:
            return hidden
        model = with_child(self.model, self.path, lambda body: StandIn(body, lambda *_, **__: hidden[None]))
        return model(mx.zeros((1, len(hidden)), mx.int32)).squeeze(0)

    def trained(self) -> dict[str, mx.array]:
        """Return the trainable parameters that the head may use, by name: those outside the model's blocks.

        A TinyLoRA's vectors lie outside too, but only blocks read them.
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
    """Return log-probs of (N,) ``targets`` after hidden states (N, D) at temperatures (N,), ``at_once`` at a time.

    Of (N, K) targets, K after each state, they are (N, K). Without ``gradient`` they are cheaper and must not be
    differentiated. The gradient of the ``entropy``, and of several targets, takes the logits a second time.
    """
    rows = at_once or tokens_at_once(split.head(hidden[:1]).shape[-1])  # a shape is known without being computed
    trained = split.trained() if gradient else {}

    edges = [*range(0, len(targets), rows), len(targets)]
    chunks: list[Scored] = []
    for a, b in pairwise(edges):
        h = hidden[a:b]
        if chunks:  # wait for the chunk before, so that their logits are never alive together
            [h] = mx.depends([h], [chunks[-1].logprobs])
        chunk = (h, targets[a:b], temperatures[a:b], entropy)
        if trained or (gradient and (entropy or targets.ndim > 1)):  # slopes by the states would be (N, K, D)
            chunks.append(_recomputed(split, trained, *chunk))
        elif gradient:
            chunks.append(_with_slopes(split.head, *chunk[:3]))
        else:
            chunks.append(_without_slopes(split.head(h), *chunk[1:]))
    entropies = [c.entropy for c in chunks if c.entropy is not None]
    return Scored(mx.concatenate([c.logprobs for c in chunks]), mx.concatenate(entropies) if entropy else None)


def tokens_at_once(vocabulary: int) -> int:
    """Return the number of tokens of one chunk on the default device."""
    more = 2 if cuda.is_default() else 1  # its kernel keeps few arrays of a chunk's size
    return max(_FEWEST, more * _LOGITS[mx.default_device().type] // vocabulary)


def _log_softmax(
    z: mx.array, targets: mx.array, entropy: bool, exp: Callable[[mx.array], mx.array] = mx.exp
) -> tuple[mx.array, mx.array | None, mx.array, mx.array]:
    """Return log-probs of ``targets`` under logits z (N, V), entropies (N,), e = exp(z - max z) and its sums.

    Targets and their log-probs are (N,), or (N, K).
    H = log sum_v e_v - sum_v e_v (z_v - max z) / sum_v e_v.
    """
    shifted = z - z.max(axis=-1, keepdims=True)
    mass = exp(shifted)
    total = mass.sum(axis=-1)
    picked = mx.take_along_axis(shifted, targets.reshape(len(z), -1), axis=-1)
    logprobs = (picked - mx.log(total)[:, None]).reshape(targets.shape)
    if not entropy:
        return logprobs, None, mass, total
    mean = (mass * mx.maximum(shifted, -1e30)).sum(axis=-1) / total  # 0 * -inf is not a number
    return logprobs, mx.log(total) - mean, mass, total


def _without_slopes(z: mx.array, targets: mx.array, temperatures: mx.array, entropy: bool) -> Scored:
    """Score with logits z (N, V), for no gradient."""
    if targets.ndim == 1 and cuda.can_draw(z):
        logprobs, spread, _ = cuda.score(z, targets, temperatures, slopes=False)
        return Scored(logprobs, spread if entropy else None)
    z = z.astype(mx.float32) / temperatures[:, None]
    return Scored(*_log_softmax(z, targets, entropy)[:2])


def _with_slopes(
    head: Callable[[mx.array], mx.array], hidden: mx.array, targets: mx.array, temperatures: mx.array
) -> Scored:
    """Score with z = head(hidden) / temperature and p = softmax(z): the slope of log p_target by z is onehot - p.

    The slope is taken back to ``hidden`` at once. As each log-prob depends on its own hidden state only,
    the gradient of their weighted sum is those rows times the weights.
    """

    @mx.custom_function
    def picked(z: mx.array) -> list[mx.array]:
        if cuda.can_draw(z):
            logprobs, _, slopes = cuda.score(z, targets, temperatures)
            return [logprobs, slopes]
        z, dtype = z.astype(mx.float32) / temperatures[:, None], z.dtype
        logprobs, _, mass, total = _log_softmax(z, targets, False, exp_without_gradient)
        slopes = (mx.arange(z.shape[-1]) == targets[:, None]) - mass / total[:, None]
        return [logprobs, (slopes / temperatures[:, None]).astype(dtype)]

    @picked.vjp
    def slopes(z: mx.array, weights: list[mx.array], out: list[mx.array]) -> mx.array:
        return out[-1]  # of the sum of the log-probs

    def forward(hidden: mx.array) -> tuple[mx.array, mx.array]:
        found: Any = picked(head(hidden))
        return found[0].sum(), found[0]

    @mx.custom_function
    def scored(hidden: mx.array) -> list[mx.array]:
        (_, logprobs), slopes = mx.value_and_grad(forward)(hidden)
        return [logprobs, slopes]

    @scored.vjp
    def backward(hidden: mx.array, weights: list[mx.array], out: list[mx.array]) -> mx.array:
        return (weights[0][:, None] * out[-1].astype(mx.float32)).astype(hidden.dtype)

    out: Any = scored(hidden)
    return Scored(out[0], None)


def _recomputed(
    split: Split,
    trained: dict[str, mx.array],
    hidden: mx.array,
    targets: mx.array,
    temperatures: mx.array,
    entropy: bool,
) -> Scored:
    """Score so that the backward pass makes the logits again, with gradients for a head's ``trained``."""

    def forward(trained: dict[str, mx.array], hidden: mx.array) -> list[mx.array]:
        with parameters(split.model, trained):
            z = split.head(hidden).astype(mx.float32) / temperatures[:, None]
            logprobs, h, _, _ = _log_softmax(z, targets, entropy)
        return [logprobs] if h is None else [logprobs, h]

    out: Any = mx.checkpoint(forward)(trained, hidden)
    return Scored(out[0], out[1] if entropy else None)


def _outputs(model: nn.Module, path: Path, tokens: mx.array, cache: Any = None) -> list[Any]:
    """Return the output of each call of the module at ``path`` while ``model`` reads ``tokens``."""
    seen: list[Any] = []

    def call(module: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(module(*args, **kwargs))
        return seen[-1]

    with_child(model, path, lambda module: StandIn(module, partial(call, module)))(tokens, cache=cache)
    return seen


def _find_body(model: nn.Module, path: Path = ()) -> Path:
    """Return the path to a module whose output alone determines the logits, per position; or () without one."""
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
        # An output as wide as the logits is the logits: of a model within the model, or of the head itself.
        found = here if outputs[0].shape[-1] != logits.shape[-1] else _find_body(model, here)
        if found:
            return found
    return ()
