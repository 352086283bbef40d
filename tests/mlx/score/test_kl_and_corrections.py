"""The engine's reference, KL and corrections: against a model without adapters, read one sequence at a time."""

import math
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import VOCABULARY, random_episodes, recipe, tiny_llama
from mlx.utils import tree_flatten

from textpolicy.engine import Sampling
from textpolicy.environment.single_turn import TextGenerationEnv
from textpolicy.errors import UserError
from textpolicy.loop.collect import collect, with_reference
from textpolicy.loop.train import Schedule, train
from textpolicy.losses import KL, Clip, Correction, ImportanceSampling, Surrogate, policy_objective
from textpolicy.mlx.adapters.merging import adapters_off, attach_lora, trainable
from textpolicy.mlx.engine import MLXEngine
from textpolicy.types import Batch, Completion, Episode

KINDS = ["float", "quantised", "last layer"]


def base_model(kind):
    model = tiny_llama(VOCABULARY)
    if kind == "quantised":
        nn.quantize(model, group_size=32, bits=8)
    return model


def made_engine(kind="float"):
    """A tiny Llama with random adapters, so that the reference is another model."""
    model = attach_lora(base_model(kind), rank=4, layers=1 if kind == "last layer" else 0)
    for module in model.modules():
        if "lora_b" in module:
            module.lora_b = 0.3 * mx.random.normal(module.lora_b.shape)
    mx.eval(model.parameters())
    return MLXEngine(model, stop=[0])


def read_at_once(model, tokens, temperature=1.0):
    """log p(tokens[t + 1]) for every t, one sequence without cache, tree or batch."""
    logits = np.array(model(mx.array([tokens.tolist()]))[0, :-1].astype(mx.float32), np.float64) / temperature
    logits -= logits.max(axis=1, keepdims=True)
    return logits[np.arange(len(tokens) - 1), tokens[1:]] - np.log(np.exp(logits).sum(axis=1))


def with_holes(rng, temperature=1.0):
    """Episodes in which a tool wrote some of the tokens, and one in which nothing was sampled."""
    episodes = []
    for e in random_episodes(rng):
        mask = e.mask & (rng.random(len(e.mask)) < 0.7)
        episodes.append(replace(e, mask=mask, logprobs=np.where(mask, e.logprobs, 0), temperature=temperature))
    return [*episodes, replace(episodes[0], mask=np.zeros_like(episodes[0].mask))]


def plain_batch(episodes, value=0.0):
    return Batch.pack(episodes, [np.full(len(e.tokens), value, np.float32) for e in episodes])


def weights_of(model):
    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}


def assert_same_weights(before, model):
    after = weights_of(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.tobytes() == after[name].tobytes(), name


# ---- scoring


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_scores_stand_where_the_batch_has_the_token_and_equal_the_sequence_read_at_once(budget, temperature):
    engine, episodes = made_engine(), with_holes(np.random.default_rng(0), temperature)
    engine.micro_batch_tokens = budget
    batch = plain_batch(episodes)
    scored = engine.score(batch)
    assert (scored.dtype, scored.shape) == (np.float32, batch.targets.shape)
    for line, e in zip(scored, episodes, strict=True):
        exact = np.where(e.mask[1:], read_at_once(engine.model, e.tokens, temperature), 0)
        np.testing.assert_allclose(line[: len(exact)], exact, atol=1e-4)
        assert not line[len(exact) :].any()


def test_a_batch_without_sampled_tokens_scores_0():
    episodes = [replace(e, mask=np.zeros_like(e.mask)) for e in random_episodes(np.random.default_rng(0))]
    batch = plain_batch(episodes)
    assert np.array_equal(made_engine().score(batch), np.zeros(batch.weights.shape, np.float32))


# ---- the reference


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_model_without_adapters_bit_for_bit(kind):
    engine, plain = made_engine(kind), MLXEngine(base_model(kind), stop=[0])
    batch = plain_batch(random_episodes(np.random.default_rng(1)))
    reference = engine.score(batch, reference=True)
    assert np.array_equal(reference, plain.score(batch))
    assert np.abs(reference - engine.score(batch)).max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_scoring_the_reference_changes_no_weight_and_leaves_the_adapters_on(kind):
    engine, batch = made_engine(kind), plain_batch(random_episodes(np.random.default_rng(1)))
    before, names, scored = weights_of(engine.model), set(trainable(engine.model)), engine.score(batch)
    modules = [id(m) for m in engine.model.modules()]
    engine.score(batch, reference=True)
    assert_same_weights(before, engine.model)
    assert set(trainable(engine.model)) == names
    assert [id(m) for m in engine.model.modules()] == modules
    assert np.array_equal(engine.score(batch), scored)


def test_the_adapters_are_back_on_when_scoring_fails(monkeypatch):
    engine, batch = made_engine(), plain_batch(random_episodes(np.random.default_rng(1)))
    before, scored = weights_of(engine.model), engine.score(batch)

    def fail(*arguments):
        raise MemoryError("no room for the logits")

    with monkeypatch.context() as patched:
        patched.setattr("textpolicy.mlx.engine.logprobs_of", fail)
        with pytest.raises(MemoryError):
            engine.score(batch, reference=True)
    assert_same_weights(before, engine.model)
    assert np.array_equal(engine.score(batch), scored)


def test_with_adapters_off_nothing_is_trainable_and_afterwards_they_are():
    model = made_engine().model
    names = set(trainable(model))
    with adapters_off(model):
        assert not trainable(model)
    assert set(trainable(model)) == names != set()


def test_a_model_without_adapters_has_no_reference_and_the_error_names_the_remedy():
    engine, batch = MLXEngine(base_model("float"), stop=[0]), plain_batch(random_episodes(np.random.default_rng(1)))
    with pytest.raises(UserError, match="no adapter to switch off for the KL reference; attach"):
        engine.score(batch, reference=True)


# ---- the KL in the loss


def naive_gradient(model, batch, reference, surrogate):
    """Every row at full width in one pass, with the reference of a model of its own."""
    given = replace(batch, reference=reference)

    def loss(model):
        logits = model(mx.array(batch.inputs)).astype(mx.float32) / mx.array(batch.temperatures)[..., None]
        picked = mx.take_along_axis(logits, mx.array(batch.targets)[..., None], axis=-1)[..., 0]
        return policy_objective(picked - mx.logsumexp(logits, axis=-1), given.map(mx.array), mx, surrogate)

    value, gradient = nn.value_and_grad(model, loss)(model)
    return value.item(), gradient


class Recording(MLXEngine):
    """Keeps the gradients of its last update instead of applying them."""

    def apply(self, grads, learning_rate=None):
        self.kept = dict(tree_flatten(grads))
        return 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3+"])
def test_an_update_with_a_kl_has_the_naive_gradient_rows_without_advantage_included(kind, estimator):
    engine = Recording(made_engine(kind).model, stop=[0], micro_batch_tokens=50)
    episodes = [replace(e, reward=1.0) if e.group < 2 else e for e in with_holes(np.random.default_rng(2))]
    batch, surrogate = recipe("grpo").credit(episodes), Surrogate(kl=KL(0.5, estimator))
    assert not batch.advantages[:8].any()
    reference = MLXEngine(base_model(kind), stop=[0]).score(batch)
    loss, expected = naive_gradient(engine.model, batch, reference, surrogate)
    metrics = engine.update(batch, surrogate, 1e-3)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
    for name, value in tree_flatten(expected):
        scale = np.abs(np.array(value)).max() + 1e-6
        np.testing.assert_allclose(
            np.array(engine.kept[name]) / scale, np.array(value) / scale, atol=3e-4, err_msg=name
        )


def test_without_advantages_the_kl_alone_moves_the_adapters_towards_the_reference():
    engine = made_engine()
    batch = plain_batch(random_episodes(np.random.default_rng(3)))
    before = weights_of(engine.model)
    assert engine.update(batch, Surrogate(), 1e-2)["updated"] == 0
    assert_same_weights(before, engine.model)
    rows = [engine.update(batch, Surrogate(kl=KL(1.0)), 1e-2) for _ in range(8)]
    assert all(row["updated"] == 1 and row["grad_norm"] > 0 for row in rows)
    assert rows[-1]["reference_kl"] < 0.5 * rows[0]["reference_kl"]
    moved = {n for n, value in weights_of(engine.model).items() if value.tobytes() != before[n].tobytes()}
    assert moved == set(trainable(engine.model))


def test_a_reference_that_the_batch_brings_is_not_scored_again(monkeypatch):
    engine, batch = made_engine(), recipe("grpo").credit(random_episodes(np.random.default_rng(4)))
    brought = replace(batch, reference=engine.score(batch, reference=True))
    start = engine.weights()
    scored = engine.update(batch, Surrogate(kl=KL(0.3)), 1e-2)
    after_asking = weights_of(engine.model)
    engine = MLXEngine(engine.model, stop=[0])
    engine.restore(start)
    monkeypatch.setattr(engine, "score", lambda *arguments, **named: pytest.fail("scored again"))
    given = engine.update(brought, Surrogate(kl=KL(0.3)), 1e-2)
    assert given["loss"] == pytest.approx(scored["loss"], rel=1e-5)
    for name, value in weights_of(engine.model).items():
        np.testing.assert_allclose(value, after_asking[name], atol=1e-5, err_msg=name)


# ---- what an update reports


def test_an_update_reports_per_token_what_a_slow_loop_finds():
    engine, episodes = made_engine(), with_holes(np.random.default_rng(5))[:-1]
    spread = [np.where(e.mask, 1.0 - 2 * (i % 2), 0).astype(np.float32) for i, e in enumerate(episodes)]
    rng = np.random.default_rng(6)
    old = engine.score(plain_batch(episodes))
    old = np.where(old != 0, old + rng.normal(0, 0.3, old.shape), 0).astype(np.float32)
    batch = replace(Batch.pack(episodes, spread), old=old)
    correction, kl = Correction("sequence", "mask", None, 1.3), KL(0.1)
    sampler = np.where(old != 0, old - rng.normal(0, 0.15, old.shape), 0).astype(np.float32)
    batch = replace(batch, logprobs=sampler)
    now, reference = engine.score(batch), engine.score(batch, reference=True)
    metrics = engine.update(batch, Surrogate(Clip(0.2, 0.28), kl=kl, correction=correction), 1e-3)
    seen = []
    for i, advantages in enumerate(batch.advantages):
        live = np.flatnonzero(batch.weights[i])
        c = math.exp(sum(float(old[i, t]) - float(sampler[i, t]) for t in live))
        c = 0.0 if c > 1.3 else c
        for t in live:
            gap, r = float(now[i, t] - sampler[i, t]), math.exp(now[i, t] - old[i, t])
            d, a = float(reference[i, t] - now[i, t]), advantages[t]
            seen.append(
                (
                    abs(gap),
                    math.exp(gap) - 1 - gap,
                    math.exp(d) - d - 1,
                    c,
                    c == 0,
                    r < 0.8 and a < 0,
                    r > 1.28 and a > 0,
                )
            )
    names = ["logprob_gap_mean", "sampler_kl", "reference_kl", "correction_mean", "correction_dropped"]
    names += ["clip_fraction_low", "clip_fraction_high"]
    expected = dict(zip(names, np.mean(seen, axis=0).tolist(), strict=True))
    assert {name: metrics[name] for name in names} == pytest.approx(expected, rel=2e-3, abs=1e-6)
    assert metrics["logprob_gap_max"] == pytest.approx(max(s[0] for s in seen), rel=1e-4)
    assert 0 < metrics["correction_dropped"] < 1
    assert metrics["clip_fraction_low"] > 0 < metrics["clip_fraction_high"]


# ---- a KL in the reward


def test_the_reference_of_an_episode_stands_at_its_sampled_tokens_and_is_0_elsewhere():
    engine, plain = made_engine(), base_model("float")
    episodes = [e for e in with_holes(np.random.default_rng(7), 0.7) if e.mask.any()]
    for e, before in zip(with_reference(engine, episodes), episodes, strict=True):
        exact = np.where(e.mask[1:], read_at_once(plain, e.tokens, 0.7), 0)
        np.testing.assert_allclose(e.reference[1:], exact, atol=1e-4)
        assert (e.reference[0], e.reference.dtype) == (0, np.float32)
        assert e.tokens is before.tokens


class Spy:
    """An engine that remembers the batches of its updates, and the scores it returned."""

    def __init__(self, engine):
        self.engine, self.updated, self.log = engine, [], []

    def sample(self, *arguments):
        self.log.append("sample")
        return self.engine.sample(*arguments)

    def score(self, batch, *, reference=False):
        self.log.append("reference" if reference else "score")
        return self.engine.score(batch, reference=reference)

    def update(self, batch, surrogate, learning_rate):
        self.log.append("update")
        self.updated.append((batch, self.engine.score(batch)))
        return self.engine.update(batch, surrogate, learning_rate)


class Numbers:
    """A tokenizer whose text is the ids themselves."""

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(str(i) for i in ids)


def parity(prompt, completion, example):
    return sum(int(word) % 2 for word in completion.split()) / 4


def trained(algorithm, steps=1, updates=1, reward=parity):
    env = TextGenerationEnv(["1 2", "3", "4 5 6", "7"], reward, max_tokens=4, tokenizer=Numbers())
    spy, rows = Spy(made_engine()), []
    train(
        spy,
        env,
        algorithm,
        schedule=Schedule(0.02, steps, updates=updates),
        prompts_per_step=4,
        group_size=4,
        sampling=Sampling(4, seed=2),
        on_step=lambda step, row, episodes: rows.append((row, episodes)),
    )
    return spy, rows


def k1(episodes):
    """Per episode, log p - log q of each sampled token, both read at once."""
    adapted, plain = made_engine().model, base_model("float")
    return [(read_at_once(adapted, e.tokens) - read_at_once(plain, e.tokens))[e.mask[1:]] for e in episodes]


def test_rloo_learns_from_the_reward_less_the_summed_kl():
    spy, [(row, episodes)] = trained(replace(recipe("rloo"), reward_kl=0.2))
    assert spy.log == ["sample", "reference", "update"]
    shaped = [e.reward - 0.2 * kl.sum() for e, kl in zip(episodes, k1(episodes), strict=True)]
    [(batch, _)] = spy.updated
    for i, e in enumerate(episodes):
        others = [shaped[k] for k in range(16) if k != i and episodes[k].group == e.group]
        agrees = len({m.reward for m in episodes if m.group == e.group}) == 1
        expected = 0.0 if agrees else shaped[i] - sum(others) / 3
        assert batch.advantages[i][batch.weights[i] != 0] == pytest.approx(expected, abs=2e-3)
    assert row["updated"] == 1


def test_reinforce_learns_from_returns_to_go_of_reward_and_kl():
    _, [(_, episodes)] = trained(replace(recipe("reinforce++"), reward_kl=0.2))
    spy, _ = trained(replace(recipe("reinforce++"), reward_kl=0.2))
    returns = [e.reward - 0.2 * np.cumsum(kl[::-1])[::-1] for e, kl in zip(episodes, k1(episodes), strict=True)]
    flat = np.concatenate(returns)
    [(batch, _)] = spy.updated
    for i, mine in enumerate(returns):
        agrees = len({m.reward for m in episodes if m.group == episodes[i].group}) == 1
        expected = np.zeros(len(mine)) if agrees else (mine - flat.mean()) / flat.std(ddof=1)
        np.testing.assert_allclose(batch.advantages[i][batch.weights[i] != 0], expected, atol=5e-3)


# ---- corrections


def test_with_several_updates_the_ratio_is_over_the_learners_logprobs_before_the_first():
    algorithm = recipe("grpo")
    corrected = replace(algorithm, surrogate=replace(algorithm.surrogate, correction=Correction("token", "truncate")))
    spy, rows = trained(corrected, steps=2, updates=2)
    assert spy.log == ["sample", "score", "score", "update", "update"] * 2
    for step in (0, 1):
        (first, before_first), (second, before_second) = spy.updated[2 * step : 2 * step + 2]
        assert np.array_equal(first.old, before_first)
        assert not np.array_equal(second.old, before_second)  # the first update has moved the learner
        np.testing.assert_allclose(
            second.old, second.logprobs, atol=1e-3
        )  # which sampled with its log-probs at that time
    for row, _ in rows:
        assert row["updated"] == 2
        assert row["correction_mean"] == pytest.approx(1, abs=1e-3)
        assert row["correction_dropped"] == 0


def test_in_the_only_update_the_learner_is_its_own_denominator_and_nothing_clips():
    algorithm = recipe("dapo")
    corrected = replace(algorithm, resample=0, surrogate=replace(algorithm.surrogate, correction=Correction()))
    spy, [(row, _)] = trained(corrected)
    assert spy.log == ["sample", "update"]
    assert spy.updated[0][0].old is None
    assert row["clip_fraction_low"] == row["clip_fraction_high"] == 0


def test_without_a_correction_nothing_is_scored_however_many_updates():
    spy, [(row, _)] = trained(recipe("grpo"), updates=4)
    assert spy.log == ["sample", "update", "update", "update", "update"]
    assert all(batch.old is None for batch, _ in spy.updated)
    assert row["updated"] == sum(batch.advantages.any() for batch, _ in spy.updated)
    assert "correction_mean" not in row


def test_the_first_gradient_is_on_policy_under_a_sampler_that_was_off():
    """Log-probs off by log 2 at every token: the uncorrected ratio is 1/2, the corrected weight truncates at 1/4."""
    engine = Recording(made_engine().model, stop=[0])
    batch = recipe("dr_grpo").credit(random_episodes(np.random.default_rng(8)))
    exact = engine.score(batch)
    on_policy = replace(batch, logprobs=exact)
    off = replace(batch, logprobs=np.where(batch.weights != 0, exact + math.log(2), 0).astype(np.float32))
    gradients = []
    for given, correction in [(on_policy, None), (off, None), (off, Correction("token", "truncate", None, 0.25))]:
        metrics = engine.update(given, Surrogate(ImportanceSampling(), correction=correction), 1e-3)
        gradients.append({name: np.array(value) for name, value in engine.kept.items()})
    assert metrics["correction_mean"] == pytest.approx(0.25)
    for name, value in gradients[0].items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(gradients[1][name], value / 2, atol=1e-3 * scale, err_msg=name)
        np.testing.assert_allclose(gradients[2][name], value / 4, atol=1e-3 * scale, err_msg=name)


def test_a_step_that_the_correction_drops_whole_is_counted_and_moves_nothing_not_even_by_momentum():
    engine = made_engine()
    batch = recipe("grpo").credit(random_episodes(np.random.default_rng(9)))
    assert engine.update(batch, Surrogate(), 1e-2)["updated"] == 1
    batch = replace(batch, logprobs=np.where(batch.weights != 0, engine.score(batch) - 5, 0).astype(np.float32))
    before = weights_of(engine.model)
    metrics = engine.update(batch, Surrogate(correction=Correction("sequence", "mask")), 1e-2)
    assert (metrics["correction_dropped"], metrics["correction_mean"]) == (1, 0)
    assert metrics["grad_norm"] == metrics["updated"] == 0
    assert_same_weights(before, engine.model)


# ---- numbers that are none


@pytest.mark.parametrize(
    ("array", "value"),
    [("advantages", np.inf), ("advantages", -np.inf)]
    + [(array, np.nan) for array in ("advantages", "logprobs", "old", "reference")],
)
@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "sapo", "rloo"])
def test_a_batch_with_a_number_that_is_not_finite_moves_nothing_and_is_reported(name, array, value):
    engine, surrogate = made_engine(), recipe(name).surrogate
    batch = recipe(name).credit(random_episodes(np.random.default_rng(10)))
    now = engine.score(batch)
    batch = replace(batch, logprobs=now, old=now, reference=now)
    if array == "old":
        surrogate = replace(surrogate, correction=Correction("token", "truncate"))
    if array == "reference":
        surrogate = replace(surrogate, kl=KL(0.1))
    place = tuple(np.argwhere((batch.weights != 0) & (batch.advantages != 0))[0])
    spoilt = getattr(batch, array).copy()
    spoilt[place] = value
    before = weights_of(engine.model)
    row = engine.update(replace(batch, **{array: spoilt}), surrogate, 1e-2)
    assert (row["skipped"], row["updated"]) == (1, 0)
    assert_same_weights(before, engine.model)


def test_the_error_of_a_broken_policy_comes_before_any_update():
    def broken(logprobs):
        completion = Completion(np.array([3, 4], np.int32), np.array(logprobs, np.float32))
        return Episode.from_completion([5], completion, reward=1.0, group=0)

    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(UserError, match="has log-probs that are not finite; check the policy that sampled it"):
            recipe("grpo").credit([broken([-1.0, value]), broken([-1.0, -1.0])])


def test_collect_and_score_agree_on_every_sampled_token():
    env = TextGenerationEnv(["1 2", "3"], parity, max_tokens=5, tokenizer=Numbers())
    engine = made_engine()
    batch = plain_batch(collect(engine, env, [0, 1], 4, Sampling(5, temperature=0.8, seed=1)))
    np.testing.assert_allclose(engine.score(batch), batch.logprobs, atol=1e-4)
