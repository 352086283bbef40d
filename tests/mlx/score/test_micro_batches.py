"""Which rows of a batch go through a model together."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from conftest import recipe
from hypothesis import given, settings
from hypothesis import strategies as st

from textpolicy.mlx.score.micro_batches import micro_batches
from textpolicy.types import Completion, Episode


def batch(lengths, prompts=None):
    """Completions of so many tokens, each after a prompt of two."""
    episodes = []
    for i, (n, group) in enumerate(zip(lengths, prompts or [0] * len(lengths), strict=True)):
        c = Completion(np.full(n, 3 + i), np.full(n, -1, np.float32), None)
        episodes.append(Episode.from_completion([1, 2 + group], c, reward=float(i % 2), group=group))
    return recipe("reinforce++").credit(episodes)


def passes(rows, max_tokens, max_rows=None):
    """The rows of each pass."""
    return [part.tolist() for part, _ in micro_batches(rows, max_tokens, max_rows)]


def padded(rows, part):
    """Tokens of a pass."""
    return len(part) * max(rows.lengths[part])


def test_a_batch_that_takes_two_passes_is_halved():
    """Eight completions of which seven fit: four and four need little more than half the memory, and the same time."""
    rows = batch([15] * 8)
    assert padded(rows, range(7)) <= 112 < padded(rows, range(8))
    assert list(map(len, passes(rows, 112))) == [4, 4]


def test_groups_that_fit_into_a_pass_each_stay_whole():
    rows = batch([6] * 10, prompts=[0] * 5 + [1] * 5)
    assert passes(rows, 8 * 8) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_rows_are_bounded_as_tokens_are():
    assert list(map(len, passes(batch([6] * 5), 10**9, max_rows=4))) == [3, 2]


def test_a_row_that_is_too_long_goes_alone():
    rows = batch([30, 4, 4])
    assert passes(rows, 12) == [[0], [1, 2]]


def test_nothing_makes_no_pass():
    rows = batch([3, 4])
    assert passes(rows.take(np.zeros(0, int)), 100) == []


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=7),
    groups=st.integers(1, 3),
    max_tokens=st.integers(1, 60),
    max_rows=st.none() | st.integers(1, 4),
)
def test_as_few_passes_as_possible_and_the_largest_of_them_as_small_as_possible(lengths, groups, max_tokens, max_rows):
    """Against every way to cut the rows, which stay in their order."""
    rows = batch(lengths, [i % groups for i in range(len(lengths))])
    found = passes(rows, max_tokens, max_rows)
    order = [row for part in found for row in part]
    assert sorted(order) == list(range(len(rows)))

    def allowed(parts):
        return all(
            len(part) == 1 or (padded(rows, part) <= max_tokens and (max_rows is None or len(part) <= max_rows))
            for part in parts
        )

    def largest(parts):
        return max(padded(rows, part) for part in parts)

    assert allowed(found)
    for cuts in range(len(order)):
        ways = [
            [order[a:b] for a, b in pairwise([0, *where, len(order)])]
            for where in combinations(range(1, len(order)), cuts)
        ]
        if ways := [way for way in ways if allowed(way)]:
            assert len(found) == cuts + 1
            assert largest(found) == min(map(largest, ways))
            return
    pytest.fail("rows one by one are always allowed")
