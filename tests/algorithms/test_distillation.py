"""Distillation: advantages of tinker-cookbook, the gradient of the reverse KL by enumeration, and exact zeros."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import random_episodes, recipe

from textpolicy.algorithms.distillation import Distillation
from textpolicy.errors import UserError
from textpolicy.types import Episode

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "distillation.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['coefficient']}-{case['discount']}")
def test_the_advantages_are_those_of_tinker_cookbook(case):
    episodes, rewards, expected = [], [], []
    for n, row in enumerate(case["rows"]):
        mask = np.array([0, *row["mask"]], bool)
        b, q = (np.array([0, *row[name]], np.float32) for name in ("sampler", "teacher"))
        e = Episode(np.array(row["tokens"]), mask, b, None, reward=0.0, group=n, lead=np.where(mask, q - b, 0))
        episodes.append(e)
        rewards.append(np.array([0, *row["rewards"]])[mask])
        expected.append(np.array([0, *row["advantages"]])[mask])
    distil = Distillation(case["coefficient"], case["discount"], reward_weight=1.0)
    assert distil(np.concatenate(rewards), episodes) == pytest.approx(np.concatenate(expected), abs=1e-5)


def test_a_group_that_agrees_is_taught_all_the_same_and_rewards_count_by_their_weight():
    rng = np.random.default_rng(5)
    episodes = [replace(e, lead=rng.normal(size=len(e.tokens)).astype(np.float32)) for e in random_episodes(rng)]
    same = [replace(e, reward=1.0) for e in episodes]
    grpo, leads = recipe("grpo"), np.concatenate([e.lead[e.mask] for e in episodes])
    alone = replace(grpo, distillation=Distillation(0.5))
    assert alone.tokens(same).advantage == pytest.approx(0.5 * leads)
    assert alone.tokens(episodes).advantage == pytest.approx(0.5 * leads)
    mixed = replace(grpo, distillation=Distillation(0.5, reward_weight=2.0))
    assert mixed.tokens(episodes).advantage == pytest.approx(0.5 * leads + 2 * grpo.tokens(episodes).advantage)
    with pytest.raises(UserError, match="no log-probs of a teacher"):
        alone.tokens([replace(e, lead=None) for e in episodes])


# ---- gradients against enumeration: every text of three tokens over three letters, under a table of logits

LETTERS, LENGTH = 3, 3
TEXTS = [*itertools.product(range(LETTERS), repeat=LENGTH)]


def places(text):
    """The row of the table that each token is drawn from: that of the tokens before it."""
    return [
        sum(LETTERS**k for k in range(t)) + sum(c * LETTERS**k for k, c in enumerate(text[:t])) for t in range(LENGTH)
    ]


def along(table):
    """The log-probs of each text's tokens, (texts, LENGTH)."""
    scored = table - mx.logsumexp(table, axis=-1, keepdims=True)
    return mx.stack([mx.stack([scored[place, c] for place, c in zip(places(t), t, strict=True)]) for t in TEXTS])


def reverse_kl(table, teacher, future):
    """KL(policy || teacher) of whole texts, or of each token after what the policy wrote, held as it is."""
    l, q = along(table), along(teacher)
    if future:
        return (mx.exp(l.sum(axis=1)) * (l - q).sum(axis=1)).sum()
    p, t = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (table, teacher))
    at = (mx.exp(p) * (p - t)).sum(axis=-1)  # of each place
    reached = mx.stop_gradient(mx.exp(l.sum(axis=1)))
    return sum(w * sum(at[place] for place in places(text)) for w, text in zip(reached, TEXTS, strict=True))


@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_the_mean_gradient_is_that_of_the_reverse_kl(discount):
    rng = np.random.default_rng(2)
    rows = sum(LETTERS**k for k in range(LENGTH))
    table, teacher = (mx.array(rng.normal(size=(rows, LETTERS)), mx.float32) for _ in range(2))
    l, q = np.array(along(table)), np.array(along(teacher))
    mask = np.array([False, *[True] * LENGTH])
    episodes = [
        Episode(
            np.array([0, *t]), mask, np.append(0, a).astype(np.float32), None, 0.0, n,
            lead=np.append(0, b - a).astype(np.float32),
        )
        for n, (t, a, b) in enumerate(zip(TEXTS, l, q, strict=True))
    ]  # fmt: skip
    advantages = Distillation(1.0, discount)(np.zeros(l.size), episodes).reshape(l.shape)
    reached = np.exp(l.sum(axis=1, keepdims=True))
    weights = mx.array(reached * advantages, mx.float32)
    found = mx.grad(lambda table: -(weights * along(table)).sum())(table)
    expected = mx.grad(lambda table: reverse_kl(table, teacher, future=discount == 1))(table)
    assert np.array(found) == pytest.approx(np.array(expected), abs=1e-6)
