"""GDPO, OPO and the mean over prompts, worked by hand, and how the weights of rewards reach the credit."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import random_episodes

from textpolicy.algorithms import ALGORITHMS
from textpolicy.algorithms.credit import Rewards
from textpolicy.algorithms.gdpo import DecoupledRelative
from textpolicy.algorithms.opo import LengthWeighted
from textpolicy.errors import UserError
from textpolicy.loop.collect import collect
from textpolicy.types import Batch, loss_weights


def test_each_reward_counts_alike_whatever_its_range():
    right, bonus = np.array([1.0, 0, 1, 0]), np.array([0.0, 0, 0.01, 0.01])
    parts = ((1.0, right), (1.0, bonus))
    a = DecoupledRelative(std_eps=0)(Rewards(right + bonus, np.zeros(4, int), None, parts))
    unit = np.sqrt(3) / 2  # the deviation of two against two, in sample standard deviations
    assert a == pytest.approx([0, -2 * unit, 2 * unit, 0])


def test_a_weight_scales_what_was_normalised_and_a_reward_that_agrees_adds_nothing():
    first, second, same = np.array([3.0, 1]), np.array([0.0, 8]), np.array([5.0, 5])
    parts = ((1.0, first), (0.25, second), (9.0, same))
    a = DecoupledRelative(std_eps=1e-12)(Rewards(first + second, np.zeros(2, int), None, parts))
    assert a == pytest.approx([0.75 * np.sqrt(0.5), -0.75 * np.sqrt(0.5)])


def test_a_reward_that_does_not_apply_adds_nothing_there_and_an_unscored_completion_gets_0():
    parts = ((1.0, np.array([1.0, 0, np.nan, 1])), (1.0, np.array([2.0, 2, 4, 7])))
    a = DecoupledRelative(std_eps=0)(Rewards(np.array([3.0, 2, 4, np.nan]), np.zeros(4, int), None, parts))
    halves, thirds = np.sqrt(0.5), np.sqrt(4 / 3)
    assert a == pytest.approx([halves - 2 / 3 / thirds, -halves - 2 / 3 / thirds, 4 / 3 / thirds, 0])


def test_gdpo_with_one_reward_is_whitened_grpo():
    episodes = random_episodes(np.random.default_rng(3))
    whitened = replace(ALGORITHMS["grpo"], stages=ALGORITHMS["gdpo"].stages)
    one = [replace(e, scores={"a": e.reward}, reward_weights={"a": 1.0}) for e in episodes]
    assert ALGORITHMS["gdpo"].tokens(one).advantage == pytest.approx(whitened.tokens(episodes).advantage)
    assert ALGORITHMS["gdpo"].tokens(episodes).advantage == pytest.approx(whitened.tokens(episodes).advantage)


def test_the_weights_of_a_scorer_reach_gdpo_and_a_weight_of_0_does_not_train(tiny_engine):
    from textpolicy.engine import Sampling
    from textpolicy.environment.single_turn import TextGenerationEnv
    from textpolicy.rewards import RewardConfig, Scorer, reward

    @reward(name="evens_of_this_test")
    def evens(prompt, completion, example):
        return sum(int(word) % 2 == 0 for word in completion.split())

    @reward(name="words_of_this_test")
    def words(prompt, completion, example):
        return 100.0 * len(completion.split())

    class Numbers:
        def encode(self, text):
            return [int(word) for word in text.split()]

        def decode(self, ids):
            return " ".join(str(i) for i in ids)

    scorer = Scorer([RewardConfig("evens_of_this_test", weight=2.0), RewardConfig("words_of_this_test", weight=0.0)])
    env = TextGenerationEnv(["1 2", "3"], scorer, max_tokens=6, tokenizer=Numbers())
    episodes = collect(tiny_engine, env, [0, 1], 6, Sampling(6, seed=4))
    assert all(e.reward_weights == {"evens_of_this_test": 2.0, "words_of_this_test": 0.0} for e in episodes)
    alone = [replace(e, scores={}, reward_weights={}) for e in episodes]
    a, b = (ALGORITHMS["gdpo"].tokens(x).advantage for x in (episodes, alone))
    assert np.abs(a).max() > 0
    assert a == pytest.approx(b, abs=1e-5)


def test_opo_compares_with_the_mean_reward_of_a_token():
    rewards = Rewards(np.array([1.0, 0, 1, 3, 3]), np.array([0, 0, 0, 1, 1]), np.array([2, 5, 1, 4, 4]))
    assert LengthWeighted()(rewards) == pytest.approx([1 - 3 / 8, -3 / 8, 1 - 3 / 8, 0, 0])


def test_opos_advantages_sum_to_0_over_the_tokens_of_a_prompt():
    credit = ALGORITHMS["opo"].tokens(random_episodes(np.random.default_rng(1)))
    totals = np.bincount(credit.group[credit.row], credit.advantage)
    assert totals == pytest.approx(np.zeros(len(totals)), abs=1e-12)
    assert np.abs(credit.advantage).max() > 0.1


def test_every_prompt_has_one_share_of_the_mean_over_prompts():
    episodes = random_episodes(np.random.default_rng(2), groups=3, size=4)
    batch = Batch.pack(episodes, [np.ones(len(e.tokens), np.float32) for e in episodes], "prompt-mean")
    of_prompt = np.bincount([e.group for e in episodes], batch.weights.sum(axis=1))
    assert of_prompt == pytest.approx([1 / 3] * 3)
    assert loss_weights(np.array([[1, 1], [1, 0], [0, 0]]), "prompt-mean", groups=[4, 4, 9]).tolist() == [
        [1 / 3, 1 / 3],
        [1 / 3, 0],
        [0, 0],
    ]


def test_a_mean_over_prompts_without_prompts_is_refused():
    with pytest.raises(UserError, match="prompt-mean averages over prompts and got none; give"):
        loss_weights(np.ones((2, 2)), "prompt-mean")
