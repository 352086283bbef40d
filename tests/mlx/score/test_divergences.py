"""Distilling whole distributions: TRL's divergences, chunks that change nothing, and gradients of plain operations."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import VOCABULARY, make_tiny_engine, random_episodes, tiny_llama
from mlx.utils import tree_flatten

from textpolicy.loop.teacher import with_prompt
from textpolicy.losses import divergence
from textpolicy.mlx.engine import MLXEngine
from textpolicy.mlx.score.divergences import token_divergences
from textpolicy.mlx.score.logprobs import Split
from textpolicy.types import Batch

GOLDEN = json.loads((Path(__file__).parents[2] / "data" / "divergence.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: str(case["beta"]))
def test_the_divergence_and_its_slope_are_those_of_trl(case):
    logits, teacher = (mx.array(GOLDEN[name], mx.float32) for name in ("student", "teacher"))

    def total(logits):
        found = divergence(nn.log_softmax(logits), nn.log_softmax(teacher), case["beta"], mx)
        return found.sum(), found

    (_, found), slope = mx.value_and_grad(total)(logits)
    assert np.array(found) == pytest.approx(np.array(case["divergence"]), abs=1e-5)
    assert np.array(slope) == pytest.approx(np.array(case["slope"]), abs=1e-5)
    exact = [
        np.log(np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True))
        for x in map(np.array, (GOLDEN["student"], GOLDEN["teacher"]))
    ]
    assert divergence(*exact, case["beta"], np) == pytest.approx(np.array(case["divergence"]), abs=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_chunks_change_neither_the_divergence_nor_its_gradient(beta):
    student, teacher = Split.of(tiny_llama(VOCABULARY)), Split.of(tiny_llama(VOCABULARY, seed=5))
    student.model.freeze()
    hidden, theirs = (0.3 * mx.random.normal((13, 32), key=mx.random.key(n)) for n in (1, 2))
    temperatures, weights = mx.full((13,), 0.7), mx.random.normal((13,), key=mx.random.key(3))

    def both(hidden):
        return [nn.log_softmax(s.head(h) / temperatures[:, None]) for s, h in ((student, hidden), (teacher, theirs))]

    def whole(hidden):
        return (weights * divergence(*both(hidden), beta, mx)).sum()

    def chunked(hidden):
        return (weights * token_divergences(student, hidden, teacher, theirs, temperatures, beta, at_once=4)).sum()

    (a, slope), (b, expected) = (mx.value_and_grad(f)(hidden) for f in (chunked, whole))
    # float32 rounds a log-prob by half of eps times its size, those of both models in either sum
    largest = max(mx.abs(logprobs).max().item() for logprobs in both(hidden))
    rounding = 4 * float(np.finfo(np.float32).eps) / 2 * largest * mx.abs(weights).sum().item()
    assert a.item() == pytest.approx(b.item(), abs=rounding)
    assert np.array(slope) == pytest.approx(np.array(expected), abs=1e-6)


@pytest.fixture
def rows():
    return random_episodes(np.random.default_rng(4))


def packed(rows):
    return Batch.pack(rows, [e.mask.astype(np.float32) for e in rows])


def gradients_of(engine, *arguments, **keywords):
    """The gradients of a step that is not taken, and its metrics."""
    seen = []
    engine.apply = lambda grads, rate: seen.append(grads) or 1.0
    return engine.distil(*arguments, **keywords), dict(tree_flatten(seen[0]))


@pytest.mark.parametrize("tokens", [20, 10_000])
@pytest.mark.parametrize("told", [False, True])
def test_a_step_has_the_gradient_of_all_rows_read_one_by_one(rows, told, tokens):
    engine, teacher = make_tiny_engine(VOCABULARY), MLXEngine(tiny_llama(VOCABULARY, seed=5), stop=[0])
    read = [with_prompt(e, [7, 8, 9, *range(1, 2 + e.group)]) for e in rows] if told else rows
    engine.micro_batch_tokens = tokens
    metrics, found = gradients_of(engine, packed(rows), packed(read), teacher, 0.5, 1e-3)

    def loss(model):
        total, count = 0.0, 0
        for e, o in zip(rows, read, strict=True):
            p, q = (nn.log_softmax(m(mx.array(x.tokens[None]))[0, :-1]) for m, x in ((model, e), (teacher.model, o)))
            at, there = (np.flatnonzero(x.mask[1:]) for x in (e, o))
            total = total + divergence(p[mx.array(at)], mx.stop_gradient(q[mx.array(there)]), 0.5, mx).sum()
            count += len(at)
        return total / count

    value, expected = nn.value_and_grad(engine.model, loss)(engine.model)
    assert metrics["loss"] == pytest.approx(value.item(), abs=1e-5)
    for name, gradient in tree_flatten(expected):
        assert np.linalg.norm(np.array(found[name] - gradient)) <= 1e-4 * np.linalg.norm(np.array(gradient)), name


def test_a_teacher_that_is_the_policy_gives_exactly_0(rows):
    engine = make_tiny_engine(VOCABULARY)
    for beta in (0.0, 0.5, 1.0):
        metrics, found = gradients_of(engine, packed(rows), packed(rows), engine, beta, 1e-3)
        assert metrics["loss"] == 0
        assert not any(mx.any(g != 0).item() for g in found.values())


def test_steps_bring_the_policy_to_its_base(rows):
    engine = make_tiny_engine(VOCABULARY)
    losses = [engine.distil(packed(rows), packed(rows), engine, 1.0, 0.02, reference=True)["loss"] for _ in range(12)]
    assert losses[-1] < 0.7 * losses[0]
