"""Group baselines: hand-worked values, and one group never sees another."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import random_episodes

from textpolicy.algorithms import ALGORITHMS, algorithm
from textpolicy.errors import UserError


def advantages(name, rewards, groups):
    return ALGORITHMS[name].advantages(np.array(rewards, np.float64), np.array(groups)).tolist()


def test_grpo_divides_by_the_sample_std():
    assert advantages("grpo", [1, 0, 0, 0], [0] * 4) == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)


def test_dr_grpo_only_centres():
    assert advantages("dr_grpo", [1, 1, 0, 1], [0] * 4) == pytest.approx([0.25, 0.25, -0.75, 0.25])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_group_is_compared_with_itself_alone(name):
    both = advantages(name, [1, 1, 1, 1, 0, 0, 0, 0], [0] * 4 + [1] * 4)
    assert both == [0.0] * 8  # one mean over the two prompts would give +0.5 and -0.5
    mixed = advantages(name, [1, 0, 5, 3], [7, 7, 2, 2])
    assert mixed[:2] == pytest.approx(advantages(name, [1, 0], [0, 0]))
    assert mixed[2:] == pytest.approx(advantages(name, [5, 3], [0, 0]))


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("rewards", [[0.1] * 6, [1 / 3] * 7, [0.0] * 3, [-2.7] * 5, [1.0]])
def test_a_group_that_agrees_gets_exactly_zero(name, rewards):
    assert advantages(name, rewards, [0] * len(rewards)) == [0.0] * len(rewards)


def test_dr_grpo_divides_by_the_longest_completion_not_by_the_lengths_seen():
    episodes = random_episodes(np.random.default_rng(0), groups=2, size=2)
    batch = replace(ALGORITHMS["dr_grpo"], constant=8.0).credit(episodes)
    assert set(np.unique(batch.weights)) == {0.0, np.float32(1 / 32)}


def test_gspo_uses_the_papers_band_and_the_sequence_ratio():
    how = ALGORITHMS["gspo"].surrogate
    assert (how.ratio, how.clip_low, how.clip_high) == ("sequence", 3e-4, 4e-4)


def test_an_unknown_algorithm_names_the_nearest():
    with pytest.raises(UserError, match=r"'grop'.*did you mean 'grpo'"):
        algorithm("grop")


def test_stages_change_the_credit_of_sampled_tokens_in_their_order():
    def double(credit):
        return replace(credit, advantage=2 * credit.advantage)

    def add_one(credit):
        return replace(credit, advantage=credit.advantage + 1)

    episodes = random_episodes(np.random.default_rng(1), groups=1, size=2)
    plain = ALGORITHMS["dr_grpo"].credit(episodes)
    staged = replace(ALGORITHMS["dr_grpo"], stages=(double, add_one)).credit(episodes)
    sampled = plain.weights != 0
    np.testing.assert_allclose(staged.advantages[sampled], 2 * plain.advantages[sampled] + 1)
    assert not staged.advantages[~sampled].any()
