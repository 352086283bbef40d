"""Episode and Batch: the shift, the weights, and what must not be trained on."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import random_episodes

from textpolicy.errors import UserError
from textpolicy.types import Batch, Completion, Episode


def episode(prompt=(3, 4), tokens=(7, 8, 0), **scored):
    completion = Completion(np.array(tokens, np.int32), -np.arange(1, len(tokens) + 1, dtype=np.float32))
    return Episode.from_completion(prompt, completion, reward=1.0, group=0, **scored)


def pack(episodes, **how):
    return Batch.pack(episodes, [np.full(len(e.tokens), 2.0, np.float32) for e in episodes], **how)


def test_inputs_predict_the_next_token_and_only_sampled_tokens_have_weight():
    batch = pack([episode()])
    assert batch.inputs.tolist() == [[3, 4, 7, 8]]
    assert batch.targets.tolist() == [[4, 7, 8, 0]]
    assert batch.logprobs.tolist() == [[0, -1, -2, -3]]
    assert (batch.weights != 0).tolist() == [[False, True, True, True]]


def test_targets_are_inputs_shifted_by_one_in_every_row():
    episodes = random_episodes(np.random.default_rng(0))
    batch = pack(episodes)
    for i, e in enumerate(episodes):
        n = len(e.tokens) - 1
        np.testing.assert_array_equal(batch.targets[i, : n - 1], batch.inputs[i, 1:n])
        assert (batch.weights[i] != 0).sum() == e.mask.sum()


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"aggregation": "token-mean"}, [[1 / 4] * 3, [1 / 4, 0, 0]]),
        ({"aggregation": "seq-mean-token-mean"}, [[1 / 6] * 3, [1 / 2, 0, 0]]),
        ({"aggregation": "seq-mean-token-sum-norm", "length": 8}, [[1 / 16] * 3, [1 / 16, 0, 0]]),
    ],
)
def test_weights_hold_the_normaliser(how, expected):
    batch = pack([episode(), episode(tokens=(0,))], **how)
    np.testing.assert_allclose(batch.weights[:, 1:], expected, rtol=1e-6)


def test_an_episode_without_sampled_tokens_weighs_nothing_and_counts_for_nothing():
    empty = replace(episode(), mask=np.zeros(5, bool))
    batch = pack([episode(), empty], aggregation="seq-mean-token-mean")
    np.testing.assert_allclose(batch.weights[0, 1:], 1 / 3, rtol=1e-6)
    assert not batch.weights[1].any()


@pytest.mark.parametrize("temperature", [None, 0.0])
def test_completions_of_a_distribution_no_learner_can_score_are_refused(temperature):
    with pytest.raises(UserError, match=f"temperature {temperature}"):
        pack([replace(episode(), temperature=temperature)])


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_logprobs_that_are_not_finite_are_refused(value):
    with pytest.raises(UserError, match="not finite"):
        pack([replace(episode(), logprobs=np.full(5, value, np.float32))])


def test_no_episodes_is_an_error():
    with pytest.raises(UserError, match="at least one episode"):
        pack([])


def test_advantages_are_one_array_for_each_episode_and_one_finite_number_for_each_token():
    episodes = [episode(), episode()]
    five = np.ones(5, np.float32)
    with pytest.raises(UserError, match="2 episodes have 1 arrays of advantages; give one each"):
        Batch.pack(episodes, [five])
    with pytest.raises(UserError, match=r"5 tokens have advantages of shape \(3,\); give one number per token"):
        Batch.pack(episodes, [five, five[:3]])
    with pytest.raises(UserError, match="advantages are not finite"):
        Batch.pack(episodes, [five, np.full(5, np.nan)])
