"""RolloutRunner: the step contract, the two ways to collect, and the pairing of prompts with completions."""

from types import SimpleNamespace

import numpy as np
import pytest
from toy_tokenizers import Letters

from textpolicy.buffer import Buffer
from textpolicy.environment import Environment, TextGenerationEnv
from textpolicy.errors import UserError
from textpolicy.rollout import BatchedPolicy, RolloutRunner, create_strategy


class Corridor(Environment):
    """Observations count up; an episode ends after ``length`` steps."""

    def __init__(self, length=3, **changes):
        self.length, self.changes, self.resets = length, changes, 0

    def reset(self):
        self.at, self.resets = 0, self.resets + 1
        return np.array([self.at]), {}

    def step(self, action):
        self.at += 1
        result = {
            "observation": np.array([self.at]),
            "reward": 1.0,
            "terminated": self.at == self.length,
            "truncated": False,
            "info": {},
        }
        return {k: v for k, v in {**result, **self.changes}.items() if v != "missing"}


class TupleSteps(Corridor):
    def step(self, action):
        return tuple(super().step(action).values())


class Echo:
    """A policy that answers a prompt with its own letters and records its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, obs, deterministic=False):
        self.calls.append(("one", deterministic))
        return np.asarray(obs), {"logprob": np.zeros(len(obs), np.float32)}

    def sample_batch(self, prompts, deterministic=False):
        self.calls.append(("batch", len(prompts), deterministic))
        return [(p, {"logprob": np.full(len(p), -1, np.float32), "temperature": 0.5}) for p in prompts]


def walk(obs, deterministic=False):
    return np.int64(1), {"value": 0.5}


def matches(prompt, completion, example):
    """1 only when prompt, completion and example all belong together."""
    right = completion == prompt == example["prompt"]
    return float(right), right


def four_prompts(group_size=1):
    prompts = ["a", "bb", "ccc", "dddd"]
    examples = [{"prompt": p} for p in prompts]
    return TextGenerationEnv(prompts, matches, tokenizer=Letters(), examples=examples, group_size=group_size)


def runner(env, policy=walk, max_steps=4, algorithm="grpo"):
    return RolloutRunner(env, policy, create_strategy(algorithm), max_steps)


# ---- strategies


@pytest.mark.parametrize(
    ("algorithm", "value"),
    [("grpo", None), ("gspo", None), ("dr_grpo", None), ("maxrl", None), ("ppo", [0.5])],
)
def test_only_ppo_keeps_values(algorithm, value):
    buffer = runner(Corridor(1), max_steps=1, algorithm=algorithm).collect()
    assert buffer.episodes[0].value == value


def test_an_unknown_strategy_is_named_with_a_near_match():
    with pytest.raises(UserError, match=r"'grp0'; did you mean 'grpo'\? choose one of dr_grpo, grpo"):
        create_strategy("grp0")


def test_a_transition_needs_five_fields_and_other_extras_are_dropped():
    buffer, strategy = Buffer(), create_strategy("grpo")
    with pytest.raises(ValueError, match="lacks rew, done"):
        strategy.store_transition(buffer, obs=0, act=0, next_obs=0)
    strategy.store_transition(buffer, obs=0, act=0, rew=1, next_obs=0, done=True, colour="red", entropy=[1.0])
    assert buffer.episodes[0].entropy == [[1.0]]


def test_select_action_samples():
    echo = Echo()
    create_strategy("grpo").select_action(echo, [1])
    assert echo.calls == [("one", False)]


# ---- the step contract, on every path


COLLECT = [RolloutRunner.collect, RolloutRunner.collect_episode]


@pytest.mark.parametrize("collect", COLLECT)
@pytest.mark.parametrize(
    ("env", "error", "sentence"),
    [
        (TupleSteps(), TypeError, "returned a tuple"),
        (Corridor(reward="missing", info="missing"), KeyError, "left out reward, info"),
        (Corridor(terminated=1), TypeError, "terminated=1"),
        (Corridor(truncated=None), TypeError, "truncated=None"),
        (Corridor(info=[]), TypeError, r"info=\[\]"),
    ],
)
def test_a_step_that_breaks_the_contract_is_refused(collect, env, error, sentence):
    with pytest.raises(error, match=sentence):
        collect(runner(env))


@pytest.mark.parametrize("collect", COLLECT)
def test_numpy_bools_are_flags(collect):
    collect(runner(Corridor(terminated=np.bool_(True), truncated=np.bool_(False))))


def test_the_batched_path_checks_the_contract(monkeypatch):
    env = four_prompts()
    monkeypatch.setattr(env, "step", lambda action: (0, 0.0, True, False, {}))
    with pytest.raises(TypeError, match="returned a tuple"):
        runner(env, Echo()).collect()


@pytest.mark.parametrize("collect", COLLECT)
def test_a_policy_that_returns_no_pair_is_refused(collect):
    with pytest.raises(TypeError, match="return a pair"):
        collect(runner(Corridor(), policy=lambda obs, deterministic: [1, 2, 3]))


# ---- one step at a time


def test_max_steps_is_honoured_in_a_multi_step_environment():
    env = Corridor(length=3)
    buffer = runner(env, max_steps=7).collect()
    assert [e.obs for e in buffer.episodes] == [[[0], [1], [2]]] * 2
    assert (len(buffer), len(buffer.current_episode), env.resets) == (7, 1, 3)


def test_each_collect_returns_its_own_buffer():
    r = runner(Corridor(1))
    first, second = r.collect(), r.collect()
    assert first is not second
    assert (len(first), len(second)) == (4, 4)


def test_no_episode_of_a_collect_is_evicted():
    assert runner(Corridor(1), max_steps=25).collect().episode_count == 25


def test_reset_may_return_the_observation_alone():
    env = Corridor(1)
    env.reset = lambda: setattr(env, "at", 0) or 5
    assert runner(env, max_steps=1).collect().episodes[0].obs == [5]


def test_actions_reach_the_environment_and_the_buffer_as_plain_values():
    seen = []
    env = Corridor(1)
    step = env.step
    env.step = lambda action: seen.append(action) or step(action)
    buffer = runner(env, max_steps=1).collect()
    assert (seen, buffer.episodes[0].act) == ([1], [1])
    assert type(seen[0]) is int


def test_is_correct_and_group_come_from_the_info_unless_the_policy_gives_them():
    env = Corridor(1, info={"is_correct": True, "group": 6})
    assert runner(env, max_steps=1).collect().episodes[0].is_correct == [True]
    wrong = runner(env, lambda obs, deterministic: (0, {"is_correct": False}), 1).collect().episodes[0]
    assert (wrong.is_correct, wrong.group) == ([False], 6)


def test_collect_episode_returns_transitions_and_passes_deterministic_on():
    echo = Echo()
    transitions = runner(four_prompts(), echo).collect_episode(deterministic=True)
    assert echo.calls == [("one", True)]
    assert [t["act"] for t in transitions] == [[ord("a")]]
    assert (transitions[0]["rew"], transitions[0]["done"], transitions[0]["timeout"]) == (1.0, True, False)
    assert len(runner(Corridor(length=9), max_steps=4).collect_episode()) == 4


def test_a_plain_function_collects_text_one_by_one():
    def policy(obs, deterministic=False):
        return list(obs), {"logprob": np.zeros(len(obs), np.float32)}

    buffer = runner(four_prompts(), policy).collect()
    assert [e.rew for e in buffer.episodes] == [[1.0]] * 4


# ---- batched


def test_a_batched_policy_is_called_once_and_each_completion_gets_its_own_example():
    echo = Echo()
    buffer = runner(four_prompts(), echo).collect()
    assert echo.calls == [("batch", 4, False)]
    assert [e.rew for e in buffer.episodes] == [[1.0]] * 4
    assert [e.is_correct for e in buffer.episodes] == [[True]] * 4
    assert [e.act[0] for e in buffer.episodes] == [[97], [98] * 2, [99] * 3, [100] * 4]
    assert [e.obs[0].tolist() for e in buffer.episodes] == [e.act[0] for e in buffer.episodes]
    assert [e.group for e in buffer.episodes] == [0, 1, 2, 3]


def test_a_completion_swapped_with_its_neighbour_scores_nothing():
    def swapped(prompts, deterministic=False):
        return Echo().sample_batch(prompts)[::-1]

    buffer = runner(four_prompts()).collect_batched(swapped, 4)
    assert [e.rew for e in buffer.episodes] == [[0.0]] * 4


def test_batches_continue_where_the_last_one_ended():
    r = runner(four_prompts(group_size=2), Echo(), max_steps=3)
    groups = [e.group for _ in range(2) for e in r.collect().episodes]
    assert groups == [0, 0, 1, 1, 2, 2]


def test_a_pending_prompt_is_the_first_of_the_batch():
    env = four_prompts()
    env.reset()
    assert runner(env, Echo(), max_steps=1).collect().episodes[0].act == [[97]]


def test_episodes_of_the_batched_path_can_be_trained_on():
    e = runner(four_prompts(), Echo()).collect().episodes[1].as_training()
    assert (e.tokens.tolist(), e.logprobs.tolist()) == ([98] * 4, [0, 0, -1, -1])
    assert (e.reward, e.group, e.temperature) == (1.0, 1, 0.5)


@pytest.mark.parametrize("count", [3, 5])
def test_an_output_too_few_or_too_many_is_refused(count):
    with pytest.raises(ValueError, match=f"answered {count} of 4 prompts"):
        runner(four_prompts()).collect_batched(lambda prompts, deterministic: [([1], {})] * count, 4)


def test_batched_collection_needs_prompts_and_a_text_environment():
    with pytest.raises(ValueError, match="batch_size is 0"):
        runner(four_prompts()).collect_batched(Echo().sample_batch, 0)
    with pytest.raises(ValueError, match="Corridor cannot be batched"):
        runner(Corridor()).collect_batched(Echo().sample_batch, 1)


def test_only_a_policy_with_sample_batch_is_batched():
    assert isinstance(Echo(), BatchedPolicy)
    assert not isinstance(walk, BatchedPolicy)


# ---- construction


def test_an_agent_stands_for_policy_and_strategy():
    agent = SimpleNamespace(policy=walk, rollout_strategy=create_strategy("ppo"))
    assert len(RolloutRunner(Corridor(1), agent=agent, max_steps=2).collect()) == 2


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "no policy"),
        ({"policy": walk}, "no strategy"),
        ({"policy": walk, "strategy": 1, "max_steps": 0}, "is 0"),
    ],
)
def test_a_runner_that_cannot_run_is_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        RolloutRunner(Corridor(), **settings)


def test_less_than_one_episode_cannot_be_collected():
    with pytest.raises(UserError, match="max_episodes is 0; set it to 1 or more"):
        runner(Corridor()).collect(0)
    assert runner(Corridor(), max_steps=100).collect(1).episode_count == 1
