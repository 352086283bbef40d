"""Rollouts and updates as a Mac runs them: compiled, ahead of Python, without what is a CPU's or CUDA's."""

import logging
import sys
from itertools import chain

import mlx.core as mx
import numpy as np
from architectures import adapted
from conftest import VOCABULARY, random_episodes, recipe
from pretended_metal import metal  # noqa: F401 (a fixture)

from textpolicy.engine import Sampling
from textpolicy.losses import Surrogate
from textpolicy.mlx.decode.folded_weights import copies
from textpolicy.mlx.engine import MLXEngine
from textpolicy.mlx.probe import describe_mlx

PROMPTS = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 8, 10]]


def run(model, steps=3):
    """Return the completions before any step, and what each of ``steps`` updates reports."""
    engine = MLXEngine(model, stop=[0], decode_rows=4)
    rollout = engine.sample(PROMPTS, 2, Sampling(max_tokens=6, seed=3))
    rows = recipe("sapo").credit(random_episodes(np.random.default_rng(7), groups=2, size=2))
    return engine, rollout, [engine.update(rows, Surrogate(), 1e-2) for _ in range(steps)]


def test_a_mac_computes_what_a_cpu_does(monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        engine, rollout, updates = run(adapted("qwen3", head_dim=64, vocab_size=VOCABULARY))
    assert engine.compiled
    assert engine.platform["device"].startswith("Device(gpu, 0) Apple")
    assert describe_mlx()["device"] == "gpu"
    assert copies(engine.model) == 0
    assert caplog.messages or sys.platform == "darwin"  # pretended kernels are found out and not used
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    other, expected, exact = run(adapted("qwen3", head_dim=64, vocab_size=VOCABULARY))
    assert not other.compiled
    for ours, theirs in zip(chain(*rollout), chain(*expected), strict=True):
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
    for ours, theirs in zip(updates, exact, strict=True):
        for name in set(theirs) - {"peak_memory_bytes"}:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-4, err_msg=name)
