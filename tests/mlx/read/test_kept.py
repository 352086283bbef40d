"""Turns that continue what was read before: the same completions, of which only the rest is read."""

import numpy as np
import pytest
from families import mx, tiny_family

from textpolicy.engine import Sampling
from textpolicy.mlx.decode.compiled_steps import Steps
from textpolicy.mlx.decode.decoder import decode
from textpolicy.mlx.engine import MLXEngine
from textpolicy.mlx.read.context import Context
from textpolicy.mlx.read.prompts import Kept, PromptTree

FAMILIES = ("llama", "gemma3_text", "qwen3_next", "mamba")  # full attention, a sliding window, running states
STOP = np.arange(0, 60, 4)


def played(model, turns, kept, steps=None, max_rows=4, ahead=False):
    """The completions of every turn of ten conversations; texts of equal beginnings and of replies of other lengths."""
    rng, texts, out = np.random.default_rng(0), [], []
    beginnings = [rng.integers(1, 60, n).tolist() for n in (3, 9, 9, 14, 20)]
    texts = [np.array(beginning, np.int32) for beginning in beginnings for _ in range(2)]
    for turn in range(turns):
        sampled = decode(model, texts, Sampling(12, seed=turn), STOP, max_rows, ahead, steps=steps, kept=kept)
        out.append(sampled)
        replies = [rng.integers(1, 60, rng.integers(1, 6)) for _ in texts]
        texts = [
            np.concatenate(parts).astype(np.int32)
            for parts in zip(texts, (c.tokens for c in sampled), replies, strict=True)
        ]
        if turn == 0:
            texts[4] = texts[4][1:]  # one that continues nothing
    return out


def read_tokens(monkeypatch):
    """A list that gets the number of tokens of every read."""
    counts, read = [], Context.read

    def counted(self, model, tokens, lengths=None):
        counts.append(tokens.size)
        return read(self, model, tokens, lengths)

    monkeypatch.setattr(Context, "read", counted)
    return counts


def assert_same(ours, expected):
    for a, b in zip([c for turn in ours for c in turn], [c for turn in expected for c in turn], strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        assert a.truncated == b.truncated


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_turns_are_the_same_and_read_only_what_is_new(family, ahead, monkeypatch):
    model, counts = tiny_family(family), read_tokens(monkeypatch)
    expected = played(model, 3, None, ahead=ahead)
    without = sum(counts)
    counts.clear()
    kept = Kept(room=1e9)
    assert_same(played(model, 3, kept, ahead=ahead), expected)
    assert kept.nbytes == sum(context.nbytes for context in kept.contexts.values())
    assert len(kept.contexts) <= 11  # the last text of each conversation, and one that nothing continued
    if not (ahead and Context(model).recurrent):  # most running states have read a token beyond the end
        assert sum(counts) < 0.75 * without


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_steps_continue_earlier_turns(family, monkeypatch):
    model = tiny_family(family)
    steps = Steps(model, compiled=False)
    read, found = PromptTree.read, []

    def noted(tree, model, spare=0, kept=None):
        heads = [np.concatenate([tree.header, rest[:n]]) for rest, n in zip(tree.rests, tree.lengths, strict=True)]
        found.extend(kept is not None and kept.longest(head) is not None for head in heads)
        return read(tree, model, spare, kept)

    monkeypatch.setattr(PromptTree, "read", noted)
    assert_same(played(model, 3, Kept(room=1e9), steps, ahead=True), played(model, 3, None))
    assert any(found) or Context(model).recurrent  # most running states have read a token beyond the end


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_texts_that_continue_have_room_for_the_rest_and_what_follows(family):
    """So that their keys and values are copied once, and not again when the rest is read and tokens are drawn."""
    model, rng, kept = tiny_family(family), np.random.default_rng(0), Kept(room=1e9)
    texts = [rng.integers(1, 60, n).astype(np.int32) for n in (12, 17, 9)]
    for text in texts:
        context = Context(model)
        context.read(model, mx.array(text)[None])
        kept.add(text, context)
    longer = [
        np.append(text, rng.integers(1, 60, n)).astype(np.int32) for text, n in zip(texts, (4, 2, 6), strict=True)
    ]
    context = PromptTree.build(longer).read(model, 8, kept)
    slots = [layer.keys.shape[2] for layer in context.layers]
    for _ in range(8):
        logits = context.read(model, mx.array([[7]] * 3))
    assert [layer.keys.shape[2] for layer in context.layers] == slots
    alone = PromptTree.build(longer).read(model, 8)
    for _ in range(8):
        expected = alone.read(model, mx.array([[7]] * 3))
    np.testing.assert_allclose(np.array(logits), np.array(expected), atol=1e-4)
    assert not kept.contexts


@pytest.mark.parametrize("room", [0, 40_000])
def test_what_has_no_room_is_read_again(room):
    model = tiny_family("llama")
    kept = Kept(room=room)
    assert_same(played(model, 3, kept), played(model, 3, None))
    assert kept.nbytes <= room
    assert bool(kept.contexts) == (room > 0)


def test_an_engine_keeps_turns_only_while_it_is_asked_to(monkeypatch):
    engine, counts = MLXEngine(tiny_family("llama"), stop=STOP.tolist(), compile=False), read_tokens(monkeypatch)

    def second_turn():
        [[first]] = engine.sample([list(range(1, 41))], 1, Sampling(8, seed=3))
        assert not first.truncated
        counts.clear()
        [[second]] = engine.sample([[*range(1, 41), *first.tokens.tolist(), 5, 6]], 1, Sampling(1, seed=4))
        return second.tokens.tolist(), counts[0]

    said, whole = second_turn()
    with engine.keep_turns():
        assert second_turn() == (said, 2)  # the stop token and the first of the reply; the last is read by the step
    assert second_turn() == (said, whole)
