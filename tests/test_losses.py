"""The clipped surrogate against a slow loop and hand-worked corners."""

import math
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from textpolicy.errors import UserError
from textpolicy.losses import Clip, CrossEntropy, ImportanceSampling, Surrogate, WithinDivergence, policy_objective


def slow_loss(logprobs, batch, how):
    """One token at a time, in plain Python."""
    total = 0.0
    for new, old, advantages, weights in zip(logprobs, batch.logprobs, batch.advantages, batch.weights, strict=True):
        live = [t for t in range(len(weights)) if weights[t] != 0]
        mean = sum(new[t] - old[t] for t in live) / len(live) if live else 0.0
        for t in live:
            r = math.exp(mean if how.ratio == "sequence" else new[t] - old[t])
            clipped = min(max(r, 1 - how.objective.clip_low), 1 + how.objective.clip_high)
            total -= weights[t] * min(r * advantages[t], clipped * advantages[t])
    return total


@given(st.integers(0, 10_000), st.sampled_from(["token", "sequence"]))
def test_loss_equals_a_slow_loop(seed, ratio):
    rng = np.random.default_rng(seed)
    shape = (3, 5)
    batch = SimpleNamespace(
        logprobs=rng.normal(-2, 1, shape),
        advantages=rng.normal(0, 1, shape),
        weights=rng.uniform(0.1, 1, shape) * (rng.random(shape) < 0.7),
    )
    logprobs, how = batch.logprobs + rng.normal(0, 0.4, shape), Surrogate(Clip(0.2, 0.3), ratio)
    assert policy_objective(logprobs, batch, np, how) == pytest.approx(slow_loss(logprobs, batch, how))


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [
        (1.5, 1.0, 0.0),  # already favoured enough
        (0.5, -1.0, 0.0),  # already disfavoured enough
        (0.5, 1.0, -0.5),  # pessimism: clipping must not hide a token that went the wrong way
        (1.5, -1.0, 1.5),
        (1.0, 1.0, -1.0),
    ],
)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradient_at_the_corners_of_the_clip(ratio, advantage, slope, level):
    batch = SimpleNamespace(logprobs=np.zeros((1, 1)), advantages=np.full((1, 1), advantage), weights=np.ones((1, 1)))
    at = math.log(ratio)

    def loss(x):
        return policy_objective(np.full((1, 1), x), batch, np, Surrogate(Clip(0.2, 0.2), level))

    assert (loss(at + 1e-5) - loss(at - 1e-5)) / 2e-5 == pytest.approx(slope, abs=1e-4)


def test_a_huge_ratio_stays_finite():
    batch = SimpleNamespace(logprobs=np.full((1, 1), -500.0), advantages=-np.ones((1, 1)), weights=np.ones((1, 1)))
    assert np.isfinite(policy_objective(np.zeros((1, 1)), batch, np, Surrogate()))


@pytest.mark.parametrize("clip", [(-0.1, 0.2), (0.2, -0.1), (0.2, math.inf)])
def test_a_clip_range_that_makes_no_sense_is_refused(clip):
    with pytest.raises(UserError, match="set both to 0 or more"):
        Clip(*clip)


# ---- bounds on probabilities, and the log-likelihood


def batch_of(old, advantages, weights=1.0):
    """Tokens of one sequence as a batch of MLX arrays."""
    rows = (np.broadcast_to(np.asarray(a, np.float32), np.shape(old))[None] for a in (old, advantages, weights))
    return SimpleNamespace(**dict(zip(("logprobs", "advantages", "weights"), map(mx.array, rows), strict=True)))


def slopes(logprobs, batch, how):
    """d loss / d l of each token, through MLX."""
    row = mx.array(np.asarray(logprobs, np.float32)[None])
    return np.array(mx.grad(lambda l: policy_objective(l, batch, mx, how))(row))[0]


KINDS = [WithinDivergence("tv", 0.15, 0.15), WithinDivergence("kl", 0.05, 0.05)]


@pytest.mark.parametrize("objective", KINDS, ids=str)
def test_a_rare_token_keeps_its_gradient_at_ratio_5_and_a_likely_one_loses_it_at_07(objective):
    old, new = np.log([0.001, 0.9]), np.log([0.005, 0.63])  # they move by 0.004 and by 0.27
    up, down = (slopes(new, batch_of(old, a), Surrogate(objective)) for a in (1.0, -1.0))
    assert up == pytest.approx([-5.0, -0.7], rel=1e-5)  # A > 0 wants the likely token back, so it is kept
    assert down == pytest.approx([5.0, 0.0], rel=1e-5)
    clipped = [slopes(new, batch_of(old, a), Surrogate(Clip())) for a in (1.0, -1.0)]
    assert clipped[0][0] == 0  # where clipping the ratio silences the rare token


def test_the_symmetric_bound_drops_a_token_that_went_too_far_whatever_the_sign_of_its_advantage():
    old, new = np.log([0.5, 0.5, 0.5]), np.log([0.7, 0.3, 0.55])
    how = Surrogate(WithinDivergence("tv", 0.1, 0.1, symmetric=True))
    for a in (1.0, -1.0):
        assert slopes(new, batch_of(old, a), how) == pytest.approx([0, 0, -a * 1.1], rel=1e-5)


@given(st.integers(0, 10_000), st.sampled_from([*KINDS, CrossEntropy()]), st.sampled_from([None, 0.5]))
def test_on_policy_the_gradient_is_that_of_reinforce(seed, objective, drift):
    rng = np.random.default_rng(seed)
    old = rng.uniform(-6, -0.01, 5)
    batch = batch_of(old, rng.normal(0, 1, 5), rng.uniform(0.1, 1, 5))
    expected = slopes(old, batch, Surrogate(ImportanceSampling()))
    assert slopes(old, batch, Surrogate(objective, drift=drift)) == pytest.approx(expected, rel=1e-5)


def log_softmax(theta):
    return theta - np.log(np.exp(theta).sum())


def in_expectation(objective, drift):
    """The loss that sampling from o estimates, over a whole vocabulary, with the mask at ``at``; and that mask."""

    def value(theta, at, o, advantages):
        l, p, p_o = log_softmax(theta), np.exp(log_softmax(at)), np.exp(o)
        kept, gain = np.ones(len(o)), p_o * advantages * l
        if isinstance(objective, WithinDivergence):
            gain = np.exp(l) * advantages  # E_o[rho A]
            for i in range(len(o)):
                moved = p[i] - p_o[i]
                if objective.divergence == "kl":
                    rest = (1 - p_o[i]) * math.log((1 - p_o[i]) / (1 - p[i]))
                    moved = math.copysign(p_o[i] * math.log(p_o[i] / p[i]) + rest, moved)
                up = advantages[i] > 0
                far = moved > objective.divergence_high, moved < -objective.divergence_low
                kept[i] = not (any(far) if objective.symmetric else far[0] if up else far[1])
        return -(kept * gain).sum() + drift / 2 * (p_o * (l - o) ** 2).sum(), kept

    return value


ENUMERATED = [
    (WithinDivergence("tv", 0.05, 0.08, weight_high=None), 0.0),
    (WithinDivergence("kl", 0.01, 0.02, weight_high=None), 0.0),
    (WithinDivergence("tv", 0.06, 0.06, symmetric=True, weight_high=None), 2e-3),
    (CrossEntropy(), 0.7),
]


@pytest.mark.cpu
@pytest.mark.parametrize(("objective", "drift"), ENUMERATED, ids=str)
def test_the_gradient_over_a_whole_vocabulary_is_that_of_the_expected_loss(objective, drift):
    rng, dropped = np.random.default_rng(5), 0
    value = in_expectation(objective, drift)
    for _ in range(20):
        at, o, a = rng.normal(0, 1, 6), log_softmax(rng.normal(0, 1, 6)), rng.normal(0, 1, 6)
        with mx.stream(mx.cpu):
            rows = {"logprobs": o, "advantages": a, "weights": np.exp(o)}
            batch = SimpleNamespace(**{k: mx.array(v[None], dtype=mx.float64) for k, v in rows.items()})

            def loss(theta, batch=batch):
                l = (theta - mx.logsumexp(theta))[None]
                return policy_objective(l, batch, mx, Surrogate(objective, drift=drift or None))

            ours = np.array(mx.grad(loss)(mx.array(at, dtype=mx.float64)))
        steps = 1e-5 * np.eye(6)
        slope = [(value(at + e, at, o, a)[0] - value(at - e, at, o, a)[0]) / 2e-5 for e in steps]
        np.testing.assert_allclose(ours, slope, atol=1e-6)
        dropped += (value(at, at, o, a)[1] == 0).sum()
    assert dropped > 10 or isinstance(objective, CrossEntropy)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WithinDivergence("js"), "there is no divergence"),
        (lambda: WithinDivergence(divergence_low=-0.1), "set both to 0 or more"),
        (lambda: WithinDivergence(weight_high=0), "weight_high is 0"),
        (lambda: Surrogate(drift=-1.0), "drift is -1.0"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
