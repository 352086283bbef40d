"""REINFORCE++: returns-to-go, the KL in the reward, and whitening over the tokens of a batch."""

import statistics
from dataclasses import replace

import numpy as np
import pytest
from conftest import random_episodes, recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from made_credit import make_credit, random_lengths

from textpolicy.algorithms.credit import Rewards
from textpolicy.algorithms.reinforce import NoBaseline, ReturnToGo, Whiten, returns_to_go, whiten

made = settings(max_examples=30, deadline=None, derandomize=True)


def slow_returns(rewards, row, gamma):
    """Each token's own sum over the rest of its completion."""
    out = []
    for t in range(len(row)):
        rest = [k for k in range(t, len(row)) if row[k] == row[t]]
        out.append(sum(gamma ** (k - t) * rewards[k] for k in rest))
    return out


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@made
@given(seed=st.integers(0, 10**6))
def test_returns_are_the_slow_sum_within_each_completion(gamma, seed):
    rng = np.random.default_rng(seed)
    credit = make_credit(random_lengths(rng))
    rewards = rng.normal(size=len(credit.row))
    ours = returns_to_go(rewards, credit.row, credit.position, gamma)
    assert ours.tolist() == pytest.approx(slow_returns(rewards, credit.row, gamma), rel=1e-9, abs=1e-12)


def test_the_reward_falls_on_the_last_token_and_is_discounted_backwards():
    credit = make_credit([3, 0, 1], advantage=[8.0, 8.0, 8.0, 5.0])
    assert ReturnToGo()(credit).advantage.tolist() == [8, 8, 8, 5]
    assert ReturnToGo(0.5)(credit).advantage.tolist() == [2, 4, 8, 5]


def test_a_penalty_is_felt_by_its_token_and_those_before_it():
    penalty = np.array([0.1, 0.2, 0.3, 1.0])
    # the baseline saw the reward without the summed penalty, 1 - 0.6 and 2 - 1
    credit = make_credit([3, 1], advantage=[0.4, 0.4, 0.4, 1.0], penalty=penalty)
    assert ReturnToGo()(credit).advantage == pytest.approx([1 - 0.6, 1 - 0.5, 1 - 0.3, 2 - 1.0])


def test_the_recipe_with_a_kl_in_the_reward_by_hand():
    """Two completions of rewards 1 and 0; the reference thinks less of every token of the first."""
    rng = np.random.default_rng(2)
    first, second = (replace(e, reward=r) for e, r in zip(random_episodes(rng, 1, 2), (1.0, 0.0), strict=True))
    gap = np.where(first.mask, 0.5, 0).astype(np.float32)
    first, second = replace(first, reference=first.logprobs - gap), replace(second, reference=second.logprobs)
    n, m = int(first.mask.sum()), int(second.mask.sum())
    returns = [1 - 0.1 * 0.5 * (n - t) for t in range(n)] + [0.0] * m
    mean, std = statistics.fmean(returns), statistics.stdev(returns)
    credit = replace(recipe("reinforce++"), reward_kl=0.1).tokens([first, second])
    assert credit.advantage == pytest.approx([(x - mean) / std for x in returns], rel=1e-5)


def test_whitening_is_over_tokens_so_long_completions_weigh_more():
    credit = make_credit([1, 3], advantage=[1.0, 0.0, 0.0, 0.0])
    mean, std = 0.25, 0.5
    assert Whiten()(credit).advantage == pytest.approx([(1 - mean) / std] + [-mean / std] * 3, rel=1e-6)


@made
@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=30))
def test_whitened_tokens_have_mean_0_and_variance_1(values):
    out = whiten(np.array(values))
    if len(set(values)) == 1:
        assert out.tolist() == [0.0] * len(values)
        return
    spread = statistics.variance(values)
    assert out.mean() == pytest.approx(0, abs=1e-4)
    assert out.var(ddof=1) == pytest.approx(spread / (spread + 1e-8), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("values", [[], [3.0], [0.1] * 7])
def test_constant_values_whiten_to_exactly_0(values):
    assert whiten(np.array(values)).tolist() == [0.0] * len(values)


def test_without_a_baseline_the_reward_itself_is_the_advantage():
    assert NoBaseline()(Rewards.of([0.5, None, -2.0, float("nan")])).tolist() == [0.5, 0.0, -2.0, 0.0]


def test_the_baseline_variant_whitens_the_reward_minus_the_groups_mean():
    episodes = random_episodes(np.random.default_rng(0), groups=2, size=2)
    episodes = [replace(e, reward=r) for e, r in zip(episodes, (1.0, 0.0, 5.0, 2.0), strict=True)]
    counts = [int(e.mask.sum()) for e in episodes]
    centred = [a for a, n in zip((0.5, -0.5, 1.5, -1.5), counts, strict=True) for _ in range(n)]
    mean, std = statistics.fmean(centred), statistics.stdev(centred)
    credit = recipe("reinforce++_baseline").tokens(episodes)
    assert credit.advantage == pytest.approx([(a - mean) / std for a in centred], rel=1e-6)


@pytest.mark.parametrize("name", ["reinforce++", "reinforce++_baseline"])
def test_an_unscorable_completion_is_no_part_of_the_whitening(name):
    episodes = random_episodes(np.random.default_rng(1), groups=1, size=3)
    episodes = [replace(e, reward=r) for e, r in zip(episodes, (1.0, 0.0, float("nan")), strict=True)]
    credit = replace(recipe(name), reward_kl=0.1).tokens([replace(e, reference=e.logprobs * 1.1) for e in episodes])
    scored = credit.row < 2
    assert not credit.advantage[~scored].any()
    assert credit.advantage[scored].mean() == pytest.approx(0, abs=1e-9)
    assert credit.advantage[scored].var(ddof=1) == pytest.approx(1, abs=1e-6)
