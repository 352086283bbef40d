"""A tiny base with tenants, and oracles that share nothing with them."""

import mlx.core as mx
import numpy as np
from conftest import VOCABULARY, tiny_llama
from mlx.utils import tree_flatten

from textpolicy.mlx.adapters.merging import trainable
from textpolicy.mlx.tenants.model import Base
from textpolicy.serving import Adapter, Datum


class Stops:
    """A tokenizer that knows only how a completion ends."""

    eos_token_id, chat_template = 0, None


def tiny_base(model=None, context=256):
    return Base("tiny", model or tiny_llama(VOCABULARY), Stops(), context=context)


def moved(learner, seed=0, by=0.2):
    """The learner with random values for its arrays, of which half begin at zero."""
    rng = np.random.default_rng(seed)
    values = [(n, v + mx.array(rng.normal(0, by, v.shape).astype(np.float32))) for n, v in arrays(learner).items()]
    learner.model.load_weights(values, strict=False)
    return learner


def tenant(base, seed=0, **settings):
    return moved(base.learner(Adapter(rank=4, seed=seed, **settings)), seed)


def arrays(learner):
    return trainable(learner.model)


def flat(tree):
    return {name: np.array(value, np.float64) for name, value in tree_flatten(tree)}


def log_softmax(model, tokens):
    """(T, V) of one sequence, read whole and without a cache."""
    logits = model(mx.array(np.asarray(tokens)[None]))[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def picked(model, datum):
    """The log-probs of a datum's targets, in their shape."""
    targets = np.asarray(datum.inputs["target_tokens"])
    wide = mx.array(targets.reshape(len(targets), -1))
    return mx.take_along_axis(log_softmax(model, datum.tokens), wide, axis=-1).reshape(targets.shape)


def made(rng, length, prompt=(), k=None, cross_entropy=False):
    """A datum of ``length`` positions after those of ``prompt``, which have no part in the loss."""
    tokens = np.concatenate([np.asarray(prompt, int), rng.integers(1, VOCABULARY, length + 1)])
    n = len(tokens) - 1
    own = np.arange(n) >= len(prompt)
    if cross_entropy:
        targets = tokens[1:] if k is None else rng.integers(1, VOCABULARY, (n, k))
        weights = rng.normal(0, 1, targets.shape) * own.reshape(-1, *[1] * (targets.ndim - 1))
        return Datum(tokens[:-1], {"target_tokens": targets, "weights": weights})
    inputs = {"logprobs": rng.uniform(-7, -4, n) * own, "advantages": rng.normal(0, 1, n) * own}
    return Datum(tokens[:-1], {"target_tokens": tokens[1:], **inputs})
