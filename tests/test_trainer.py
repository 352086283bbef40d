"""Trainer: what the user's functions see, and that one step is the step of a slow loop by hand."""

import logging
from functools import partial

import numpy as np
import pytest

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from conftest import tiny_llama
from mlx.utils import tree_flatten, tree_map

from textpolicy.algorithms.grpo import compute_advantages, compute_metrics, policy_loss
from textpolicy.buffer import Buffer
from textpolicy.environment import TextGenerationEnv
from textpolicy.errors import UserError
from textpolicy.mlx.lora import attach_lora
from textpolicy.mlx.policy import create_policy
from textpolicy.rollout import RolloutRunner, create_strategy
from textpolicy.training import Trainer

# (prompt, completion, reward, group): groups mixed, lengths mixed, one completion there twice,
# and in no order that a scorer would choose
EPISODES = [
    ([5, 9], [7], 1.0, 4),
    ([8], [2, 6, 1, 4], 0.0, 2),
    ([5, 9], [7, 3, 1], 0.0, 4),
    ([8], [2, 6], 3.0, 2),
    ([5, 9], [7], 0.5, 4),
]
ADVANTAGES = [0.5, -1.5, -0.5, 1.5, 0.0]  # reward minus the mean of its group


@pytest.fixture
def model():
    return tiny_llama(16)


def own_logprobs(model, prompt, completion, temperature=1.0):
    """(R,) by one pass over one sequence."""
    logits = model(mx.array([prompt + completion]))[0] / temperature
    logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return mx.stack([logits[len(prompt) + i - 1, token] for i, token in enumerate(completion)])


def filled(model, episodes=EPISODES, drift=0.0, temperature=1.0):
    """A buffer whose log-probs are the model's own, moved by ``drift`` times 1, 2, 3, ..."""
    buffer = Buffer()
    for n, (prompt, completion, reward, group) in enumerate(episodes, start=1):
        logprob = np.asarray(own_logprobs(model, prompt, completion, temperature)) + drift * n
        obs = np.array(prompt, np.int32)
        buffer.add(obs, completion, reward, obs[:0], True, logprob=logprob, group=group, temperature=temperature)
    return buffer


def weights(model):
    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}


def moved(before, model):
    return {name for name, value in weights(model).items() if not np.array_equal(before[name], value)}


def trainer(model, **changes):
    settings = {"advantage_fn": compute_advantages, "loss_fn": policy_loss, "optimizer": optim.SGD(0.1), **changes}
    return Trainer(model, settings.pop("advantage_fn"), settings.pop("loss_fn"), settings.pop("optimizer"), **settings)


class ChatTokenizer:
    """Digits are their own ids; a chat turn is wrapped in 13 and 14, and 15 ends an answer."""

    eos_token_ids, chat_template = {15}, "13 ... 14"

    def encode(self, text):
        return [int(c) for c in text]

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        return [13, *self.encode(messages[-1]["content"]), 14]

    def decode(self, ids):
        return "".join(map(str, ids))


class Spy:
    """Remembers its arguments as NumPy arrays and lets ``fn`` answer."""

    def __init__(self, fn):
        self.fn, self.calls = fn, []

    def __call__(self, *arrays):
        self.calls.append([np.array(mx.stop_gradient(a)) for a in arrays])
        self.kinds = {type(a) for a in arrays}
        return self.fn(*arrays)


# what the functions see


def test_the_advantage_function_sees_one_group_at_a_time_as_mlx_arrays(model):
    spy = Spy(compute_advantages)
    trainer(model, advantage_fn=spy).train(filled(model))
    assert sorted(call[0].tolist() for call in spy.calls) == [[0.0, 3.0], [1.0, 0.0, 0.5]]
    assert spy.kinds == {mx.array}


def test_two_groups_that_agree_with_themselves_teach_nothing(model):
    """One all right, one all wrong: a baseline over both would give +-0.5."""
    spy = Spy(policy_loss)
    episodes = [([5], [7], 1.0, 0), ([5], [6], 1.0, 0), ([8], [2], 0.0, 1), ([8], [3], 0.0, 1)]
    before = weights(model)
    result = trainer(model, loss_fn=spy).train(filled(model, episodes))
    assert spy.calls[0][2].tolist() == [0.0] * 4
    assert result["grad_norm"] == 0
    assert moved(before, model) == set()


def test_the_loss_sees_flat_tokens_in_the_order_of_the_buffer_with_old_and_new_aligned(model):
    spy = Spy(lambda old, new, advantages: ((new - old) * advantages).sum())
    trainer(model, loss_fn=partial(spy)).train(filled(model, drift=0.125))
    old, new, advantages = spy.calls[0]
    own = [np.asarray(own_logprobs(tiny_llama(16), p, c)) for p, c, _, _ in EPISODES]
    counts = [len(c) for _, c, _, _ in EPISODES]
    assert np.allclose(new, np.concatenate(own), atol=1e-5)
    assert np.allclose(old, np.concatenate(own) + 0.125 * np.repeat(range(1, 6), counts), atol=1e-5)
    assert advantages.tolist() == np.repeat(ADVANTAGES, counts).tolist()
    assert spy.kinds == {mx.array}


def test_an_episode_without_tokens_is_left_out_of_the_loss_but_not_of_its_group(model):
    spy = Spy(policy_loss)
    episodes = [([5], [7], 1.0, 0), ([5], [6, 2], 0.0, 0)]
    buffer = filled(model, episodes)
    empty = np.zeros(0, np.float32)
    buffer.add(np.array([5], np.int32), [], 2.0, empty, True, logprob=empty, group=0)
    trainer(model, loss_fn=spy).train(buffer)
    assert spy.calls[0][2].tolist() == [0.0, -1.0, -1.0]


def test_tokens_are_scored_at_the_temperature_that_sampled_them(model):
    spy = Spy(policy_loss)
    trainer(model, loss_fn=spy).train(filled(model, temperature=0.5))
    assert np.allclose(spy.calls[0][0], spy.calls[0][1], atol=1e-5)


def test_rollout_and_trainer_score_the_same_tokens_after_the_same_prompt(model):
    """On-policy, old and new log-probs are one: chat template, temperature and stop token included."""

    def length(prompt, completion, example):
        return len(completion)

    spy = Spy(policy_loss)
    env = TextGenerationEnv(["12", "345"], length, tokenizer=ChatTokenizer(), group_size=3)
    policy = create_policy(model, ChatTokenizer(), {"max_tokens": 9, "temperature": 1.3, "seed": 1})
    buffer = RolloutRunner(env, policy, create_strategy("grpo"), max_steps=6).collect()
    assert any(episode.act[0][-1] == 15 for episode in buffer.episodes)
    sampled = sum(len(episode.act[0]) for episode in buffer.episodes)
    assert trainer(model, loss_fn=spy).train(buffer)["grad_norm"] > 0
    old, new, _ = spy.calls[0]
    assert len(old) == sampled
    assert np.allclose(old, new, atol=1e-4)


# the step


@pytest.mark.parametrize("max_grad_norm", [float("inf"), 0.01])
def test_a_step_is_the_step_of_a_slow_loop_by_hand(model, max_grad_norm):
    buffer = filled(model, drift=-0.05)
    twin = tiny_llama(16)
    old = [mx.array(np.asarray(e.logprob[0])) for e in buffer.episodes]

    def by_hand(m):
        total, count = 0.0, 0
        for (prompt, completion, _, _), o, a in zip(EPISODES, old, ADVANTAGES, strict=True):
            ratio = mx.exp(own_logprobs(m, prompt, completion) - o)
            total = total - mx.minimum(ratio * a, mx.clip(ratio, 0.8, 1.28) * a).sum()
            count += len(completion)
        return total / count

    loss, grads = nn.value_and_grad(twin, by_hand)(twin)
    norm = float(mx.sqrt(sum((g * g).sum() for _, g in tree_flatten(grads))))
    scale = min(1.0, max_grad_norm / norm)
    twin.update(tree_map(lambda p, g: p - 0.1 * scale * g, twin.parameters(), grads))

    result = trainer(model, max_grad_norm=max_grad_norm).train(buffer)
    assert result["loss"] == pytest.approx(float(loss), abs=1e-5)
    assert result["grad_norm"] == pytest.approx(norm, rel=1e-3)
    for name, value in weights(model).items():
        assert np.allclose(value, weights(twin)[name], atol=1e-6), name


def test_every_adapter_tensor_moves_within_two_steps_and_no_other(model):
    attach_lora(model, rank=2)
    before, train = weights(model), trainer(model, optimizer=optim.Adam(1e-2))
    for _ in range(2):
        train.train(filled(model))
    assert moved(before, model) == {name for name in before if name.endswith(("lora_a", "lora_b"))}


def test_steps_raise_the_probability_of_what_was_rewarded(model):
    def preference():
        return float((own_logprobs(model, [8], [2, 6]).sum() - own_logprobs(model, [8], [2, 6, 1, 4]).sum()).item())

    before, train = preference(), trainer(model)
    for _ in range(5):
        train.train(filled(model))
    assert preference() > before + 0.05


def test_when_every_advantage_is_zero_not_even_momentum_moves_anything(model):
    train = trainer(model, optimizer=optim.Adam(1e-2))
    train.train(filled(model))
    before = weights(model)
    result = train.train(filled(model, [([5], [7], 1.0, 0), ([5], [6], 1.0, 0)]))
    assert result["grad_norm"] == 0
    assert result["step"] == 1
    assert moved(before, model) == set()


def test_groups_of_one_are_called_out_because_they_can_never_teach(model, caplog):
    with caplog.at_level(logging.WARNING):
        trainer(model).train(filled(model, [([5], [7], 1.0, 0), ([8], [6], 0.0, 1)]))
    assert "group_size of 2 or more" in caplog.text


# what comes back


def test_a_step_reports_loss_step_and_gradient_norm(model):
    train = trainer(model)
    results = [train.train(filled(model)) for _ in range(3)]
    assert all(set(r) == {"loss", "step", "grad_norm"} for r in results)
    assert [r["step"] for r in results] == [0, 1, 2]
    assert train.step_count == 3
    assert all(r["grad_norm"] > 0 for r in results)


def test_metrics_come_in_every_interval_th_step_from_the_first_and_describe_the_updated_model(model):
    train = trainer(model, metrics_fn=compute_metrics, metrics_interval=2)
    results = [train.train(filled(model)) for _ in range(4)]
    assert [("kl_divergence" in r) for r in results] == [True, False, True, False]
    assert results[0]["kl_divergence"] > 0


# the buffer


def test_a_linked_buffer_is_trained_on_and_emptied(model):
    buffer = filled(model)
    train = trainer(model, buffer=buffer)
    train.train()
    assert buffer.episodes == []


def test_a_buffer_passed_in_is_emptied_too_and_kept_when_off_policy(model):
    buffer, kept = filled(model), filled(model)
    trainer(model).train(buffer)
    trainer(model, on_policy=False).train(kept)
    assert (buffer.episode_count, kept.episode_count) == (0, 5)


def test_linking_replaces_and_unlinking_forgets_the_buffer(model):
    train = trainer(model)
    train.link_buffer(filled(model))
    train.train()
    train.unlink_buffer()
    with pytest.raises(UserError, match="link_buffer"):
        train.train()


# what cannot work


def test_without_a_buffer_train_says_how_to_give_one(model):
    with pytest.raises(UserError, match=r"pass one to train\(\), or link it"):
        trainer(model).train()


def test_a_dict_instead_of_a_buffer_is_refused(model):
    with pytest.raises(UserError, match="got a dict"):
        trainer(model).train({"rewards": [1.0]})


def test_an_empty_buffer_is_refused(model):
    with pytest.raises(UserError, match="collect some rollouts"):
        trainer(model).train(Buffer())


def test_a_model_without_trainable_parameters_is_refused(model):
    model.freeze()
    with pytest.raises(UserError, match="no trainable parameters"):
        trainer(model)


@pytest.mark.parametrize("setting", [{"max_grad_norm": 0.0}, {"metrics_interval": 0}])
def test_settings_out_of_range_are_refused(model, setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        trainer(model, **setting)


@pytest.mark.parametrize("temperature", [None, 0.0])
def test_episodes_that_no_learner_can_score_are_refused_and_kept(model, temperature):
    buffer = filled(model)
    buffer.episodes[2].temperature = temperature
    before = weights(model)
    with pytest.raises(UserError, match="top_p=1"):
        trainer(model).train(buffer)
    assert buffer.episode_count == 5
    assert moved(before, model) == set()


def test_an_advantage_function_must_return_one_number_for_each_reward(model):
    with pytest.raises(UserError, match="advantage_fn"):
        trainer(model, advantage_fn=lambda rewards: rewards.mean()).train(filled(model))
