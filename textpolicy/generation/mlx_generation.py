"""Make a rollout policy of a model, and convert between text and token ids."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..engine import Sampling, stop_tokens
from ..errors import unknown_name
from ..mlx.engine import MLXEngine
from ..mlx.memory import limit_memory
from ..mlx.models import load_model as load_model
from ..types import token_ids

_EARLIER = (  # generation parameters of 0.1.11 that chose among its decoders
    "decode_backend", "decode_backend_options", "profile_decode_stats", "draft_model", "draft_model_id",
    "num_draft_tokens",
)  # fmt: skip
logger = logging.getLogger(__name__)

Output = tuple[mx.array, dict[str, Any]]  # ids (R,) int32 with the stop token; logprob, entropy and more


@dataclass(frozen=True, eq=False)
class Policy:
    """The policy that completes token ids with a model's current weights; it applies no chat template.

    It is frozen except for ``draws``, which counts the sampled calls: each has a seed of its own, so
    successive calls differ, and two policies with the same ``sampling.seed`` return the same completions in the
    same order. A deterministic call is not counted.
    """

    engine: MLXEngine
    sampling: Sampling
    draws: Iterator[int] = field(default_factory=itertools.count)

    def __call__(self, prompt_tokens: Any, deterministic: bool = False) -> Output:
        """Return a completion of one prompt (P,), as ``sample_batch`` does."""
        return self.sample_batch([prompt_tokens], deterministic)[0]

    def sample_batch(self, prompts: Sequence[Any], deterministic: bool = False) -> list[Output]:
        """Return a completion for each prompt of token ids (P,), decoded together.

        Extras: logprob and entropy (R,) float32, in nats, of the distribution sampled from, and its
        temperature, which is None for a truncated or penalised distribution (top_p, repetition penalty): no
        learner can score that, and training refuses it. truncated: max_tokens ended it, not a stop token.
        ``deterministic`` always takes the most likely token.
        """
        ids = [token_ids(p).tolist() for p in prompts]
        greedy = replace(self.sampling, temperature=0.0)
        sampling = greedy if deterministic else self.sampling.reseeded(next(self.draws))
        outputs: list[Output] = []
        for [completion] in self.engine.sample(ids, 1, sampling):
            extras: dict[str, Any] = {
                "logprob": mx.array(completion.logprobs),
                "temperature": completion.temperature,
                "truncated": completion.truncated,
            }
            if completion.entropy is not None:
                extras["entropy"] = mx.array(completion.entropy)
            outputs.append((mx.array(completion.tokens), extras))
        return outputs


def create_policy(model: nn.Module, tokenizer: Any, generation_params: Mapping[str, Any] | None = None) -> Policy:
    """Return a policy that completes token ids with ``model``, up to one of the stop tokens of ``tokenizer``.

    ``generation_params`` may contain max_tokens (50), temperature (1.0), top_p (1.0), top_k (0),
    min_p (0.0), repetition_penalty (1.0) and seed (0); training can score samples of the defaults. Raises
    UserError for any other key, or a value out of range; keys of the decoders of version 0.1.11 change nothing.
    """
    params = dict(generation_params or {})
    for key in [key for key in _EARLIER if key in params]:
        logger.warning("the generation parameter %s has no effect, because there is one decoder; leave it out", key)
        del params[key]
    known = [f.name for f in fields(Sampling)]
    for key in params:
        if key not in known:
            raise unknown_name("generation parameter", key, known)
    limit_memory()
    return Policy(MLXEngine(model, stop=stop_tokens(tokenizer)), Sampling(**{"max_tokens": 50, **params}))


def generate_tokens(
    model: nn.Module,
    tokenizer: Any,
    prompt_tokens: Any,
    max_tokens: int = 50,
    temperature: float = 0.7,
    top_p: float = 0.9,
    repetition_penalty: float = 1.1,
) -> tuple[mx.array, dict[str, mx.array]]:
    """Return one completion of a prompt (P,): ids (R,) int32 with the stop token, and its logprob (R,) float32.

    The log-probs are of the distribution sampled from. ``mx.random.seed`` fixes what is drawn.
    """
    limit_memory()
    seed = int(np.asarray(mx.random.randint(0, 2**31 - 1)))
    sampling = Sampling(max_tokens, temperature, top_p, repetition_penalty, seed)
    policy = Policy(MLXEngine(model, stop=stop_tokens(tokenizer)), sampling)
    ids, extras = policy(prompt_tokens)
    return ids, {"logprob": extras["logprob"]}


def encode(tokenizer: Any, text: str) -> mx.array:
    """Return the token ids of ``text``, (n,) int32, without a chat template."""
    return mx.array(tokenizer.encode(text), mx.int32)


def decode(tokenizer: Any, tokens: Any) -> str:
    """Return the text of an array of token ids, without special tokens and outer whitespace."""
    return decode_token_ids(tokenizer, token_ids(tokens).tolist())


def decode_token_ids(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Return the text of a list of token ids, without special tokens and outer whitespace."""
    return tokenizer.decode(list(token_ids), skip_special_tokens=True).strip()
