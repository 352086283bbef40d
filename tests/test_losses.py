"""The clipped surrogate against a slow loop and hand-worked corners."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from textpolicy.errors import UserError
from textpolicy.losses import Clip, Surrogate, policy_objective


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
