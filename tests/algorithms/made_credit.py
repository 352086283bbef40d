"""Credit made up for tests: completions of given lengths, with what a test does not name set to plain values."""

from __future__ import annotations

import numpy as np

from textpolicy.algorithms.credit import Credit


def make_credit(lengths, **given) -> Credit:
    """One group with rewards 1, 0, 1, 0, ... and advantages of 1, unless ``given`` says otherwise."""
    lengths = np.asarray(lengths)
    tokens = int(lengths.sum())
    plain = {
        "advantage": np.ones(tokens),
        "uncertainty": np.ones(tokens),
        "entropy": np.ones(tokens),
        "planning": np.zeros(tokens, bool),
        "penalty": np.zeros(tokens),
        "row": np.repeat(np.arange(len(lengths)), lengths),
        "position": np.concatenate([np.arange(n) for n in lengths] or [np.zeros(0, int)]),
        "reward": (np.arange(len(lengths)) + 1.0) % 2,
        "group": np.zeros(len(lengths), int),
    }
    named = {name: value if value is None else np.asarray(value) for name, value in given.items()}
    return Credit(**(plain | named))


def random_lengths(rng: np.random.Generator, completions: int = 12) -> np.ndarray:
    """From 0 to 6 tokens each, some of them 0."""
    return rng.integers(0, 7, completions) * (rng.random(completions) < 0.9)
