"""The decoding loop: max_rows, order and computing ahead change no completion."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textpolicy.engine import Sampling
from textpolicy.errors import UserError
from textpolicy.mlx.decode.decoder import decode

STOP = np.array([0, 3, 17, 40, 55, 71, 90, 118, 150, 200, 244, 290], np.int32)
PROMPTS = [np.array(p, np.int32) for p in ([5, 6, 7], [5, 6, 8, 9, 10], [11], [5, 6, 7], [12, 13]) for _ in range(4)]


def completions(model, sampling, max_rows, ahead, prompts=PROMPTS):
    return decode(model, prompts, sampling, STOP, max_rows, ahead)


def assert_same(ours, expected, atol=5e-5):
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=atol)
        np.testing.assert_allclose(a.entropy, b.entropy, atol=atol)
        assert a.truncated == b.truncated


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("max_rows", [1, 3, 7, 20, 100])
def test_neither_max_rows_nor_computing_ahead_changes_a_completion(tiny_engine, max_rows, ahead):
    sampling = Sampling(max_tokens=24, seed=3)
    expected = completions(tiny_engine.model, sampling, 100, False)
    lengths = [len(c.tokens) for c in expected]
    assert min(lengths) < max(lengths)  # so that completions do leave at different times
    assert_same(completions(tiny_engine.model, sampling, max_rows, ahead), expected)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 12), st.booleans(), st.integers(0, 1000))
def test_every_completion_ends_at_a_stop_token_or_the_limit_for_any_max_rows(
    tiny_engine_once, tokens, max_rows, ahead, seed
):
    for c in completions(tiny_engine_once.model, Sampling(max_tokens=tokens, seed=seed), max_rows, ahead):
        stops = np.isin(c.tokens, STOP)
        assert not stops[:-1].any()
        assert 1 <= len(c.tokens) <= tokens
        assert c.truncated == (not stops[-1])
        assert c.truncated <= (len(c.tokens) == tokens)


@pytest.fixture(scope="module")
def tiny_engine_once():
    from conftest import make_tiny_engine

    return make_tiny_engine(300)


def test_computing_ahead_changes_no_greedy_completion(tiny_engine):
    greedy = Sampling(max_tokens=12, temperature=0.0)
    assert_same(completions(tiny_engine.model, greedy, 5, True), completions(tiny_engine.model, greedy, 5, False))


def test_a_repetition_penalty_applies_before_the_next_token_even_when_computing_ahead(tiny_engine):
    penalised = Sampling(max_tokens=12, repetition_penalty=5.0, seed=1)
    assert_same(
        completions(tiny_engine.model, penalised, 5, True), completions(tiny_engine.model, penalised, 100, False)
    )


@pytest.mark.parametrize("kept", [{"top_k": 2}, {"min_p": 0.9}, {"top_p": 0.01}])
def test_filtered_tokens_are_never_drawn_and_training_refuses_the_rest(tiny_engine, kept):
    every = {c.tokens[0] for c in completions(tiny_engine.model, Sampling(max_tokens=1), 100, False, [PROMPTS[0]] * 60)}
    sampling = Sampling(max_tokens=1, **kept)
    few = completions(tiny_engine.model, sampling, 100, False, [PROMPTS[0]] * 60)
    assert len({c.tokens[0] for c in few}) <= 4 < len(every)
    assert sampling.scored_temperature is None
    assert all(c.temperature is None for c in few)
    np.testing.assert_allclose([c.logprobs[0] <= 0 for c in few], True)


@pytest.mark.parametrize("odd", [{"top_k": -1}, {"min_p": 1.5}, {"min_p": -0.1}])
def test_filters_that_make_no_sense_are_refused(odd):
    with pytest.raises(UserError, match=f"{next(iter(odd))} is"):
        Sampling(**odd)


def test_the_probabilities_of_top_k_are_those_of_the_k_most_likely(tiny_engine):
    drawn = completions(tiny_engine.model, Sampling(max_tokens=1, top_k=3), 100, False, [PROMPTS[0]] * 80)
    by_token = {int(c.tokens[0]): float(np.exp(c.logprobs[0])) for c in drawn}
    assert len(by_token) == 3
    assert sum(by_token.values()) == pytest.approx(1, abs=1e-5)
