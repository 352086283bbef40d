"""What holds for every recipe: micro-batches, order, groups that agree, unscorable rewards, and what stages keep."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import make_tiny_engine, random_episodes, recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from textpolicy.algorithms import ALGORITHMS
from textpolicy.algorithms.hicra import amplify
from textpolicy.algorithms.reinforce import Whiten
from textpolicy.algorithms.sepa import pool_execution
from textpolicy.losses import KL, Clip, Correction, Surrogate, policy_objective
from textpolicy.mlx.adapters.merging import trainable
from textpolicy.mlx.engine import PolicyObjective

EVERY = pytest.mark.parametrize("name", ALGORITHMS)
SEEDS = st.integers(0, 10**6)
made = settings(max_examples=12, deadline=None, derandomize=True)

# recipes whose advantage does not change when all rewards of a group grow by the same amount
CENTRED = [name for name in ALGORITHMS if name not in ("maxrl", "full", "reinforce++", "gtpo_paper")]


class Steady:
    """A SEPA controller that pools with the same strength in every step."""

    def advance(self, correct_rate, execution):
        return 0.6


def made_episodes(seed, groups=3, size=4):
    """As ``random_episodes``, with four rewards, tokens of a tool inside completions, and empty completions."""
    rng = np.random.default_rng(seed)
    return [_varied(e, rng) for e in random_episodes(rng, groups, size)]


def _varied(episode, rng):
    mask, sampled = episode.mask.copy(), np.flatnonzero(episode.mask)
    if rng.random() < 0.1:
        mask[:] = False
    elif len(sampled) > 2 and rng.random() < 0.4:
        mask[rng.choice(sampled[1:-1])] = False
    pieces = tuple(p for p, t in zip(episode.pieces, sampled, strict=True) if mask[t])
    return replace(
        episode,
        mask=mask,
        logprobs=np.where(mask, episode.logprobs, 0),
        pieces=pieces,
        reward=float(rng.choice([0.0, 0.25, 0.75, 1.0])),
        truncated=bool(rng.random() < 0.2),
    )


def drifted(batch, seed):
    """The batch in the second of several updates: what the learner says now, said before, and its reference says."""
    rng = np.random.default_rng(seed + 1)
    row_scale = rng.choice([1e-4, 0.3], (len(batch), 1))  # some rows stay within GSPO's band

    def near(values, scale):
        return np.where(batch.weights != 0, values + rng.normal(0, scale, values.shape), 0).astype(np.float32)

    old, reference = near(batch.logprobs, 0.1), near(batch.logprobs, 0.5)
    return near(batch.logprobs, row_scale), replace(batch, old=old, reference=reference)


def value_and_gradient(logprobs, batch, how):
    compute = mx.value_and_grad(lambda l: policy_objective(l, batch.map(mx.array), mx, how))
    loss, gradient = compute(mx.array(logprobs))
    return loss.item(), np.array(gradient)


def surrogates(name):
    """The recipe's, and the same with everything that may be added to it."""
    plain = recipe(name).surrogate
    added = replace(plain, kl=KL(0.1), correction=Correction("sequence", "truncate"), off_policy_limit=0.1)
    return [plain, added]


def credited(name, episodes):
    return recipe(name).credit(episodes, Steady())


def token_credit(name, episodes):
    """(N,) advantages of the sampled tokens, and the (N,) completion of each."""
    credit = recipe(name).tokens(episodes, Steady())
    return credit.advantage, credit.row


# ---- order and micro-batches


@EVERY
@made
@given(seed=SEEDS)
def test_value_and_gradient_are_those_of_any_micro_batches(name, seed):
    logprobs, batch = drifted(credited(name, made_episodes(seed)), seed)
    part = np.random.default_rng(seed).integers(0, 4, len(batch))
    for how in surrogates(name):
        loss, gradient = value_and_gradient(logprobs, batch, how)
        pieces, total = np.zeros_like(gradient), 0.0
        for rows in (np.flatnonzero(part == p) for p in np.unique(part)):
            value, pieces[rows] = value_and_gradient(logprobs[rows], batch.take(rows), how)
            total += value
        assert total == pytest.approx(loss, rel=1e-4, abs=1e-5)
        np.testing.assert_allclose(pieces, gradient, rtol=1e-5, atol=1e-7)


@EVERY
@made
@given(seed=SEEDS)
def test_neither_the_order_of_episodes_nor_the_numbers_of_groups_matter(name, seed):
    episodes, rng = made_episodes(seed), np.random.default_rng(seed)
    order, numbers = rng.permutation(len(episodes)), rng.choice(1000, 3, replace=False)
    logprobs, batch = drifted(credited(name, episodes), seed)
    shuffled = credited(name, [replace(episodes[i], group=int(numbers[episodes[i].group])) for i in order])
    shuffled = replace(shuffled, old=batch.old[order], reference=batch.reference[order])
    for how in surrogates(name):
        loss, gradient = value_and_gradient(logprobs, batch, how)
        other_loss, other = value_and_gradient(logprobs[order], shuffled, how)
        assert other_loss == pytest.approx(loss, rel=1e-4, abs=1e-5)
        np.testing.assert_allclose(other, gradient[order], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["gspo", "reinforce++", "gtpo_paper", "full"])
def test_the_adapters_gradient_depends_on_neither_order_nor_micro_batches(name):
    engine, episodes = make_tiny_engine(300), made_episodes(5)
    order = np.random.default_rng(0).permutation(len(episodes))

    def gradient(episodes, budget):
        engine.micro_batch_tokens = budget
        batch = with_tokens(credited(name, episodes))
        batch = replace(batch, old=batch.logprobs, reference=engine.score(batch, reference=True))
        stats, grads = engine.gradients(batch, PolicyObjective(surrogates(name)[1]))
        return stats["loss"], {k: np.array(v) for k, v in tree_flatten(grads)}

    loss, whole = gradient(episodes, 10_000)
    other_loss, other = gradient([replace(episodes[i], group=90 - episodes[i].group) for i in order], 20)
    assert other_loss == pytest.approx(loss, rel=1e-4)
    for key, value in whole.items():
        np.testing.assert_allclose(other[key], value, atol=2e-4 * np.abs(value).max(), err_msg=key)


def with_tokens(batch):
    """The rows that an engine trains on."""
    return batch.take(np.flatnonzero(batch.weights.any(axis=1)))


# ---- GSPO


@pytest.mark.parametrize("clip", [Clip(3e-4, 4e-4), Clip(0.2, 0.28)], ids=str)
@made
@given(seed=SEEDS)
def test_gspo_token_is_gspo_where_a_sequence_has_one_advantage(clip, seed):
    logprobs, batch = drifted(credited("gspo", made_episodes(seed)), seed)
    loss, gradient = value_and_gradient(logprobs, batch, Surrogate(clip, "sequence"))
    token_loss, token_gradient = value_and_gradient(logprobs, batch, Surrogate(clip, "sequence-token"))
    assert token_loss == pytest.approx(loss, rel=1e-5, abs=1e-7)
    np.testing.assert_allclose(token_gradient, gradient, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(credited("gspo_token", made_episodes(seed)).advantages, batch.advantages)


def test_gspo_token_differs_from_gspo_where_advantages_differ_within_a_sequence():
    batch = credited("gspo", made_episodes(3))
    batch = replace(batch, advantages=(batch.weights != 0) * np.random.default_rng(3).normal(size=batch.weights.shape))
    logprobs, batch = drifted(batch, 3)
    how = [Surrogate(Clip(9, 9), ratio) for ratio in ("sequence", "sequence-token")]
    (loss, gradient), (token_loss, token_gradient) = (value_and_gradient(logprobs, batch, h) for h in how)
    assert token_loss == pytest.approx(loss, rel=1e-5)
    assert np.abs(token_gradient - gradient).max() > 0.01


# ---- what stages keep


@made
@given(seed=SEEDS, strength=st.floats(-0.5, 1.5))
def test_pooling_keeps_execution_sums_and_every_bit_of_planning_tokens(seed, strength):
    rng = np.random.default_rng(seed)
    row = np.sort(rng.integers(0, 6, 40))
    uncertainty, planning = rng.exponential(size=40), rng.random(40) < rng.random()
    pooled = pool_execution(uncertainty, planning, row, strength)
    assert pooled[planning].tobytes() == uncertainty[planning].tobytes()
    for r in range(6):
        mine = (row == r) & ~planning
        assert pooled[mine].sum() == pytest.approx(uncertainty[mine].sum(), rel=1e-12)


@pytest.mark.parametrize("name", ["sepa", "full"])
@made
@given(seed=SEEDS)
def test_the_recipes_that_pool_keep_execution_sums_and_planning_tokens(name, seed):
    episodes = [e for e in made_episodes(seed) if e.mask.any()]
    before, after = recipe(name).tokens(episodes), recipe(name).tokens(episodes, Steady())
    assert after.uncertainty[after.planning].tobytes() == before.uncertainty[before.planning].tobytes()
    for r in range(len(episodes)):
        mine = (after.row == r) & ~after.planning
        assert after.uncertainty[mine].sum() == pytest.approx(before.uncertainty[mine].sum(), rel=1e-12)


NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=False)


@made
@given(st.lists(st.tuples(NUMBERS, st.booleans()), min_size=1), st.floats(0, 0.99))
def test_below_alpha_1_no_token_changes_its_sign(tokens, alpha):
    advantage, planning = (np.array(values) for values in zip(*tokens, strict=True))
    assert np.array_equal(np.sign(amplify(advantage, planning, alpha)), np.sign(advantage))


@made
@given(seed=SEEDS)
def test_hicra_has_the_signs_of_the_baseline_and_changes_planning_tokens_only(seed):
    episodes = made_episodes(seed)
    hicra, planning = recipe("hicra").tokens(episodes), recipe("hicra").tokens(episodes).planning
    plain = recipe("dr_grpo").tokens(episodes)
    assert np.array_equal(np.sign(hicra.advantage), np.sign(plain.advantage))
    assert np.array_equal((hicra.advantage != plain.advantage), planning & (plain.advantage != 0))


# ---- groups that agree


# the engine leaves rows without advantages out, and with them their drift
@pytest.mark.parametrize("name", [n for n, made in ALGORITHMS.items() if not made.surrogate.drift])
@made
@given(seed=SEEDS, reward=st.sampled_from([0.0, 0.1, 1 / 3, 1.0]))
def test_a_group_that_agrees_has_no_credit_and_no_gradient(name, seed, reward):
    episodes = [replace(e, reward=reward) if e.group == 1 else e for e in made_episodes(seed)]
    logprobs, batch = drifted(credited(name, episodes), seed)
    agrees = np.array([e.group == 1 for e in episodes])
    assert not batch.advantages[agrees].any()
    loss, gradient = value_and_gradient(logprobs, batch, recipe(name).surrogate)
    assert not gradient[agrees].any()
    others = np.flatnonzero(~agrees)
    loss_without, without = value_and_gradient(logprobs[others], batch.take(others), recipe(name).surrogate)
    assert loss_without == pytest.approx(loss, rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(without, gradient[others], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [n for n, made in ALGORITHMS.items() if Whiten() not in made.stages])
@made
@given(seed=SEEDS)
def test_the_other_groups_are_credited_as_if_the_agreeing_group_were_absent(name, seed):
    episodes = [replace(e, reward=1.0) if e.group == 1 else e for e in made_episodes(seed)]
    advantage, row = token_credit(name, episodes)
    alone, _ = token_credit(name, [e for e in episodes if e.group != 1])
    in_others = np.isin(row, [i for i, e in enumerate(episodes) if e.group != 1])
    np.testing.assert_allclose(advantage[in_others], alone, rtol=1e-12, atol=1e-15)


@EVERY
def test_a_step_in_which_all_groups_agree_moves_no_tensor_not_even_by_momentum(name):
    engine, rng = make_tiny_engine(300), np.random.default_rng(4)
    first = random_episodes(rng)
    first = [replace(e, reward=float(i % 2)) for i, e in enumerate(first)]
    assert engine.update(credited(name, first), recipe(name).surrogate, 1e-2)["updated"] == 1
    before = {key: np.array(value) for key, value in tree_flatten(engine.model.parameters())}
    agreeing = [replace(e, reward=[0.1, 1.0, 0.0, 2.7][e.group]) for e in random_episodes(rng)]
    metrics = engine.update(credited(name, agreeing), recipe(name).surrogate, 1e-2)
    assert metrics["updated"] == metrics["grad_norm"] == metrics["loss"] == 0
    for key, value in tree_flatten(engine.model.parameters()):
        assert before[key].tobytes() == np.array(value).tobytes(), key
    assert trainable(engine.model)


# ---- what could not be scored


@EVERY
@made
@given(seed=SEEDS)
def test_an_unscorable_completion_moves_nothing_and_no_other_baseline(name, seed):
    episodes = made_episodes(seed)
    lost = int(np.random.default_rng(seed).integers(len(episodes)))
    unscored = [replace(e, reward=float("nan")) if i == lost else e for i, e in enumerate(episodes)]
    advantage, row = token_credit(name, unscored)
    without, _ = token_credit(name, [e for i, e in enumerate(episodes) if i != lost])
    assert not advantage[row == lost].any()
    np.testing.assert_allclose(advantage[row != lost], without, rtol=1e-9, atol=1e-12)


@EVERY
def test_a_step_without_a_single_score_has_no_credit(name):
    advantage, _ = token_credit(name, [replace(e, reward=float("nan")) for e in made_episodes(1)])
    assert not advantage.any()


# ---- constants


@pytest.mark.parametrize("name", CENTRED)
@made
@given(seed=SEEDS, shifts=st.tuples(*[st.integers(-40, 40)] * 3))
def test_a_constant_added_to_the_rewards_of_a_group_changes_nothing_where_they_are_centred(name, seed, shifts):
    episodes = made_episodes(seed)
    shifted = [replace(e, reward=e.reward + shifts[e.group] / 4) for e in episodes]
    plain, _ = token_credit(name, episodes)
    np.testing.assert_allclose(token_credit(name, shifted)[0], plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["maxrl", "full", "reinforce++"])
def test_recipes_that_do_not_centre_rewards_see_a_constant(name):
    episodes = made_episodes(2)
    shifted = [replace(e, reward=e.reward + 1.0) if e.group == 0 else e for e in episodes]
    assert not np.allclose(token_credit(name, episodes)[0], token_credit(name, shifted)[0])
