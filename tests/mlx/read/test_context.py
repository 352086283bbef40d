"""Forked and joined contexts: padding, positions, windows, room to grow, and what is refused."""

import gc

import mlx.core as mx
import numpy as np
import pytest
from conftest import VOCABULARY, make_tiny_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, KVCache, QuantizedKVCache, RotatingKVCache
from mlx_lm.models.deepseek_v41 import LayerCache

from textpolicy.errors import UserError
from textpolicy.mlx.read.context import Attention, Context
from textpolicy.mlx.read.prompts import PromptTree

TOKENS = st.lists(st.integers(1, 3), min_size=1, max_size=6)  # few distinct tokens, so that prompts share starts


def alone(model, tokens):
    return np.array(model(mx.array([tokens]))[0])


@settings(max_examples=20, deadline=None)
@given(st.lists(TOKENS, min_size=1, max_size=5))
def test_a_tree_contains_every_prompt_and_shares_the_longest_start(prompts):
    tree = PromptTree.build([np.array(p, np.int32) for p in prompts])
    for i, prompt in enumerate(prompts):
        parent = tree.parents[i]
        rest = tree.rests[parent, : tree.lengths[parent]]
        assert [*tree.header.tolist(), *rest.tolist(), int(tree.last[i])] == prompt
    assert len(tree.rests) == len({tuple(p[:-1]) for p in prompts})
    starts = [tuple(p[:-1]) for p in prompts]
    k = len(tree.header)
    assert len({s[:k] for s in starts}) == 1
    assert len({s[: k + 1] for s in starts}) > 1 or min(map(len, starts)) == k


@pytest.mark.parametrize("parents", [np.array, mx.array])
@pytest.mark.parametrize("spare", [0, 1, 5])
def test_rows_of_unequal_length_continue_as_if_alone(tiny_engine, spare, parents):
    model = tiny_engine.model
    rows = [[4, 5, 6, 7], [4, 9], [4, 5]]
    context = Context(model, spare)
    context.read(model, mx.array([[4, 5, 6, 7], [4, 9, 0, 0], [4, 5, 0, 0]]), mx.array([4, 2, 2]))
    context = context.fork(parents([2, 0, 1, 1]))
    rows = [rows[i] for i in (2, 0, 1, 1)]
    for step in range(4):
        tokens = [20 + step, 30 + step, 40 + step, 50 + step]
        logits = np.array(context.read(model, mx.array(tokens)[:, None])[:, -1])
        rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
        for row, ours in zip(rows, logits, strict=True):
            np.testing.assert_allclose(ours, alone(model, row)[-1], atol=2e-5)


@pytest.mark.parametrize("parents", [[0, 0], [0]])
def test_a_fork_leaves_its_parent_as_it_was_and_the_other_way_round(tiny_engine, parents):
    model = tiny_engine.model
    parent = Context(model, spare=4)
    parent.read(model, mx.array([[4, 5]]))
    parent.read(model, mx.array([[9]]))  # now there is room for more, which both could write to
    child = parent.fork(np.array(parents))
    child.read(model, mx.array([[6], [7]][: len(parents)]))
    after = np.array(parent.read(model, mx.array([[8]]))[0, -1])
    np.testing.assert_allclose(after, alone(model, [4, 5, 9, 8])[-1], atol=2e-5)
    after = np.array(child.read(model, mx.array([[10], [10]][: len(parents)]))[0, -1])
    np.testing.assert_allclose(after, alone(model, [4, 5, 9, 6, 10])[-1], atol=2e-5)


def test_a_fork_to_the_same_rows_gathers_nothing(tiny_engine):
    context = Context(tiny_engine.model)
    context.read(tiny_engine.model, mx.array([[4, 5], [6, 7]]))
    for same, other in zip(context.layers, context.fork(np.array([0, 1])).layers, strict=True):
        assert same.keys is other.keys
        assert same.values is other.values
    assert context.fork(np.array([1, 0])).layers[0].keys is not context.layers[0].keys


@pytest.mark.cpu
def test_room_is_allocated_once_in_so_many_tokens(tiny_engine, monkeypatch):
    fetch, handed_out = Attention.update_and_fetch, []

    def watched(layer, keys, values):
        fetched = fetch(layer, keys, values)
        handed_out.append(fetched[0].shape[2])
        return fetched

    monkeypatch.setattr(Attention, "update_and_fetch", watched)
    context = Context(tiny_engine.model, spare=4)
    context.read(tiny_engine.model, mx.array([[4, 5, 6]]))
    room = []
    for _ in range(10):
        context.read(tiny_engine.model, mx.array([[7]]))
        room.append(context.layers[0].keys.shape[2])
    assert room == [8] * 5 + [13] * 5  # for the arriving token and four more
    assert handed_out[-1] == context.size == 13


def test_a_window_hides_tokens_that_are_too_far_back(tiny_engine):
    context = Context(tiny_engine.model)
    context.read(tiny_engine.model, mx.array([[4, 5, 6, 7], [4, 9, 0, 0]]), mx.array([4, 2]))
    mask = np.array(context.mask(2, return_array=True, window=3))[:, 0]
    # Row 0 arrives at positions 4 and 5, row 1 at 2 and 3; the last two columns are those themselves.
    assert mask[0].astype(int).tolist() == [[0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]]
    assert mask[1].astype(int).tolist() == [[1, 1, 0, 0, 1, 0], [0, 1, 0, 0, 1, 1]]


def test_reading_in_pieces_equals_reading_at_once(tiny_engine):
    model, tokens = tiny_engine.model, np.random.default_rng(0).integers(1, VOCABULARY, 9).tolist()
    context = Context(model)
    pieces = [context.read(model, mx.array([tokens[a:b]])) for a, b in ((0, 2), (2, 3), (3, 9))]
    np.testing.assert_allclose(np.concatenate([np.array(p[0]) for p in pieces]), alone(model, tokens), atol=2e-5)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_forks_and_joins_in_any_order_continue_every_row_as_if_alone(tiny_engine_once, data):
    model = tiny_engine_once.model
    token, spare = st.integers(1, VOCABULARY - 1), data.draw(st.sampled_from([0, 3]))

    def begin():
        texts = data.draw(st.lists(st.lists(token, min_size=1, max_size=5), min_size=1, max_size=3))
        width = max(map(len, texts))
        context = Context(model, spare)
        padded = mx.array([t + [0] * (width - len(t)) for t in texts])
        even = all(len(t) == width for t in texts)
        context.read(model, padded, None if even else mx.array([len(t) for t in texts]))
        return context, texts

    context, texts = begin()
    for _ in range(3):
        if data.draw(st.booleans()):
            other, more = begin()
            context, texts = Context.join([context, other]), texts + more
        rows = data.draw(st.lists(st.integers(0, len(texts) - 1), min_size=1, max_size=4))
        context = context.fork(data.draw(st.sampled_from([np.array, mx.array]))(rows))
        texts = [[*texts[row], data.draw(token)] for row in rows]
        logits = np.array(context.read(model, mx.array([t[-1:] for t in texts]))[:, -1])
        assert context.rows == len(texts)
        np.testing.assert_array_equal(
            np.broadcast_to(np.array(context.layers[0].offset), len(texts)), [len(t) for t in texts]
        )
        for ours, text in zip(logits, texts, strict=True):
            np.testing.assert_allclose(ours, alone(model, text)[-1], atol=5e-5)


@pytest.fixture(scope="module")
def tiny_engine_once():
    return make_tiny_engine(VOCABULARY)


def test_rows_that_are_alike_need_no_mask_and_one_offset(tiny_engine):
    context = Context(tiny_engine.model)
    assert context.mask(3, False, None) == "causal"
    context.read(tiny_engine.model, mx.array([[4, 5, 6, 7, 8]]))
    context = context.fork(np.array([0, 0]))
    assert context.layers[0].offset == 5
    assert context.mask(1, True, None) is None
    assert context.mask(3, False, None) == "causal"
    assert context.mask(1, False, None, own=4) is None  # a sliding layer hands out the last 3 only
    assert context.first_seen(4) == 2
    # Two tokens arrive at positions 5 and 6; the columns are 2, 3, 4 and themselves.
    assert np.array(context.mask(2, False, 4, own=4)).astype(int).tolist() == [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]


def test_slots_that_only_a_row_that_left_had_used_are_dropped(tiny_engine):
    model = tiny_engine.model
    long, short = Context(model), Context(model)
    long.read(model, mx.array([[4, 5, 6, 7, 8, 9]]))
    short.read(model, mx.array([[4, 5], [6, 7]]))
    joined = Context.join([long, short])
    assert np.array(joined.layers[0].offset).tolist() == [6, 2, 2]
    assert np.array(joined.mask(1, False, None))[:, 0, 0].astype(int).tolist() == [
        [1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 1, 1, 1],
        [0, 0, 0, 0, 1, 1, 1],
    ]
    rest = joined.fork(np.array([2, 1]))
    assert rest.size == rest.layers[0].offset == 2
    assert rest.mask(1, False, None) is None
    assert rest.layers[0].keys.shape[2] == 2
    assert (long.size, joined.size) == (6, 6)


def with_caches(model, caches):
    model.make_cache = lambda: caches
    return model


@pytest.mark.parametrize(
    ("cache", "name"),
    [
        (ChunkedKVCache(8), "ChunkedKVCache"),
        (QuantizedKVCache(), "QuantizedKVCache"),
        (LayerCache(8), "LayerCache"),
        (RotatingKVCache(max_size=8, keep=4), "RotatingKVCache with keep=4"),
        (CacheList(ArraysCache(1), ChunkedKVCache(8)), "ChunkedKVCache"),
    ],
)
def test_a_cache_of_another_kind_is_refused_by_name(tiny_engine, cache, name):
    with pytest.raises(UserError, match=f"in {name}, which textpolicy cannot share among rows; choose a model with"):
        Context(with_caches(tiny_engine.model, [KVCache(), cache]))


def test_a_rotary_embedding_with_one_position_for_all_rows_is_refused():
    from mlx_lm.models import llama

    scaling = {"rope_type": "dynamic", "factor": 2.0}
    arguments = llama.ModelArgs("llama", 32, 1, 64, 4, 1e-5, 50, max_position_embeddings=64, rope_scaling=scaling)
    with pytest.raises(UserError, match=r"DynamicNTKScalingRoPE.* one position for all rows"):
        Context(llama.Model(arguments))


def test_an_unreferenced_context_frees_its_memory_at_once(tiny_engine):
    model = tiny_engine.model
    model(mx.zeros((1, 1), mx.int32))
    gc.collect()
    gc.disable()
    mx.synchronize()  # a GPU lets go of what it has used when it is done
    try:
        before = mx.get_active_memory()
        context = Context(model, spare=64)
        mx.eval(context.read(model, mx.zeros((8, 16), mx.int32)))
        context = context.fork(np.zeros(32, np.int32))
        mx.eval(context.read(model, mx.zeros((32, 1), mx.int32)))
        assert mx.get_active_memory() > before
        del context
        mx.synchronize()
        assert mx.get_active_memory() == before
    finally:
        gc.enable()
