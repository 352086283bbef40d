"""The penalty of long completions, worked by hand, and the figures beside it."""

import numpy as np
import pytest

from textpolicy.algorithms.length import (
    apply_length_shaping,
    compute_length_penalty,
    compute_length_shaping_stats,
    overlong_penalty,
)
from textpolicy.errors import UserError


@pytest.mark.parametrize(("tokens", "penalty"), [(1, 0), (900, 0), (950, -0.25), (1000, -0.5), (5000, -0.5)])
def test_a_completion_pays_from_the_cache_on_and_at_most_the_largest_penalty(tokens, penalty):
    assert compute_length_penalty(tokens, 1000) == pytest.approx(penalty)
    assert compute_length_penalty(tokens, 1000, max_penalty=2.0) == pytest.approx(4 * penalty)


def test_rewards_are_lessened_one_by_one():
    shaped = apply_length_shaping(np.array([1.0, 0.0, 1.0]), np.array([10, 95, 200]), 100, 10)
    np.testing.assert_allclose(shaped, [1.0, -0.25, 0.5])


@pytest.mark.parametrize("cache", [0, -5, 101])
def test_a_cache_of_nothing_or_of_more_than_all_is_refused(cache):
    with pytest.raises(UserError, match=f"the overlong cache is {cache} of 100 tokens; set it above 0"):
        compute_length_penalty(5, 100, cache)
    with pytest.raises(UserError, match="overlong cache"):
        apply_length_shaping(np.ones(1), np.ones(1), 100, cache)
    assert overlong_penalty(np.array([50]), 100, 100).tolist() == [-0.5]  # all of it may be


def test_lengths_are_counted_from_where_they_are_cut_off_and_where_they_cost():
    stats = compute_length_shaping_stats(np.array([10, 90, 91, 100]), 100, 10)
    assert stats == {
        "mean_length": 72.75,
        "max_length_observed": 100.0,
        "truncation_rate": 0.25,
        "penalty_zone_rate": 0.5,
    }
    costs = overlong_penalty(np.array([10, 90, 91, 100]), 100, 10) < 0
    assert costs.mean() == stats["penalty_zone_rate"]


def test_no_completions_have_figures_of_zero():
    none, some = (compute_length_shaping_stats(np.array(lengths), 100) for lengths in ([], [3]))
    assert none == dict.fromkeys(some, 0.0)
