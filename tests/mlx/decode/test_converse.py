"""Conversations whose turns begin as soon as the one before has ended: the same turns as in rounds of all."""

import numpy as np
import pytest
from families import tiny_family

from textpolicy.engine import Sampling, conversing
from textpolicy.errors import UserError
from textpolicy.loop.collect import _by_rounds
from textpolicy.mlx.decode.compiled_steps import Steps
from textpolicy.mlx.engine import MLXEngine

STOP = list(range(0, 60, 5))
PROMPTS = [[5, 6, 8, 9], [11, 12], [5, 6, 8, 9, 10, 11, 12, 13, 14], [21, 22, 23]]
ROUNDS = 5


class Partner:
    """Ends conversation i after 1 to ROUNDS turns and answers the others in words that depend on what was said."""

    def __init__(self, prompts, n, during=lambda: None):
        self.texts = [list(prompt) for prompt in prompts for _ in range(n)]
        self.heard, self.order, self.during = [[] for _ in self.texts], [], during

    def __call__(self, i, completion):
        self.during()
        self.heard[i].append(completion)
        self.order.append(i)
        if len(self.heard[i]) > (i * 3) % ROUNDS:
            return None
        said = completion.tokens.tolist()
        self.texts[i] = [*self.texts[i], *said, *range(31, 32 + sum(said) % 7)]
        return self.texts[i]


def engine_of(family, **settings):
    return MLXEngine(tiny_family(family), stop=STOP, compile=False, **settings)


def talked(engine, sampling, n=3, prompts=PROMPTS, take_turns=None, during=lambda: None):
    partner = Partner(prompts, n, during)
    streams = [7 * i + 1 for i in range(len(partner.texts))]
    with engine.keep_turns():
        (take_turns or MLXEngine.converse)(engine, prompts, n, sampling, streams, partner)
    return partner


def assert_same(ours, expected):
    for a, b in zip(
        (c for turns in ours.heard for c in turns), (c for turns in expected.heard for c in turns), strict=True
    ):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        np.testing.assert_allclose(a.entropy, b.entropy, atol=1e-4)
        assert a.truncated == b.truncated


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("max_rows", [1, 3, 128])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next", "gpt_oss"])
def test_turns_are_those_of_rounds(family, max_rows, drafts):
    engine, sampling = engine_of(family, decode_rows=max_rows), Sampling(14, seed=4)
    engine.drafts = drafts
    expected = talked(engine, sampling, take_turns=_by_rounds)
    found = talked(engine, sampling)
    assert_same(found, expected)
    assert [len(turns) for turns in found.heard] == [1 + (i * 3) % ROUNDS for i in range(12)]
    assert engine._kept is None


@pytest.mark.cpu
def test_a_turn_begins_while_others_are_decoded():
    engine = engine_of("llama")
    order = talked(engine, Sampling(14, seed=4)).order
    firsts = max(order.index(i) for i in range(12))
    assert any(order[:firsts].count(i) > 1 for i in range(12))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
def test_where_steps_are_computed_ahead_turns_go_in_rounds(family, monkeypatch):
    """As on a GPU, by compiled steps."""
    from textpolicy.mlx.decode import decoder

    engine, sampling, true = engine_of(family, decode_rows=5), Sampling(14, seed=4), decoder._Decoder.of
    expected = talked(engine, sampling, take_turns=_by_rounds)
    monkeypatch.setattr(decoder._Decoder, "of", lambda *a, **k: true(*a, **k, ahead=True))
    engine._steps, engine._tried_steps = Steps(engine.model, compiled=False), True
    found = talked(engine, sampling)
    assert_same(found, expected)
    turns = [found.order[: k + 1].count(i) for k, i in enumerate(found.order)]
    assert turns == sorted(turns)


def test_a_repetition_penalty_counts_the_whole_conversation():
    engine, sampling = engine_of("llama"), Sampling(14, seed=4, repetition_penalty=1.5)
    assert_same(talked(engine, sampling), talked(engine, sampling, take_turns=_by_rounds))


def test_a_partner_may_sample_from_the_same_engine():
    engine, sampling, sampled = engine_of("llama"), Sampling(14, seed=4), []
    expected = talked(engine, sampling)

    def during():
        sampled.append(engine.sample([[5, 6, 7]], 2, Sampling(6, seed=len(sampled))))

    assert_same(talked(engine, sampling, during=during), expected)
    alone = [engine.sample([[5, 6, 7]], 2, Sampling(6, seed=i)) for i in range(len(sampled))]
    for [a], [b] in zip(sampled, alone, strict=True):
        assert [c.tokens.tolist() for c in a] == [c.tokens.tolist() for c in b]


def test_no_code_of_a_partner_meets_a_patched_model():
    from mlx_lm.models import llama

    engine, true = engine_of("llama"), llama.scaled_dot_product_attention
    found = []
    talked(engine, Sampling(14), during=lambda: found.append(llama.scaled_dot_product_attention is true))
    assert len(found) > 12
    assert all(found)


def test_what_was_read_is_forgotten_when_it_goes_on():
    engine, sizes = engine_of("llama"), []
    talked(engine, Sampling(14, seed=4), during=lambda: sizes.append(len(engine._kept.contexts)))
    assert 0 < max(sizes) <= 12
    assert len(sizes) > 24  # turns, of which each but a truncated one was kept for a while


def test_an_engine_that_samples_in_its_own_way_is_asked_for_every_turn(monkeypatch):
    class Wrapped:
        def __init__(self, engine):
            self.engine = engine

        def sample(self, *arguments):
            return self.engine.sample(*arguments)

        def __getattr__(self, name):
            return getattr(self.engine, name)

    class Counting(MLXEngine):
        def sample(self, *arguments):
            return super().sample(*arguments)

    engine = engine_of("llama")
    assert conversing(engine) is engine
    assert conversing(Wrapped(engine)) is None
    assert conversing(Counting(engine.model, stop=STOP)) is None
    monkeypatch.setattr(engine, "sample", lambda *_: [])
    assert conversing(engine) is None


def test_what_cannot_be_sampled_is_refused():
    engine = engine_of("llama")
    engine.converse([], 2, Sampling(4), [], lambda i, completion: pytest.fail("nothing was said"))
    with pytest.raises(UserError, match="is empty"):
        engine.converse([[1, 2]], 1, Sampling(4), [0], lambda i, completion: [])
    with pytest.raises(UserError, match="60"):
        engine.converse([[1, 2]], 1, Sampling(4), [0], lambda i, completion: [1, 2, 600])
