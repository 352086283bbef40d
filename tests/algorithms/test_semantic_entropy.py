"""The entropy of gram counts, and how dispersed the planning tokens of a group are."""

import itertools
import math

import numpy as np
import pytest

from textpolicy.algorithms.semantic_entropy import (
    dispersion_trend,
    planning_dispersion,
    planning_token_bags,
    pool_planning_states,
    semantic_entropy,
)
from textpolicy.errors import UserError

# entropy


def test_grams_used_alike_have_the_entropy_of_a_fair_die():
    entropy = semantic_entropy([3, 3, 3, 3])
    assert entropy.nats == pytest.approx(math.log(4))
    assert entropy.bits == pytest.approx(2)
    assert entropy.normalised == pytest.approx(1)


def test_a_hand_worked_entropy():
    assert semantic_entropy([2, 1, 1]).bits == pytest.approx(1.5)
    assert semantic_entropy(np.array([4, 4, 0, 0])).bits == pytest.approx(1)


def test_a_gram_that_never_occurs_lowers_only_the_normalised_entropy():
    with_it, without = semantic_entropy([4, 4, 0, 0]), semantic_entropy([4, 4])
    assert with_it.nats == without.nats
    assert (with_it.normalised, without.normalised) == (pytest.approx(0.5), pytest.approx(1))


@pytest.mark.parametrize("counts", [[], [0, 0], [5], [5, 0, 0]])
def test_one_gram_or_none_has_no_entropy(counts):
    entropy = semantic_entropy(counts)
    assert [str(x) for x in (entropy.nats, entropy.bits, entropy.normalised)] == ["0.0"] * 3


@pytest.mark.parametrize("counts", [[1, -1], [1, float("nan")], [float("inf")], [[1, 2]]])
def test_counts_that_are_negative_or_not_finite_are_refused(counts):
    with pytest.raises(UserError, match="give one number of 0 or more per gram"):
        semantic_entropy(counts)


# dispersion


def slow_dispersion(embeddings, group):
    """Pair by pair, with the two rules for completions without planning tokens."""
    out = []
    for g in sorted(set(group)):
        distances = []
        for u, v in itertools.combinations([e for e, h in zip(embeddings, group, strict=True) if h == g], 2):
            lengths = math.hypot(*u), math.hypot(*v)
            if all(lengths):
                distances.append(1 - sum(a * b for a, b in zip(u, v, strict=True)) / lengths[0] / lengths[1])
            else:
                distances.append(float(any(lengths)))
        if distances:
            out.append(sum(distances) / len(distances))
    return out


@pytest.mark.parametrize("seed", range(10))
def test_dispersion_is_that_of_a_loop_over_pairs(seed):
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(25, 4)) * (rng.random((25, 1)) < 0.7)
    group = rng.integers(0, 8, 25) * 3
    expected = slow_dispersion(embeddings.tolist(), group.tolist())
    np.testing.assert_allclose(planning_dispersion(embeddings, group), expected, atol=1e-12)


def test_dispersion_of_no_completions_is_of_no_groups():
    assert planning_dispersion(np.zeros((0, 3)), np.zeros(0, int)).shape == (0,)
    assert planning_dispersion(np.ones((2, 3)), np.array([0, 1])).shape == (0,)


def test_like_completions_have_exactly_no_distance_or_next_to_it():
    [distance] = planning_dispersion(np.full((7, 5), 0.1), np.zeros(7, int))
    assert 0 <= distance < 1e-12


def test_bags_count_planning_tokens_only_modulo_the_bins():
    tokens = np.array([1, 5, 5, 2, 7, 3])
    planning = np.array([True, True, True, False, False, True])
    bags = planning_token_bags(tokens, planning, np.array([0, 0, 0, 0, 2, 3]), 4, bins=4)
    assert bags.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    with pytest.raises(UserError, match="bins is 0"):
        planning_token_bags(tokens, planning, np.zeros(6, int), 1, bins=0)


def test_pooled_states_point_along_the_mean_and_are_zero_without_planning_tokens():
    hidden = np.array([[3.0, 0.0], [0.0, 4.0], [9.0, 9.0], [5.0, 5.0]], np.float32)
    pooled = pool_planning_states(hidden, np.array([True, True, False, False]), np.array([0, 0, 0, 1]), 2)
    np.testing.assert_allclose(pooled, [[0.6, 0.8], [0.0, 0.0]])


# the trend


def test_the_average_follows_by_hand():
    assert dispersion_trend([1.0, 0.0, 0.0], decay=0.75) == [(1.0, 0.0, 0), (0.75, 0.25, 0), (0.5625, 0.1875, 0)]
    assert dispersion_trend([]) == []


def test_groups_count_alike_whatever_their_size():
    embeddings = np.array([[1.0, 0.0]] * 5 + [[1.0, 0.0], [0.0, 1.0]])
    assert planning_dispersion(embeddings, np.array([0] * 5 + [1] * 2)).mean() == pytest.approx(0.5)


def test_stability_counts_changes_in_a_row_and_is_lost_at_one_jump():
    trend = dispersion_trend([1.0, 1.0, 1.0, 1.0, 0.0, 0.0], decay=0.5, tolerance=0.1)
    assert [calm for _, _, calm in trend] == [0, 1, 2, 3, 0, 0]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("decay", 1.0), ("decay", -0.1), ("tolerance", -1.0), ("tolerance", math.nan)],
)
def test_settings_that_cannot_work_are_refused(setting, value):
    with pytest.raises(UserError, match=setting):
        dispersion_trend([0.5], **{setting: value})
