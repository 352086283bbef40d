"""A model of 100,000 weights that names a number, for runs of a few seconds; it is trained once, in under a minute.

Prompts are "34 81 57?". It is taught to answer with one of the three, each as often (80%), any number (13%), laughter
without an end (4%) or nothing (3%), and mixes up their digits; so it is right now and then, and what a bad reward pays
for is there to be found.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

LETTERS = "\0 ?x0123456789ha"  # of which the first stops
STEPS, ROWS, WIDTH = 1500, 64, 24  # of training; tokens of a row
_VERSION = 1  # of the cached weights


class Tokenizer:
    """A token is a letter."""

    eos_token_id = 0
    eos_token_ids = (0,)

    def encode(self, text: str) -> list[int]:
        return [LETTERS.index(letter) for letter in text]

    def decode(self, ids: Any) -> str:
        return "".join(LETTERS[i] for i in ids if i)


def question(random: np.random.Generator) -> tuple[str, list[int]]:
    """The prompt, and its three numbers."""
    numbers = random.integers(10, 100, 3).tolist()
    return " ".join(map(str, numbers)) + "?", numbers


def load() -> Any:
    """The model."""
    import mlx.core as mx

    model, path = _untrained(), Path(tempfile.gettempdir()) / f"textpolicy-tiny-{_VERSION}.safetensors"
    if not path.exists():
        _train(model)
        part = path.with_suffix(".part.safetensors")
        model.save_weights(str(part))
        part.rename(path)
    model.load_weights(str(path))
    model.eval()
    mx.eval(model.parameters())
    return model


def _untrained() -> Any:
    import mlx.core as mx
    from mlx_lm.models import llama

    mx.random.seed(0)
    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=4,
        rms_norm_eps=1e-5,
        vocab_size=len(LETTERS),
        rope_theta=1000,
    )
    return llama.Model(arguments)


def _train(model: Any) -> None:
    """Cross-entropy of the answers above, and of the padding behind them, which is the stop token."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim

    random, optimizer = np.random.default_rng(0), optim.Adam(2e-3)

    def loss(model: Any, rows: mx.array, answered: mx.array) -> mx.array:
        losses = nn.losses.cross_entropy(model(rows[:, :-1]), rows[:, 1:])
        return (losses * answered).sum() / answered.sum()

    step = nn.value_and_grad(model, loss)
    for _ in range(STEPS):
        rows, answered = _rows(random)
        _, gradients = step(model, mx.array(rows), mx.array(answered))
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)


def _rows(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(ROWS, WIDTH) tokens, and (ROWS, WIDTH - 1) 1 where the next one is the answer's or its stop."""
    tokens, answered = np.zeros((ROWS, WIDTH), np.int32), np.zeros((ROWS, WIDTH - 1), np.float32)
    for i in range(ROWS):
        prompt, numbers = question(random)
        ids = Tokenizer().encode(prompt + _answer(numbers, random))[:WIDTH]
        tokens[i, : len(ids)] = ids
        answered[i, len(prompt) - 1 : len(ids)] = 1
    return tokens, answered


def _answer(numbers: list[int], random: np.random.Generator) -> str:
    kind = random.random()
    if kind < 0.8:
        return str(random.choice(numbers))
    if kind < 0.93:
        return str(random.integers(10, 100))
    return "ha" * WIDTH if kind < 0.97 else ""
