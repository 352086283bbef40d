"""The episodes that the loop hands out after a step: with prompt, credit and the learner's log-probs."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import make_tiny_engine, random_episodes, recipe

from textpolicy.engine import Sampling
from textpolicy.environment.single_turn import TextGenerationEnv
from textpolicy.loop.on_policy import OnPolicyCheck
from textpolicy.loop.train import Schedule, train

PROMPTS = ["1 2", "3", "4 5 6", "2 2"]


class Numbers:
    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))


def steps_of(algorithm, **how):
    """(episodes handed out, batch given to the engine) of two steps."""
    engine, seen, batches = make_tiny_engine(vocabulary=16), [], []
    update = engine.update
    engine.update = lambda batch, *rest: batches.append(batch) or update(batch, *rest)
    env = TextGenerationEnv(PROMPTS, lambda completion, **_: float(len(completion) % 3), 6, tokenizer=Numbers())
    train(
        engine,
        env,
        algorithm,
        schedule=Schedule(1e-3, steps=2),
        prompts_per_step=2,
        group_size=4,
        sampling=Sampling(6, seed=3),
        on_step=lambda step, row, episodes: seen.append(episodes),
        **how,
    )
    return list(zip(seen, batches, strict=True))


@pytest.mark.parametrize("name", ["grpo", "gtpo", "full"])
def test_the_credit_of_an_episode_is_the_credit_given_to_the_engine(name):
    for episodes, batch in steps_of(recipe(name)):
        for row, e in enumerate(episodes):
            n = len(e.tokens)
            live = batch.weights[row, : n - 1] != 0
            np.testing.assert_array_equal(e.credited.credit[1:][live], batch.advantages[row, : n - 1][live])
            assert not e.credited.credit[~e.mask].any()
            assert (e.credited.planning is not None) == (name == "full")


def test_an_episode_has_the_index_of_its_prompt():
    for episodes, _ in steps_of(recipe("grpo")):
        assert [PROMPTS[e.prompt_index] for e in episodes] == [e.prompt for e in episodes]


def test_the_learners_logprobs_are_recorded_for_the_tokens_of_the_on_policy_check():
    (first, _), (second, _) = steps_of(recipe("grpo"), check=OnPolicyCheck(every=2, completions=3))
    trained = [e for e in first if e.learner is not None]
    assert len(trained) == 3
    for e in trained:
        np.testing.assert_allclose(e.learner, e.logprobs, atol=1e-4)
    assert all(e.learner is None for e in second)


def test_redrawn_episodes_that_were_not_trained_on_are_handed_out_without_credit():
    episodes, batch = steps_of(replace(recipe("grpo"), resample=3))[0]
    credited = [e for e in episodes if e.credited is not None]
    assert len(credited) == len(batch)


def test_the_advantage_is_the_groups_and_a_truncated_completion_that_is_muted_has_no_credit():
    episodes = random_episodes(np.random.default_rng(2))
    episodes = [replace(e, truncated=i % 3 == 0) for i, e in enumerate(episodes)]
    algorithm = replace(recipe("dr_grpo"), mask_truncated=True)
    for e in algorithm.credited(episodes, algorithm.tokens(episodes)):
        rewards = [other.reward for other in episodes if other.group == e.group]
        assert e.credited.advantage == pytest.approx(e.reward - sum(rewards) / len(rewards), abs=1e-6)
        expected = 0 if e.truncated else e.credited.advantage
        assert e.credited.credit[e.mask] == pytest.approx(expected, abs=1e-6)
