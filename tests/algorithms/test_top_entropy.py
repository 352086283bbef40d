"""Credit for the tokens of highest entropy alone."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import random_episodes
from made_credit import make_credit

from textpolicy.algorithms import ALGORITHMS
from textpolicy.algorithms.top_entropy import KeepTopEntropy, entropy_threshold
from textpolicy.errors import UserError


def test_a_fifth_of_the_tokens_of_the_batch_keeps_its_credit():
    entropy = np.array([0.5, 3.0, 0.1, 0.2, 0.3, 0.4, 0.0, 2.0, 0.6, 0.7])
    kept = KeepTopEntropy(0.2)(make_credit([4, 6], entropy=entropy, advantage=np.full(10, -2.0))).advantage
    assert kept.tolist() == [0, -2, 0, 0, 0, 0, 0, -2, 0, 0]


def test_the_share_is_of_the_batch_and_not_of_each_completion():
    credit = make_credit([2, 2], entropy=[1.0, 2.0, 3.0, 4.0])
    assert KeepTopEntropy(0.5)(credit).advantage.tolist() == [0, 0, 1, 1]


def test_a_share_of_1_keeps_everything():
    credit = make_credit([5], entropy=[3.0, 0.0, 1.0, 1.0, 2.0])
    assert KeepTopEntropy(1.0)(credit).advantage.tolist() == [1.0] * 5


def test_tokens_without_credit_still_count_in_the_denominator():
    episodes = random_episodes(np.random.default_rng(0))
    plain = ALGORITHMS["grpo"]
    masked = replace(plain, stages=(KeepTopEntropy(0.2),)).credit(episodes)
    assert np.array_equal(masked.weights, plain.credit(episodes).weights)
    assert np.count_nonzero(masked.advantages) < np.count_nonzero(plain.credit(episodes).advantages)


def test_a_step_without_tokens_has_no_threshold():
    assert entropy_threshold(np.zeros(0), 0.2) == -np.inf
    assert KeepTopEntropy()(make_credit([0])).advantage.shape == (0,)


def test_an_engine_without_entropy_is_refused():
    with pytest.raises(UserError, match=r"needs exact entropy and the engine reported none; use"):
        KeepTopEntropy()(make_credit([2], entropy=None))


@pytest.mark.parametrize("share", [0.0, -0.2, 1.1, np.nan])
def test_a_share_that_keeps_nothing_or_more_than_all_is_refused(share):
    with pytest.raises(UserError, match="top_entropy is"):
        KeepTopEntropy(share)
    with pytest.raises(UserError, match="share is"):
        entropy_threshold(np.ones(2), share)
