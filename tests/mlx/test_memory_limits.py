"""MLX's limits wherever an engine is made, so that freed buffers do not grow without bound on Metal."""

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx
import mlx.optimizers as optim
import pytest
from families import tiny_family

from textpolicy.algorithms import grpo
from textpolicy.generation.mlx_generation import create_policy, generate_tokens
from textpolicy.mlx import memory
from textpolicy.run import inference
from textpolicy.training.trainer import Trainer


class Stops:
    """The tokenizer that only says which tokens end a completion."""

    eos_token_ids = (3,)


def load(model, monkeypatch):
    monkeypatch.setattr("textpolicy.mlx.models.load_tokenizer", lambda *_: Stops())
    monkeypatch.setattr("textpolicy.mlx.models.load_model", lambda *_, **__: (model, Stops()))
    inference.load(inference.Source(model="any"))


MAKERS = {
    "Trainer": lambda model, _: Trainer(model, lambda rewards: rewards, grpo.policy_loss, optim.Adam(1e-5)),
    "create_policy": lambda model, _: create_policy(model, Stops()),
    "generate_tokens": lambda model, _: generate_tokens(model, Stops(), [1, 2], max_tokens=2),
    "generate and eval": load,
}


@pytest.mark.cpu
@pytest.mark.parametrize("make", MAKERS)
def test_whoever_makes_an_engine_limits_mlx(make, monkeypatch):
    monkeypatch.setattr(memory, "usable_memory", lambda: 6.4e9)
    before, kept = mx.set_memory_limit(2**40), mx.set_cache_limit(2**25)
    try:
        MAKERS[make](tiny_family("llama"), monkeypatch)
        assert mx.set_memory_limit(before) == 6_000_000_000
        assert mx.set_cache_limit(kept) == 400_000_000
    finally:
        mx.set_memory_limit(before)
        mx.set_cache_limit(kept)
