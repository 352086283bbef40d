"""The MLX engine against naive oracles: one sequence at a time, nothing shared."""

import dataclasses
import errno
from itertools import chain

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import VOCABULARY, files_of_at_most, random_episodes, recipe, tiny_llama
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from textpolicy.algorithms import ALGORITHMS
from textpolicy.engine import Sampling
from textpolicy.errors import UserError
from textpolicy.losses import Surrogate, policy_objective
from textpolicy.mlx.adapters.merging import attach_lora, trainable
from textpolicy.mlx.engine import MLXEngine, PolicyObjective
from textpolicy.types import Episode

PROMPTS = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 8, 10, 11], [5, 6, 9], [44]]


def teacher_forced(model, tokens, temperature=1.0):
    """(L - 1, V) float32 log-probs of one sequence, read at once and without a cache."""
    logits = model(mx.array([tokens]))[0, :-1].astype(mx.float32) / temperature
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def naive_loss_and_gradients(model, batch, surrogate):
    """The whole padded batch in one forward pass, logits everywhere, nothing shared."""

    def loss(model):
        logits = model(mx.array(batch.inputs)).astype(mx.float32) / mx.array(batch.temperatures)[..., None]
        picked = mx.take_along_axis(logits, mx.array(batch.targets)[..., None], axis=-1)[..., 0]
        return policy_objective(picked - mx.logsumexp(logits, axis=-1), batch.map(mx.array), mx, surrogate)

    return nn.value_and_grad(model, loss)(model)


def assert_same_gradients(ours, oracle):
    for (name, a), (_, b) in zip(tree_flatten(ours), tree_flatten(oracle), strict=True):
        scale = np.abs(np.array(b)).max() + 1e-6
        np.testing.assert_allclose(np.array(a) / scale, np.array(b) / scale, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_decoded_logprobs_and_entropies_are_those_of_the_sequence_read_at_once(tiny_engine, temperature):
    sampled = tiny_engine.sample(PROMPTS, 3, Sampling(max_tokens=10, temperature=temperature, seed=1))
    for prompt, members in zip(PROMPTS, sampled, strict=True):
        for c in members:
            exact = teacher_forced(tiny_engine.model, [*prompt, *c.tokens.tolist()], temperature)[len(prompt) - 1 :]
            np.testing.assert_allclose(c.logprobs, exact[np.arange(len(c.tokens)), c.tokens], atol=1e-4)
            np.testing.assert_allclose(c.entropy, -(np.exp(exact) * exact).sum(1), atol=1e-4)
            assert c.temperature == temperature


def test_greedy_decoding_equals_one_token_at_a_time_without_a_cache(tiny_engine):
    for prompt, [c] in zip(PROMPTS, tiny_engine.sample(PROMPTS, 1, Sampling(8, temperature=0.0)), strict=True):
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 8 and tokens[-1] != 0:
            tokens.append(int(tiny_engine.model(mx.array([tokens]))[0, -1].argmax()))
        assert c.tokens.tolist() == tokens[len(prompt) :]


def test_completions_do_not_depend_on_how_many_are_decoded_side_by_side(tiny_engine):
    wide = tiny_engine.sample(PROMPTS, 4, Sampling(max_tokens=12, seed=3))
    tiny_engine.decode_rows = 3
    narrow = tiny_engine.sample(PROMPTS, 4, Sampling(max_tokens=12, seed=3))
    for a, b in zip(chain(*wide), chain(*narrow), strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()


def test_the_stop_token_is_kept_scored_and_last(tiny_engine):
    tiny_engine.stop = np.arange(0, VOCABULARY, 3)
    completions = list(chain(*tiny_engine.sample(PROMPTS, 8, Sampling(max_tokens=6, seed=0))))
    ended = [c for c in completions if not c.truncated]
    assert ended
    assert all(c.tokens[-1] % 3 == 0 and (c.tokens[:-1] % 3 != 0).all() for c in ended)
    assert all(len(c.logprobs) == len(c.tokens) == len(c.entropy) for c in completions)
    assert all(len(c.tokens) == 6 for c in completions if c.truncated)


def test_a_truncated_or_penalised_distribution_has_no_temperature(tiny_engine):
    for sampling in (Sampling(3, top_p=0.9), Sampling(3, repetition_penalty=1.2)):
        [[c]] = tiny_engine.sample([[5]], 1, sampling)
        assert c.temperature is None


def test_a_strong_penalty_never_repeats_a_token(tiny_engine):
    [[c]] = tiny_engine.sample([[5, 6]], 1, Sampling(20, temperature=0.0, repetition_penalty=1e6))
    positive = len(set(c.tokens.tolist()))
    [[free]] = tiny_engine.sample([[5, 6]], 1, Sampling(20, temperature=0.0))
    assert positive == len(c.tokens) > len(set(free.tokens.tolist()))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_loss_and_gradient_equal_the_naive_path(tiny_engine, name):
    surrogate = recipe(name).surrogate
    batch = recipe(name).credit(random_episodes(np.random.default_rng(1)))
    loss, gradients = naive_loss_and_gradients(tiny_engine.model, batch, surrogate)
    stats, ours = tiny_engine.gradients(batch, PolicyObjective(surrogate))
    assert stats["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
    assert_same_gradients(ours, gradients)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("budget", [1, 30, 100])
def test_gradient_does_not_depend_on_micro_batching(tiny_engine, name, budget):
    batch = recipe(name).credit(random_episodes(np.random.default_rng(2)))
    objective = PolicyObjective(recipe(name).surrogate)
    whole, gradients = tiny_engine.gradients(batch, objective)
    tiny_engine.micro_batch_tokens = budget
    parts, ours = tiny_engine.gradients(batch, objective)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4, abs=1e-5)
    assert parts["tokens"] == whole["tokens"] == (batch.weights != 0).sum()
    assert_same_gradients(ours, gradients)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_loss_agrees_in_numpy_and_mlx(name):
    rng, surrogate = np.random.default_rng(8), recipe(name).surrogate
    batch = recipe(name).credit(random_episodes(rng))
    logprobs = (batch.logprobs + rng.normal(0, 0.3, batch.logprobs.shape)).astype(np.float32)
    ours = policy_objective(mx.array(logprobs), batch.map(mx.array), mx, surrogate).item()
    assert ours == pytest.approx(float(policy_objective(logprobs, batch, np, surrogate)), rel=1e-4, abs=1e-6)


def test_repeated_completions_are_scored_once_and_count_each_time(tiny_engine):
    episodes = random_episodes(np.random.default_rng(3), groups=2, size=3)
    twice = [e for e in episodes for _ in range(2)]
    batch = recipe("dr_grpo").credit(twice)
    loss, gradients = naive_loss_and_gradients(tiny_engine.model, batch, Surrogate())
    stats, ours = tiny_engine.gradients(batch, PolicyObjective(Surrogate()))
    assert stats["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
    assert stats["tokens"] == (batch.weights != 0).sum()
    assert_same_gradients(ours, gradients)


def test_the_learner_scores_at_the_temperature_that_sampled(tiny_engine):
    sampled = tiny_engine.sample(PROMPTS[:2], 4, Sampling(max_tokens=6, temperature=0.5, seed=2))
    episodes = [
        Episode.from_completion(p, c, reward=float(i), group=g)
        for g, (p, members) in enumerate(zip(PROMPTS, sampled, strict=False))
        for i, c in enumerate(members)
    ]
    metrics = tiny_engine.update(recipe("grpo").credit(episodes), Surrogate(), 1e-3)
    assert metrics["logprob_gap_max"] < 1e-4
    assert metrics["clip_fraction_low"] == metrics["clip_fraction_high"] == 0
    hotter = [dataclasses.replace(e, temperature=1.0) for e in episodes]
    assert tiny_engine.update(recipe("grpo").credit(hotter), Surrogate(), 1e-3)["logprob_gap_max"] > 0.1


def test_every_lora_tensor_moves_in_one_step_and_nothing_else_does(tiny_engine):
    before = dict(tree_flatten(tiny_engine.model.parameters()))
    before = {name: np.array(value) for name, value in before.items()}
    tiny_engine.update(recipe("grpo").credit(random_episodes(np.random.default_rng(4))), Surrogate(), 1e-2)
    for name, value in tree_flatten(tiny_engine.model.parameters()):
        moved = not np.array_equal(before[name], np.array(value))
        assert moved == ("lora" in name), name


def test_constant_rewards_move_nothing_not_even_by_momentum(tiny_engine):
    rng = np.random.default_rng(5)
    tiny_engine.update(recipe("grpo").credit(random_episodes(rng)), Surrogate(), 1e-2)
    before = {name: np.array(value) for name, value in trainable(tiny_engine.model).items()}
    constant = [dataclasses.replace(e, reward=0.1) for e in random_episodes(rng)]
    metrics = tiny_engine.update(recipe("grpo").credit(constant), Surrogate(), 1e-2)
    assert metrics["updated"] == metrics["grad_norm"] == 0
    for name, value in trainable(tiny_engine.model).items():
        np.testing.assert_array_equal(before[name], np.array(value))


def test_an_update_that_is_not_finite_is_skipped_before_anything_moves(tiny_engine):
    before = {name: np.array(value) for name, value in trainable(tiny_engine.model).items()}
    episodes = random_episodes(np.random.default_rng(6))
    batch = recipe("dr_grpo").credit(episodes)
    poisoned = dataclasses.replace(batch, advantages=np.full_like(batch.advantages, np.inf))
    metrics = tiny_engine.update(poisoned, Surrogate(), 1e-2)
    assert (metrics["skipped"], metrics["updated"]) == (1, 0)
    for name, value in trainable(tiny_engine.model).items():
        np.testing.assert_array_equal(before[name], np.array(value))


def test_a_prompt_without_tokens_is_refused_and_no_prompts_are_no_completions(tiny_engine):
    assert tiny_engine.sample([], 2, Sampling(4)) == []
    with pytest.raises(UserError, match="a prompt is empty; give every prompt at least one token"):
        tiny_engine.sample([[5], []], 2, Sampling(4))


def test_a_saved_adapter_loads_in_mlx_lm_and_replaces_an_older_one_whole(tiny_engine, tmp_path):
    from mlx_lm.tuner.utils import load_adapters

    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapters.safetensors").write_text("from an older run")
    tiny_engine.save(tmp_path / "adapter")
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["adapter_config.json", "adapters.safetensors"]
    mx.random.seed(0)
    fresh = llama.Model(tiny_engine.model.args)
    base = [(k.replace(".linear.", "."), v) for k, v in tree_flatten(tiny_engine.model.parameters()) if "lora" not in k]
    fresh.load_weights(base)
    fresh.freeze()
    loaded = load_adapters(fresh, str(tmp_path / "adapter"))
    tokens = mx.array([[5, 6, 7]])
    np.testing.assert_allclose(np.array(loaded(tokens)), np.array(tiny_engine.model(tokens)), atol=1e-5)


def test_a_fresh_adapter_changes_nothing_and_is_fixed_by_its_seed():
    args = llama.ModelArgs("llama", 32, 1, 64, 4, 1e-5, 50, num_key_value_heads=2)
    base = llama.Model(args)
    tokens = mx.array([[1, 2, 3]])
    plain = np.array(base(tokens))
    adapted = attach_lora(base, rank=2, seed=11)
    np.testing.assert_array_equal(plain, np.array(adapted(tokens)))
    assert not any(np.array(value).any() for name, value in trainable(adapted).items() if name.endswith("lora_b"))
    again = attach_lora(llama.Model(args), rank=2, seed=11)
    for name, value in trainable(adapted).items():
        np.testing.assert_array_equal(np.array(value), np.array(trainable(again)[name]))


# ---- the state of a run


def trained_engine(rank=4, layers=2, optimizer=None, vocabulary=VOCABULARY):
    model = attach_lora(tiny_llama(vocabulary, layers=layers), rank=rank)
    engine = MLXEngine(model, stop=[0], optimizer=optimizer)
    engine.update(recipe("grpo").credit(random_episodes(np.random.default_rng(0))), Surrogate(), 1e-2)
    return engine


def test_an_engine_resumes_from_its_state_as_if_it_had_not_stopped(tmp_path):
    engine, other = trained_engine(), trained_engine()
    batch = recipe("grpo").credit(random_episodes(np.random.default_rng(5)))
    other.update(batch, Surrogate(), 1e-1)
    engine.write_state(tmp_path)
    other.read_state(tmp_path)
    for e in (engine, other):
        e.update(batch, Surrogate(), 1e-2)
    for (name, a), b in zip(engine.weights().items(), other.weights().values(), strict=True):
        assert np.array_equal(a, b), name


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"rank": 2}, r"lora_\w is \(.*\) mlx\.core\.float32 and the model's \("),
        ({"layers": 1}, r"this model has no weights\.model\.layers\.1\."),
        ({"layers": 3}, r"it lacks weights\.model\.layers\.2\."),
        ({"optimizer": optim.SGD(1e-3)}, r"this model has no optimizer\."),
    ],
)
def test_the_state_of_another_model_or_optimiser_is_refused_and_changes_nothing(other, message, tmp_path):
    trained_engine().write_state(tmp_path)
    engine = trained_engine(**other)
    before, key = engine.weights(), np.array(mx.random.state[0])
    with pytest.raises(UserError, match=message) as raised:
        engine.read_state(tmp_path)
    assert "is of another model or optimiser" in str(raised.value)
    for name, value in engine.weights().items():
        assert np.array_equal(value, before[name]), name
    assert np.array_equal(mx.random.state[0], key)


def test_a_state_that_there_is_no_room_for_is_an_error_of_the_disk(tmp_path):
    engine = trained_engine()
    with files_of_at_most(1000), pytest.raises(OSError, match="Unable to write") as raised:
        engine.write_state(tmp_path)
    assert raised.value.errno in (errno.EIO, errno.ENOSPC)
    assert raised.value.filename == str(tmp_path / "engine.safetensors")


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        *(("checkpoint_every", value, 0) for value in (-1, 1.5, True, "2")),
        *(("decode_rows", value, 1) for value in (0, -3, 2.0, None)),
        *(("micro_batch_tokens", value, 1) for value in (0, float("nan"), "8192")),
    ],
)
def test_sizes_that_are_no_counts_are_refused(tiny_engine, name, value, least):
    with pytest.raises(UserError, match=f"{name} is .*; set it to {least} or more"):
        MLXEngine(tiny_engine.model, stop=[0], **{name: value})
