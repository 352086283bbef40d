"""HICRA: who gains on planning tokens, at which alpha signs turn, and the options that are off."""

import numpy as np
import pytest
from made_credit import make_credit

from textpolicy.algorithms.hicra import AmplifyPlanning, BoostPlanning, amplify, boost_entropy, reported_selection
from textpolicy.errors import UserError

ADVANTAGE = np.array([1.0, -1.0, 0.0, 0.5, -0.5])
PLANNING = np.array([True, True, True, False, False])


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.0, [1.0, -1.0, 0.0, 0.5, -0.5]),
        (0.2, [1.2, -0.8, 0.0, 0.5, -0.5]),
        (1.0, [2.0, 0.0, 0.0, 0.5, -0.5]),  # silences the planning tokens of failures
        (1.5, [2.5, 0.5, 0.0, 0.5, -0.5]),  # rewards them
    ],
)
def test_planning_tokens_gain_in_success_and_are_spared_in_failure(alpha, expected):
    assert amplify(ADVANTAGE, PLANNING, alpha) == pytest.approx(expected)
    credit = make_credit([2, 3], advantage=ADVANTAGE, planning=PLANNING)
    assert AmplifyPlanning(alpha)(credit).advantage == pytest.approx(expected)


def test_tokens_that_do_not_plan_keep_their_bits():
    advantage = np.random.default_rng(0).normal(size=100)
    planning = np.arange(100) % 3 == 0
    assert np.array_equal(amplify(advantage, planning, 0.2)[~planning], advantage[~planning])


def test_a_boost_adds_a_share_of_the_completions_mean_entropy_to_planning_tokens():
    entropy, row = np.array([1.0, 3.0, 10.0, 30.0]), np.array([0, 0, 1, 1])
    planning = np.array([True, False, False, True])
    assert boost_entropy(entropy, planning, row, 0.5) == pytest.approx([2.0, 3.0, 10.0, 40.0])
    boosted = BoostPlanning(0.5)(make_credit([2, 2], entropy=entropy, planning=planning))
    assert boosted.entropy == pytest.approx([2.0, 3.0, 10.0, 40.0])
    assert boosted.advantage.tolist() == [1.0] * 4


def long_success():
    """Completions of 4, 2 and 3 tokens, 3 on average; the first is the only long one that succeeded."""
    return make_credit(
        [4, 2, 3],
        advantage=[0.5] * 4 + [0.5] * 2 + [-1.0] * 3,
        entropy=[9.0, 0.0, 0.0, 8.0, 9.0, 0.0, 0.0, 9.0, 0.0],
        planning=[False, True, False, False, False, False, False, False, True],
    )


def test_the_reported_selection_adds_uncertain_tokens_of_long_successes_only():
    c = long_success()
    selected = reported_selection(c.planning, c.entropy, c.advantage, c.row, share=0.4)
    assert selected.tolist() == [True, True, False, True, False, False, False, False, True]


def test_a_long_completion_that_failed_is_not_selected():
    c = long_success()
    selected = reported_selection(c.planning, c.entropy, -c.advantage, c.row, share=0.4)
    assert selected.tolist() == c.planning.tolist()


def test_the_reported_selection_is_off_by_default():
    plain = AmplifyPlanning()(long_success()).advantage
    amplified = AmplifyPlanning(hicra_top_entropy=0.4)(long_success()).advantage
    assert plain == pytest.approx([0.5, 0.6, 0.5, 0.5, 0.5, 0.5, -1.0, -1.0, -0.8])
    assert amplified == pytest.approx([0.6, 0.6, 0.5, 0.6, 0.5, 0.5, -1.0, -1.0, -0.8])


def test_stages_that_read_entropy_refuse_an_engine_without_it():
    blind = make_credit([2], entropy=None)
    assert AmplifyPlanning()(blind).advantage.tolist() == [1.0, 1.0]
    for stage in (AmplifyPlanning(hicra_top_entropy=0.3), BoostPlanning()):
        with pytest.raises(UserError, match="needs exact entropy and the engine reported none"):
            stage(blind)


def test_a_step_without_tokens_passes():
    empty = make_credit([0, 0])
    for stage in (AmplifyPlanning(hicra_top_entropy=0.3), BoostPlanning()):
        assert stage(empty).advantage.shape == (0,)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: AmplifyPlanning(-0.1), "hicra_alpha is -0.1"),
        (lambda: AmplifyPlanning(hicra_top_entropy=1.5), "hicra_top_entropy is 1.5"),
        (lambda: BoostPlanning(-1.0), "hicra_gamma is -1.0"),
        (lambda: amplify(ADVANTAGE, PLANNING, np.nan), "alpha is nan"),
        (lambda: boost_entropy(ADVANTAGE, PLANNING, np.zeros(5, int), -0.3), "gamma is -0.3"),
    ],
)
def test_a_strength_below_zero_is_refused_by_name(build, name):
    with pytest.raises(UserError, match=name):
        build()
