"""RolloutCoordinator: the episodes it collects, and what its settings of workers do."""

import numpy as np
import pytest
from toy_tokenizers import Letters

from textpolicy.environment import Environment, TextGenerationEnv
from textpolicy.errors import UserError
from textpolicy.rollout import RolloutCoordinator


class Steps(Environment):
    """Episodes of three steps."""

    def reset(self):
        self.at = 0
        return np.array([0]), {}

    def step(self, action):
        self.at += 1
        over = self.at == 3
        return {"observation": np.array([self.at]), "reward": 1.0, "terminated": over, "truncated": False, "info": {}}


class Echo:
    """A policy that answers with the prompt and counts the prompts of each call."""

    def __init__(self):
        self.calls = []

    def __call__(self, obs, deterministic=False):
        return list(obs), {"logprob": np.zeros(len(obs), np.float32)}

    def sample_batch(self, prompts, deterministic=False):
        self.calls.append(len(prompts))
        return [(list(p), {"logprob": np.zeros(len(p), np.float32)}) for p in prompts]


def length(prompt, completion, example):
    return float(len(completion))


def letters(group_size=1):
    return TextGenerationEnv(["a", "bb", "ccc"], length, tokenizer=Letters(), group_size=group_size)


def walk(obs, deterministic=False):
    return 1, {}


def test_without_workers_a_runner_collects_here():
    echo = Echo()
    coordinator = RolloutCoordinator(letters, lambda: echo, "grpo", 0, 5)
    assert [e.rew[0] for e in coordinator.collect().episodes] == [1, 2, 3, 1, 2]
    assert [e.rew[0] for e in coordinator.collect().episodes] == [3, 1, 2, 3, 1]
    assert echo.calls == [5, 5]


def test_max_episodes_bounds_a_call():
    echo = Echo()
    assert RolloutCoordinator(letters, lambda: echo, "grpo", 0, 100, 4).collect().episode_count == 4
    assert echo.calls == [4]
    steps = RolloutCoordinator(Steps, lambda: walk, "grpo", 0, 100, 2).collect()
    assert [len(e) for e in steps.episodes] == [3, 3]
    assert len(RolloutCoordinator(Steps, lambda: walk, "grpo", 0, 4, 2).collect()) == 4


def test_a_batch_size_splits_the_completions_sampled_in_a_call():
    echo = Echo()
    coordinator = RolloutCoordinator(lambda: letters(group_size=2), lambda: echo, "grpo", 0, 7, batch_size=3)
    buffer = coordinator.collect()
    assert echo.calls == [3, 3, 1]
    assert [e.group for e in buffer.episodes] == [0, 0, 1, 1, 2, 2, 3]


def test_a_batch_can_be_sampled_with_a_model_instead_of_the_policy(tiny_engine):
    class Ids(Letters):
        eos_token_ids = frozenset({0})

        def decode(self, ids):
            return " ".join(map(str, ids))

    coordinator = RolloutCoordinator(
        lambda: TextGenerationEnv(["a"], length, tokenizer=Ids(), group_size=4),
        lambda: walk,
        "grpo",
        max_steps=4,
        batch_size=2,
        model=tiny_engine.model,
        tokenizer=Ids(),
        generation_params={"max_tokens": 3},
    )
    episodes = coordinator.collect().episodes
    assert len(episodes) == 4
    assert all(1 <= len(e.act[0]) <= 3 for e in episodes)
    assert len(episodes[0].as_training().tokens) == 1 + len(episodes[0].act[0])


def test_timings_are_kept_on_request():
    plain = RolloutCoordinator(letters, Echo, "grpo", 0, 3)
    plain.collect()
    assert plain.get_rollout_timing() == plain.get_rollout_generation_profile() == {}
    timed = RolloutCoordinator(letters, Echo, "grpo", 0, 3, profile=True)
    timed.collect()
    seconds = timed.get_rollout_timing()
    assert set(seconds) == {"total", "env_reset", "generation", "env_step", "buffer_store"}
    assert seconds["total"] >= sum(v for k, v in seconds.items() if k != "total") > 0
    assert 0 < timed.get_rollout_generation_profile()["generation_share"] < 1
    timed.reset_rollout_timing()
    assert not any(timed.get_rollout_timing().values())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_workers": -1}, "num_workers is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_episodes": 0}, "max_episodes is 0"),
        ({"batch_size": 2, "num_workers": 2}, "batch_size is 2 and num_workers 2"),
        ({"batch_size": 2}, "the policy answers one prompt at a time"),
        ({"algorithm": "grp"}, "did you mean 'grpo'"),
    ],
)
def test_a_coordinator_that_cannot_work_is_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        RolloutCoordinator(letters, lambda: walk, **{"algorithm": "grpo", **settings})


def test_a_closed_coordinator_refuses_to_collect():
    with RolloutCoordinator(letters, Echo, "grpo", 0, 3) as coordinator:
        coordinator.collect()
    with pytest.raises(UserError, match="is closed"):
        coordinator.collect()


def test_workers_are_accepted_and_one_warning_says_that_this_process_collects(caplog):
    def numbered(worker):
        return lambda obs, deterministic: ([100 + worker], {"logprob": [0.0]})

    settings = {"num_workers": 2, "max_steps": 4, "worker_seconds": 60.0}
    with RolloutCoordinator(lambda: letters(group_size=2), numbered, "grpo", **settings) as coordinator:
        episodes = [episode for _ in range(2) for episode in coordinator.collect().episodes]
    assert [e.act[0] for e in episodes] == [[100]] * 8  # a function that names `worker` gets number 0
    assert [e.group for e in episodes] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert episodes[2].as_training().tokens.tolist() == [98, 98, 100]
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        "num_workers is 2 and starts no processes: this process collects all episodes; leave num_workers out"
    )


def test_closing_closes_the_environment():
    env, closed = Steps(), []
    env.close = lambda: closed.append(True)
    coordinator = RolloutCoordinator(lambda: env, lambda: walk, "grpo", 2)
    coordinator.collect()
    assert closed == []
    coordinator.close()
    coordinator.close()
    assert closed == [True]
