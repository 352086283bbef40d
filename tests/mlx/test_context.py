"""Forked contexts: padding, positions, windows, and gradients through a shared prefix."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import VOCABULARY
from hypothesis import given, settings
from hypothesis import strategies as st

from textpolicy.mlx.context import Context
from textpolicy.mlx.tree import PromptTree

TOKENS = st.lists(st.integers(1, 3), min_size=1, max_size=6)  # few distinct tokens, so that prompts share starts


def alone(model, tokens):
    return np.array(model(mx.array([tokens]))[0])


@settings(max_examples=20, deadline=None)
@given(st.lists(TOKENS, min_size=1, max_size=5))
def test_a_tree_holds_every_prompt_and_shares_the_longest_start(prompts):
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


@pytest.mark.parametrize("spare", [0, 1, 5])
def test_rows_of_unequal_length_continue_as_if_alone(tiny_engine, spare):
    model = tiny_engine.model
    rows = [[4, 5, 6, 7], [4, 9], [4, 5]]
    context = Context(model, spare)
    context.read(model, mx.array([[4, 5, 6, 7], [4, 9, 0, 0], [4, 5, 0, 0]]), mx.array([4, 2, 2]))
    context = context.fork(mx.array([2, 0, 1, 1]))
    rows = [rows[i] for i in (2, 0, 1, 1)]
    for step in range(4):
        tokens = [20 + step, 30 + step, 40 + step, 50 + step]
        logits = np.array(context.read(model, mx.array(tokens)[:, None])[:, -1])
        rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
        for row, ours in zip(rows, logits, strict=True):
            np.testing.assert_allclose(ours, alone(model, row)[-1], atol=2e-5)


def test_a_fork_leaves_its_parent_as_it_was(tiny_engine):
    model = tiny_engine.model
    parent = Context(model, spare=4)
    parent.read(model, mx.array([[4, 5]]))
    child = parent.fork(mx.array([0, 0]))
    child.read(model, mx.array([[6], [7]]))
    after = np.array(parent.read(model, mx.array([[8]]))[0, -1])
    np.testing.assert_allclose(after, alone(model, [4, 5, 8])[-1], atol=2e-5)


def test_a_window_hides_what_is_too_far_back(tiny_engine):
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
