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

from textpolicy.algorithms.grpo import (
    compute_advantages,
    compute_advantages_maxrl,
    compute_metrics,
    policy_loss,
    select_informative_data,
    select_recent_data,
)
from textpolicy.algorithms.gspo import compute_metrics_sequence, create_gspo_policy_loss, policy_loss_sequence
from textpolicy.buffer import Buffer
from textpolicy.environment import TextGenerationEnv
from textpolicy.errors import UserError
from textpolicy.generation.mlx_generation import create_policy
from textpolicy.mlx.adapters.merging import attach_lora
from textpolicy.mlx.score.micro_batches import Layout
from textpolicy.rollout import RolloutRunner, create_strategy
from textpolicy.training.trainer import Trainer, build_gtpo_hicra_transform, build_gtpo_transform

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


# memory and speed


def stepped(**changes):
    """Results and weights of two steps of a tiny model, under a loss that is no sum."""
    model = tiny_llama(16)
    ours = trainer(model, loss_fn=mean_of_ratios_squared, **changes)
    results = [ours.train(filled(model, drift=0.1)) for _ in range(2)]
    return results, weights(model)


def mean_of_ratios_squared(old, new, advantages):
    return (mx.exp(new - old) * advantages).mean() ** 2 + ((new - old) ** 2).mean()


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 1},
        {"micro_batch_size": 2},
        {"micro_batch_size": 100},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": 2, "micro_batch_size": 2},
        {"compile_training": True},
        {"compile_training": True, "micro_batch_size": 2},
        {"compile_training": False, "profile": True},
    ],
)
def test_settings_of_memory_and_speed_change_no_step_of_any_loss(changes):
    plain, plain_weights = stepped()
    results, ours = stepped(**changes)
    for a, b in zip(results, plain, strict=True):
        assert b["grad_norm"] > 0
        assert {name: a[name] for name in b} == pytest.approx(b, rel=1e-4)
    for name, value in ours.items():
        assert np.allclose(value, plain_weights[name], atol=1e-5), name


def test_micro_batches_hold_so_many_episodes_at_a_time(model, monkeypatch):
    sizes = []
    build = Layout.build
    monkeypatch.setattr(Layout, "build", lambda batch: sizes.append(len(batch)) or build(batch))
    trainer(model, micro_batch_size=2).train(filled(model))
    assert sizes == [2, 2, 1] * 2  # for the log-probs that the loss sees, then for the gradients


def test_metrics_are_the_same_in_micro_batches(model):
    say = Spy(compute_metrics)
    trainer(model, metrics_fn=partial(say), micro_batch_size=2, optimizer=optim.SGD(0.0)).train(filled(model))
    old, new, _ = say.calls[0]
    assert np.allclose(old, new, atol=1e-5)


def test_checkpointed_blocks_keep_no_activations():
    """Peak memory of a step falls, as it would not if they were kept all the same."""
    peaks = {}
    for every in (False, True):
        model = tiny_llama(16, layers=12)
        buffer = filled(model, [([5] * 10, [7] * 200, 1.0, 0), ([5] * 10, [6] * 200, 0.0, 0)])
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        trainer(model, gradient_checkpointing=every).train(buffer)
        peaks[every] = mx.get_peak_memory() - before
    assert peaks[True] < 0.6 * peaks[False]


def test_a_profile_splits_the_time_of_a_step_into_parts(model):
    plain = trainer(model).train(filled(model))
    result = trainer(model, profile=True, metrics_fn=compute_metrics).train(filled(model))
    assert not any(name.startswith("timing/") for name in plain)
    parts = ("select", "advantages", "gradients", "optimizer", "metrics")
    seconds = [result[f"timing/{part}_s"] for part in parts]
    assert all(s > 0 for s in seconds)
    assert sum(seconds) <= result["timing/total_s"]
    assert sum(result[f"timing/{part}_pct"] for part in parts) == pytest.approx(
        100 * sum(seconds) / result["timing/total_s"]
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"compile_training": "yes"}, "compile_training is 'yes'; set it to True, False or 'auto'"),
        ({"gradient_checkpointing": -1}, "gradient_checkpointing is -1; set it to True"),
        ({"gradient_checkpointing": 0}, "gradient_checkpointing is 0; set it to True"),
        ({"gradient_checkpointing": 1.5}, "gradient_checkpointing is 1.5; set it to True"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0; set it to a number of episodes, 1 or more"),
        ({"micro_batch_size": 2.0}, "micro_batch_size is 2.0; set it to a number"),
        ({"micro_batch_size": True}, "micro_batch_size is True; set it to a number"),
    ],
)
def test_a_setting_of_memory_and_speed_that_cannot_work_is_refused(model, changes, sentence):
    with pytest.raises(UserError) as message:
        trainer(model, **changes)
    assert sentence in str(message.value)


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


# rows of tokens, where the policy's turns stand in each, and rewards: two episodes of several turns, one of one
TURNS = [
    ([5, 9, 7, 3, 4, 4, 2, 1], [(2, 4), (7, 8)], 1.0),
    ([5, 9, 2, 8, 6, 6], [(2, 3), (4, 6)], 0.0),
    ([5, 9, 7, 7], [(2, 4)], 0.5),
]


def filled_with_turns(model):
    buffer = Buffer()
    for row, spans, reward in TURNS:
        own = np.asarray(own_logprobs(model, row[:1], row[1:]))
        for start, end in spans:
            last = end == len(row)
            obs, logprob = np.array(row[:start], np.int32), own[start - 1 : end - 1]
            buffer.add(obs, row[start:end], reward * last, obs[:0], last, logprob=logprob, group=0)
    return buffer


@pytest.mark.parametrize("size", [None, 1, 2])
def test_several_turns_are_scored_after_everything_before_them_and_replies_teach_nothing(model, size):
    """Against one pass over each row, of which only the turns are taken."""
    spy, buffer, twin = Spy(policy_loss), filled_with_turns(model), tiny_llama(16)

    def by_hand(m):
        total, count = 0.0, 0
        for (row, spans, _), advantage in zip(TURNS, [0.5, -0.5, 0.0], strict=True):
            own = own_logprobs(m, row[:1], row[1:])
            for start, end in spans:
                new = own[start - 1 : end - 1]
                total = total - (mx.exp(new - mx.stop_gradient(new)) * advantage).sum()
                count += end - start
        return total / count

    loss, grads = nn.value_and_grad(twin, by_hand)(twin)
    twin.update(tree_map(lambda p, g: p - 0.1 * g, twin.parameters(), grads))
    result = trainer(model, loss_fn=spy, micro_batch_size=size, max_grad_norm=float("inf")).train(buffer)
    assert result["loss"] == pytest.approx(float(loss), abs=1e-5)
    assert np.allclose(spy.calls[0][0], spy.calls[0][1], atol=1e-5)
    assert spy.calls[0][2].tolist() == [0.5, 0.5, 0.5, -0.5, -0.5, -0.5, 0.0, 0.0]
    for name, value in weights(model).items():
        assert np.allclose(value, weights(twin)[name], atol=1e-6), name


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


def test_unscorable_episodes_are_not_shown_and_get_no_advantage(model):
    nan = float("nan")
    episodes = [([5], [7], 1.0, 0), ([5], [6], nan, 0), ([5], [3], 0.0, 0), ([8], [2], nan, 1), ([8], [4], nan, 1)]
    advantages, loss = Spy(compute_advantages), Spy(policy_loss)
    trainer(model, advantage_fn=advantages, loss_fn=loss).train(filled(model, episodes))
    assert [call[0].tolist() for call in advantages.calls] == [[1.0, 0.0]]
    assert loss.calls[0][2].tolist() == [0.5, 0.0, -0.5, 0.0, 0.0]


def test_maxrl_sees_one_group_at_a_time(model):
    spy = Spy(policy_loss)
    episodes = [([5], [7], 1.0, 0), ([5], [6], 0.0, 0), ([8], [2], 1.0, 1), ([8], [3], 1.0, 1)]
    trainer(model, advantage_fn=compute_advantages_maxrl, loss_fn=spy).train(filled(model, episodes))
    assert np.allclose(spy.calls[0][2], [1, -1, 0, 0], atol=1e-5)


def test_the_rewards_that_the_advantages_are_made_of_can_be_chosen(model):
    spy = Spy(compute_advantages)
    trainer(model, advantage_fn=spy, advantage_reward_key="binary_rewards").train(filled(model))
    assert sorted(call[0].tolist() for call in spy.calls) == [[0.0, 1.0], [1.0, 0.0, 0.0]]
    with pytest.raises(UserError, match="did you mean 'binary_rewards'"):
        trainer(model, advantage_reward_key="binary_reward").train(filled(model))
    with pytest.raises(UserError, match=r"'logprob', of shape \(11,\) for 5 episodes"):
        trainer(model, advantage_reward_key="logprob").train(filled(model))


# sequence lengths

LENGTHS = [1, 4, 3, 2, 1]


def test_functions_that_name_sequence_lengths_are_given_them(model):
    seen = []

    def loss(old, new, advantages, sequence_lengths):
        seen.append(("loss", sequence_lengths.tolist()))
        return policy_loss(old, new, advantages)

    def metrics(old, new, advantages, *, sequence_lengths=None):
        seen.append(("metrics", sequence_lengths.tolist()))
        return {}

    trainer(model, loss_fn=loss, metrics_fn=metrics).train(filled(model))
    assert seen == [("loss", LENGTHS), ("metrics", LENGTHS)]


def test_an_episode_without_tokens_has_no_length(model):
    seen = []

    def loss(old, new, advantages, sequence_lengths):
        seen.append(sequence_lengths.tolist())
        return policy_loss(old, new, advantages)

    buffer, empty = filled(model, [([5], [7, 1], 1.0, 0), ([5], [6], 0.0, 0)]), np.zeros(0, np.float32)
    buffer.add(np.array([5], np.int32), [], 0.0, empty, True, logprob=empty, group=0)
    buffer.episodes.insert(1, buffer.episodes.pop())
    trainer(model, loss_fn=loss).train(buffer)
    assert seen == [[2, 1]]


@pytest.mark.parametrize("loss_fn", [policy_loss_sequence, create_gspo_policy_loss(), create_gspo_policy_loss("token")])
def test_gspo_trains_on_whole_episodes(model, loss_fn):
    """The loss is that of a loop over the episodes: s = exp(-0.05 n) of the n-th, outside the band."""
    ratios = [np.exp(-0.05 * n) for n in range(1, 6)]
    terms = [min(s * a, np.clip(s, 0.9997, 1.0004) * a) for s, a in zip(ratios, ADVANTAGES, strict=True)]
    result = trainer(model, loss_fn=loss_fn, metrics_fn=compute_metrics_sequence).train(filled(model, drift=0.05))
    assert result["loss"] == pytest.approx(-np.mean(terms), rel=1e-4)
    assert result["grad_norm"] > 0
    assert result["seq_clip_fraction"] == 1


# selected data


def test_a_selector_chooses_the_episodes_of_the_buffer_to_train_on(model):
    spy = Spy(policy_loss)
    last_two = partial(select_recent_data, max_episodes=2)
    trainer(model, loss_fn=spy, data_selector_fn=last_two).train(filled(model))
    assert spy.calls[0][2].tolist() == [0.0, 0.0, 0.0]  # each alone in its group now


def test_a_dict_of_selected_data_is_trained_on_like_the_buffer(model):
    twin, buffer = tiny_llama(16), filled(model, drift=0.1)
    data = select_recent_data(buffer)
    one, other = trainer(model).train(buffer), trainer(twin).train({k: _mlx(v) for k, v in data.items()})
    assert one == other
    assert all(np.array_equal(value, weights(twin)[name]) for name, value in weights(model).items())


def _mlx(value):
    return mx.array(value) if isinstance(value, np.ndarray) else value


def test_a_dict_leaves_the_linked_buffer_alone(model):
    buffer = filled(model)
    trainer(model, buffer=buffer).train(select_recent_data(buffer))
    assert buffer.episode_count == 5


def test_a_step_without_an_informative_group_moves_no_weight(model):
    buffer = filled(model, [([5], [7], 1.0, 0), ([5], [6], 1.0, 0)])
    before, train = weights(model), trainer(model, data_selector_fn=select_informative_data, metrics_fn=compute_metrics)
    assert train.train(buffer) == {"loss": 0.0, "grad_norm": 0.0, "step": 0}
    assert buffer.episodes == []
    assert moved(before, model) == set()
    assert train.step_count == 1


def test_linking_a_buffer_can_bring_a_selector_and_keeps_the_one_before(model):
    counts = []

    def select(buffer):
        counts.append(buffer.episode_count)
        return select_recent_data(buffer)

    train = trainer(model)
    train.link_buffer(filled(model), select)
    train.train()
    train.link_buffer(filled(model, EPISODES[:3]))
    train.train()
    assert counts == [5, 3]


# transforms


class Doubling:
    """Doubles advantages and remembers what it saw."""

    def __init__(self):
        self.seen = []

    def prepare_batch(self, batch):
        self.seen.append("prepared")
        batch["factor"] = 2

    def __call__(self, advantages, batch):
        self.seen.append(batch)
        return advantages * batch["factor"]

    def postprocess_batch(self, batch):
        self.seen.append("processed")
        batch["transform_metrics"] = {"factor": float(batch["factor"])}


def test_a_transform_changes_the_advantages_of_the_tokens(model):
    spy, double = Spy(policy_loss), Doubling()
    result = trainer(model, loss_fn=spy, advantage_transform_fn=double).train(filled(model))
    assert spy.calls[0][2].tolist() == (2 * np.repeat(ADVANTAGES, LENGTHS)).tolist()
    assert result["factor"] == 2
    assert [s for s in double.seen if isinstance(s, str)] == ["prepared", "processed"]


def test_a_transform_sees_the_selected_data_as_mlx_arrays_and_the_step(model):
    double, buffer = Doubling(), filled(model)
    wanted = select_recent_data(buffer)
    train = trainer(model, advantage_transform_fn=double, on_policy=False)
    train.train(buffer)
    train.train(buffer)
    batch = double.seen[1]
    assert {type(batch[name]) for name, value in wanted.items() if isinstance(value, np.ndarray)} == {mx.array}
    assert batch["rewards"].tolist() == [1.0, 0.0, 0.0, 3.0, 0.5]
    assert batch["act"].tolist() == wanted["act"].tolist()
    assert [b["step"] for b in double.seen if isinstance(b, dict)] == [0, 1]


def test_a_plain_function_is_accepted_as_a_transform(model):
    spy = Spy(policy_loss)
    trainer(model, loss_fn=spy, advantage_transform_fn=lambda a, batch: np.array(a) * 0 + 1).train(filled(model))
    assert spy.calls[0][2].tolist() == [1.0] * 11


@pytest.mark.parametrize("wrong", [lambda a, batch: a[:-1], lambda a, batch: a[None], lambda a, batch: a / 0])
def test_a_transform_must_return_one_finite_number_for_each_token(model, wrong):
    buffer, before = filled(model), weights(model)
    with pytest.raises(UserError, match="advantage_transform_fn returned"):
        trainer(model, advantage_transform_fn=wrong).train(buffer)
    assert buffer.episode_count == 5
    assert moved(before, model) == set()


@pytest.mark.parametrize("base", [False, True])
def test_the_built_in_transforms_train_on_episodes_of_a_policy(model, base):
    """Exact entropies come from the policy, and the correct rate that opens SEPA's gate from the rewards."""

    def even(prompt, completion, example):
        return {"reward": float(len(completion)), "is_correct": len(completion) % 2 == 0}

    env = TextGenerationEnv(["12", "345"], even, tokenizer=ChatTokenizer(), group_size=4)
    policy = create_policy(model, ChatTokenizer(), {"max_tokens": 5, "seed": 1})
    runner = RolloutRunner(env, policy, create_strategy("grpo"), max_steps=8)
    transform = build_gtpo_transform(
        tokenizer=ChatTokenizer(), strategic_grams=["1"], sepa_steps=2, sepa_correct_rate_gate=0.1, use_maxrl_base=base
    )
    train = trainer(model, advantage_transform_fn=transform, advantage_reward_key="binary_rewards")
    results = [train.train(runner.collect()) for _ in range(3)]
    assert [r["sepa_lambda"] for r in results] == [0, 0.5, 1]
    assert all(r["sepa_gate_open"] == 1 and r["grad_norm"] > 0 for r in results)
    other = trainer(model, advantage_transform_fn=build_gtpo_hicra_transform(ChatTokenizer()))
    assert other.train(runner.collect())["grad_norm"] > 0


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


def test_steps_raise_the_probability_of_rewarded_completions(model):
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


def test_groups_of_one_log_a_warning_because_they_can_never_teach(model, caplog):
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


def test_without_a_buffer_the_error_explains_how_to_pass_one(model):
    with pytest.raises(UserError, match=r"pass one to train\(\), or link it"):
        trainer(model).train()


def test_a_dict_that_no_selector_made_is_refused(model):
    with pytest.raises(UserError, match="lacks obs, logprob, episode_lengths"):
        trainer(model).train({"rewards": [1.0]})


def test_data_that_is_neither_buffer_nor_dict_is_refused(model):
    with pytest.raises(UserError, match="got a list; pass the Buffer"):
        trainer(model).train([1.0])


def test_a_buffer_of_nothing_but_empty_completions_is_refused(model):
    buffer, empty, before = Buffer(), np.zeros(0, np.float32), weights(model)
    for reward in (0.0, 1.0):
        buffer.add(np.array([5], np.int32), [], reward, empty, True, logprob=empty, group=0)
    with pytest.raises(UserError, match="every completion in the buffer is empty; collect some that hold tokens"):
        trainer(model).train(buffer)
    assert all(np.array_equal(value, before[name]) for name, value in weights(model).items())


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
