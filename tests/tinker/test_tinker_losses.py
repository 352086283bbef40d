"""Which loss of the service a surrogate is, and that the service's sum over what is sent is the batch's loss."""

import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import recipe
from test_datum import episode

from textpolicy.algorithms import ALGORITHMS, algorithm
from textpolicy.errors import UserError
from textpolicy.losses import (
    KL,
    Clip,
    ClippedWeight,
    Correction,
    CrossEntropy,
    ImportanceSampling,
    SoftGate,
    Surrogate,
    WithinDivergence,
    policy_objective,
)
from textpolicy.tinker.datum import datum_arrays
from textpolicy.tinker.loss import TinkerLoss, tinker_loss
from textpolicy.types import Batch


@pytest.mark.parametrize(
    ("surrogate", "loss"),
    [
        (Surrogate(Clip(0.2, 0.28)), TinkerLoss("ppo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.28})),
        (Surrogate(Clip(1.5, 0.5)), TinkerLoss("ppo", {"clip_low_threshold": 0.0, "clip_high_threshold": 1.5})),
        (
            Surrogate(ClippedWeight(0.5, 5.0)),
            TinkerLoss("cispo", {"clip_low_threshold": 0.5, "clip_high_threshold": 5}),
        ),
        (Surrogate(ImportanceSampling()), TinkerLoss("importance_sampling")),
        (Surrogate(CrossEntropy()), TinkerLoss("cross_entropy", weighted=True)),
        (
            Surrogate(Clip(0.25, 0.5), ratio="sequence"),
            TinkerLoss("gspo", {"clip_low_threshold": 0.75, "clip_high_threshold": 1.5}, masked=True),
        ),
    ],
)
def test_thresholds_are_ratios(surrogate, loss):
    assert tinker_loss(surrogate) == loss


def test_a_weight_without_an_upper_bound_has_one_that_no_ratio_reaches():
    assert tinker_loss(Surrogate(ClippedWeight(None, None))).config == pytest.approx(
        {"clip_low_threshold": 0, "clip_high_threshold": math.exp(20)}
    )


@pytest.mark.parametrize(
    ("surrogate", "message"),
    [
        (Surrogate(SoftGate()), "no loss for SoftGate"),
        (Surrogate(WithinDivergence()), "no loss for WithinDivergence"),
        (Surrogate(drift=0.1), "algorithm.drift is set"),
        (Surrogate(Clip(delta=4.0)), "no loss for Clip"),
        (Surrogate(Clip(dual_clip=3.0)), "no loss for Clip"),
        (Surrogate(ratio="sequence-sum"), "ratio per sequence-sum"),
        (Surrogate(ClippedWeight(), ratio="sequence"), "ratio per sequence"),
        (Surrogate(kl=KL(0.1)), "set algorithm.kl.place to reward"),
        (Surrogate(correction=Correction()), "algorithm.correction is set"),
        (Surrogate(off_policy_limit=1.0), "algorithm.off_policy_limit is set"),
    ],
)
def test_a_surrogate_without_a_loss_of_the_service_is_refused_in_one_sentence(surrogate, message):
    with pytest.raises(UserError, match=message) as refused:
        tinker_loss(surrogate)
    assert "--engine mlx" in str(refused.value)


def test_every_recipe_is_either_sent_or_refused():
    refused = set()
    for name in ALGORITHMS:
        try:
            tinker_loss(algorithm(name).surrogate)
        except UserError:
            refused.add(name)
    assert refused == {"rloo", "sapo", "dppo", "dppo_kl", "ipo", "dro"}


# ---- the sum over what is sent, in slow loops after the service's documentation


def service_loss(loss, data, learner):
    """Hosted Tinker: the sum over data and positions of each loss, on plain floats; ``learner`` has their log-probs."""
    total = 0.0
    for d, logprobs in zip(data, learner, strict=True):
        marked = [t for t in range(len(d.mask)) if d.mask[t]]
        gaps = [float(logprobs[t]) - float(d.logprobs[t]) for t in marked]
        for t, gap in zip(marked, gaps, strict=True):
            ratio = math.exp(sum(gaps) / len(gaps) if loss.name == "gspo" else gap)
            a = float(d.advantages[t])
            if loss.name == "cross_entropy":
                total -= a * float(logprobs[t])
                continue
            if loss.name == "importance_sampling":
                total -= ratio * a
                continue
            clipped = min(max(ratio, loss.config["clip_low_threshold"]), loss.config["clip_high_threshold"])
            total -= clipped * a * float(logprobs[t]) if loss.name == "cispo" else min(ratio * a, clipped * a)
    return total


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "token-sum"])
@pytest.mark.parametrize(
    "surrogate",
    [
        Surrogate(Clip(0.2, 0.28)),
        Surrogate(ClippedWeight(0.7, 1.3)),
        Surrogate(ImportanceSampling()),
        Surrogate(CrossEntropy()),
        Surrogate(Clip(0.05, 0.1), ratio="sequence"),
    ],
    ids=["ppo", "cispo", "importance_sampling", "cross_entropy", "gspo"],
)
def test_the_services_sum_over_data_of_unequal_lengths_is_the_batchs_loss(surrogate, aggregation):
    rng = np.random.default_rng(0)
    lengths = [(2, 5), (4, 1), (3, 3), (1, 7)]  # of prompts and completions
    episodes = [episode(rng.integers(1, 9, p), rng.integers(1, 9, c), -rng.random(c) - 1) for p, c in lengths]
    batch = Batch.pack(
        episodes, [np.full(len(e.tokens), a) for e, a in zip(episodes, [2, -1, 0.5, -3], strict=True)], aggregation
    )
    learner = (batch.logprobs + rng.normal(0, 0.4, batch.logprobs.shape)).astype(np.float32)
    data = datum_arrays(replace(batch, advantages=batch.advantages * batch.weights))
    sent = service_loss(tinker_loss(surrogate), data, [learner[d.row] for d in data])
    assert sent == pytest.approx(float(policy_objective(learner, batch, np, surrogate)), rel=1e-5)


@pytest.mark.parametrize("name", ["grpo", "dapo", "maxrl", "cispo", "full"])
def test_the_services_sum_is_the_loss_of_every_recipe(name):
    from conftest import random_episodes

    rng = np.random.default_rng(1)
    how = recipe(name)
    batch = how.credit(random_episodes(rng), how.controller())
    learner = (batch.logprobs + rng.normal(0, 0.3, batch.logprobs.shape)).astype(np.float32)
    data = datum_arrays(replace(batch, advantages=batch.advantages * batch.weights))
    sent = service_loss(tinker_loss(how.surrogate), data, [learner[d.row] for d in data])
    assert sent == pytest.approx(float(policy_objective(learner, batch, np, how.surrogate)), rel=1e-5, abs=1e-7)
