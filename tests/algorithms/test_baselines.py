"""Group baselines: hand-worked values, and one group never sees another."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import random_episodes, recipe

from textpolicy.algorithms import ALGORITHMS, algorithm
from textpolicy.algorithms.credit import Rewards
from textpolicy.errors import UserError
from textpolicy.losses import Clip


def advantages(name, rewards, groups):
    rewards = Rewards.of(rewards, groups)
    return np.where(rewards.uniform, 0.0, ALGORITHMS[name].baseline(rewards)).tolist()


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
@pytest.mark.parametrize("rewards", [[0.1] * 6, [1 / 3] * 7, [0.0] * 3, [2.7] * 5, [1.0]])
def test_a_group_that_agrees_gets_exactly_zero(name, rewards):
    assert advantages(name, rewards, [0] * len(rewards)) == [0.0] * len(rewards)


@pytest.mark.parametrize("name", ["maxrl", "full"])
def test_negative_rewards_are_refused_by_maxrl_and_correctness_is_the_way_out(name):
    episodes = [replace(e, is_correct=e.reward > 0) for e in random_episodes(np.random.default_rng(0))]
    negative = [replace(e, reward=e.reward - 0.5, pieces=("",) * int(e.mask.sum())) for e in episodes]
    with pytest.raises(UserError, match=r"got a reward of -0.5.*set algorithm.signal to correctness"):
        recipe(name).credit(negative)
    by_correctness = replace(recipe(name), signal="correctness").credit(negative)
    as_before = recipe(name).credit([replace(e, pieces=n.pieces) for e, n in zip(episodes, negative, strict=True)])
    np.testing.assert_array_equal(by_correctness.advantages, as_before.advantages)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_unscorable_completion_neither_learns_nor_moves_the_others(name):
    expected = advantages(name, [1, 0, 3], [0] * 3)
    assert advantages(name, [1, float("nan"), 0, 3], [0] * 4) == pytest.approx([expected[0], 0.0, *expected[1:]])


def test_dr_grpo_divides_by_the_longest_completion_not_by_the_lengths_seen():
    episodes = random_episodes(np.random.default_rng(0), groups=2, size=2)
    batch = replace(ALGORITHMS["dr_grpo"], length=8.0).credit(episodes)
    assert set(np.unique(batch.weights)) == {0.0, np.float32(1 / 32)}


def test_gspo_uses_the_papers_band_and_the_sequence_ratio():
    how = recipe("gspo").surrogate
    assert (how.ratio, how.objective) == ("sequence", Clip(3e-4, 4e-4))


def test_an_unknown_algorithm_names_the_nearest():
    with pytest.raises(UserError, match=r"'grop'.*did you mean 'grpo'"):
        algorithm("grop")


def test_stages_change_the_credit_of_sampled_tokens_in_their_order():
    def double(credit):
        return replace(credit, advantage=2 * credit.advantage)

    def add_one(credit):
        return replace(credit, advantage=credit.advantage + 1)

    episodes = random_episodes(np.random.default_rng(1), groups=1, size=2)
    plain = recipe("dr_grpo").credit(episodes)
    staged = replace(recipe("dr_grpo"), stages=(double, add_one)).credit(episodes)
    sampled = plain.weights != 0
    np.testing.assert_allclose(staged.advantages[sampled], 2 * plain.advantages[sampled] + 1)
    assert not staged.advantages[~sampled].any()
