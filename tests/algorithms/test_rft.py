"""Rejection sampling: which completions are kept, and that they are learned as demonstrations are."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import random_episodes

from textpolicy.algorithms.rft import RejectionSampling
from textpolicy.loop.teach import IMITATION, imitated
from textpolicy.losses import policy_objective


@pytest.fixture
def episodes():
    """Four groups of four: all wrong, one right, two right of which one occurs twice, all right."""
    made = random_episodes(np.random.default_rng(3))
    right = [0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1]
    made = [replace(e, reward=float(r), is_correct=bool(r)) for e, r in zip(made, right, strict=True)]
    made[9] = replace(made[8], text="again")
    return made


def loss(batch):
    l = np.random.default_rng(7).normal(-2, 1, (64, 64)).astype(np.float32)
    seen = l[(batch.targets * 7 + batch.inputs) % 64, batch.targets % 64]  # of a token after another, wherever they are
    return float(policy_objective(seen, batch, np, IMITATION))


def test_only_what_is_right_is_kept_once_and_up_to_the_cap(episodes):
    assert np.flatnonzero(RejectionSampling().kept(episodes)).tolist() == [5, 8, 10, 12, 13, 14, 15]
    assert np.flatnonzero(RejectionSampling(unique=False).kept(episodes)).tolist() == [5, 8, 9, 10, 12, 13, 14, 15]
    assert np.flatnonzero(RejectionSampling(cap=2).kept(episodes)).tolist() == [5, 8, 10, 12, 13]


def test_its_loss_is_that_of_demonstrations_on_the_kept_rows(episodes):
    recipe = RejectionSampling(cap=2)
    kept = [e for e, k in zip(episodes, recipe.kept(episodes), strict=True) if k]
    assert loss(recipe.credit(episodes)) == pytest.approx(loss(imitated(kept)), rel=1e-6)


def test_a_group_of_all_wrong_contributes_nothing(episodes):
    batch = RejectionSampling().credit(episodes)
    assert not batch.weights[:4].any()
    assert batch.weights[12:].any(axis=1).all()  # one of all right does
    nothing = RejectionSampling().credit([replace(e, reward=0.0, is_correct=False) for e in episodes])
    assert not nothing.weights.any()


def test_a_reward_that_does_not_judge_is_right_from_one_on(episodes):
    unjudged = [replace(e, is_correct=None, reward=2.0 if e.is_correct else 0.99) for e in episodes]
    assert np.flatnonzero(RejectionSampling().kept(unjudged)).tolist() == [5, 8, 10, 12, 13, 14, 15]


def test_a_completion_is_shown_with_the_advantage_it_was_trained_with(episodes):
    recipe = RejectionSampling()
    shown = recipe.credited(episodes, recipe.tokens(episodes))
    assert [e.credited.advantage for e in shown] == recipe.kept(episodes).astype(float).tolist()
    assert all((e.credited.credit[e.mask] == e.credited.advantage).all() for e in shown)
