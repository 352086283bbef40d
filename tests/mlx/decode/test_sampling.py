"""Drawing tokens: the right distribution, its exact log-prob and entropy."""

import mlx.core as mx
import numpy as np
import pytest
from scipy.special import log_softmax
from scipy.stats import chisquare

from textpolicy.mlx.decode.decoder import RepetitionPenalty
from textpolicy.mlx.decode.sampling import Keep, draw, uniforms


def logits(rows, vocabulary, seed=0):
    return np.random.default_rng(seed).normal(0, 3, (rows, vocabulary)).astype(np.float32)


@pytest.mark.parametrize("vocabulary", [5, 256, 1000])
def test_tokens_follow_the_softmax(vocabulary):
    row = logits(1, vocabulary)
    n = 20_000
    uniform = mx.array(np.random.default_rng(1).random(n, np.float32))
    tokens = draw(mx.array(row), mx.zeros(n, mx.int32), uniform, 1.0).tokens
    expected = np.exp(log_softmax(row[0].astype(np.float64))) * n
    likely = expected > 5
    counts = np.bincount(np.array(tokens), minlength=vocabulary)
    observed = np.append(counts[likely], counts[~likely].sum())
    rare = max(expected[~likely].sum(), 1e-9)
    keep = len(observed) if rare > 5 else -1
    total = observed[:keep].sum()
    shares = np.append(expected[likely], rare)[:keep]
    assert chisquare(observed[:keep], shares / shares.sum() * total).pvalue > 1e-4


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_logprob_and_entropy_are_those_of_the_tempered_distribution(temperature):
    rows = logits(6, 777)
    drawn = draw(mx.array(rows), mx.arange(6), mx.array(np.linspace(0, 0.99, 6, dtype=np.float32)), temperature)
    exact = log_softmax(rows.astype(np.float64) / temperature, axis=1)
    tokens = np.array(drawn.tokens)
    np.testing.assert_allclose(np.array(drawn.logprobs), exact[np.arange(6), tokens], atol=1e-5)
    np.testing.assert_allclose(np.array(drawn.entropy), -(np.exp(exact) * exact).sum(1), atol=1e-5)


def test_the_largest_uniform_number_still_draws_a_possible_token():
    row = np.full((1, 300), -np.inf, np.float32)
    row[0, [3, 40]] = 0.0
    for u in (0.0, 0.49999, 0.50001, np.nextafter(np.float32(1), np.float32(0))):
        assert draw(mx.array(row), mx.zeros(1, mx.int32), mx.array(np.array([u], np.float32)), 1.0).tokens.item() in (
            3,
            40,
        )


def test_temperature_zero_takes_the_likeliest_token():
    rows = logits(4, 500)
    drawn = draw(mx.array(rows), mx.arange(4), mx.array(np.full(4, 0.9, np.float32)), 0.0)
    np.testing.assert_array_equal(np.array(drawn.tokens), rows.argmax(1))


def test_top_p_keeps_the_smallest_set_that_reaches_it_and_rescales():
    row = np.log(np.array([[0.1, 0.5, 0.3, 0.1]], np.float32))
    drawn = [
        draw(mx.array(row), mx.zeros(1, mx.int32), mx.array(np.array([u], np.float32)), 1.0, Keep(top_p=0.6))
        for u in np.linspace(0, 0.999, 50)
    ]
    assert {d.tokens.item() for d in drawn} == {1, 2}
    chosen = drawn[0]
    share = {1: 0.625, 2: 0.375}[chosen.tokens.item()]
    assert chosen.logprobs.item() == pytest.approx(np.log(share), abs=1e-5)
    assert np.isfinite(chosen.entropy.item())


def test_the_penalty_makes_seen_tokens_less_likely_on_either_side_of_zero():
    penalty = RepetitionPenalty(2.0, seen=np.array([[True, True, False]]))
    assert penalty(mx.array([[2.0, -2.0, 1.0]]), np.array([0])).tolist() == [[1.0, -4.0, 1.0]]


def test_a_sequences_random_numbers_depend_on_seed_and_place_alone():
    np.testing.assert_array_equal(uniforms(3, 5, 4), uniforms(3, 5, 9)[:4])
    assert not np.array_equal(uniforms(3, 5, 4), uniforms(3, 6, 4))
    assert not np.array_equal(uniforms(3, 5, 4), uniforms(4, 5, 4))
