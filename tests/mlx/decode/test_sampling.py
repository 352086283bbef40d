"""Drawing tokens: the right distribution, its exact log-prob and entropy."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from scipy.special import log_softmax
from scipy.stats import chisquare

from textpolicy.engine import Sampling
from textpolicy.errors import UserError
from textpolicy.mlx.decode.decoder import RepetitionPenalty
from textpolicy.mlx.decode.sampling import Keep, draw, uniforms


def logits(rows, vocabulary, seed=0):
    return np.random.default_rng(seed).normal(0, 3, (rows, vocabulary)).astype(np.float32)


@pytest.mark.parametrize("vocabulary", [5, 256, 1000])
def test_tokens_follow_the_softmax(vocabulary):
    row = logits(1, vocabulary)
    n = 20_000
    uniform = mx.array(np.random.default_rng(1).random(n, np.float32))
    tokens = draw(mx.array(row), mx.zeros(n, mx.int32), uniform, 1.0).tokens
    expected = np.exp(log_softmax(row[0].astype(np.float64))) * n
    likely = expected > 5
    counts = np.bincount(np.array(tokens), minlength=vocabulary)
    observed = np.append(counts[likely], counts[~likely].sum())
    rare = max(expected[~likely].sum(), 1e-9)
    keep = len(observed) if rare > 5 else -1
    total = observed[:keep].sum()
    shares = np.append(expected[likely], rare)[:keep]
    assert chisquare(observed[:keep], shares / shares.sum() * total).pvalue > 1e-4


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_logprob_and_entropy_are_those_of_the_tempered_distribution(temperature):
    rows = logits(6, 777)
    drawn = draw(mx.array(rows), mx.arange(6), mx.array(np.linspace(0, 0.99, 6, dtype=np.float32)), temperature)
    exact = log_softmax(rows.astype(np.float64) / temperature, axis=1)
    tokens = np.array(drawn.tokens)
    np.testing.assert_allclose(np.array(drawn.logprobs), exact[np.arange(6), tokens], atol=1e-5)
    np.testing.assert_allclose(np.array(drawn.entropy), -(np.exp(exact) * exact).sum(1), atol=1e-5)


def test_the_largest_uniform_number_still_draws_a_possible_token():
    row = np.full((1, 300), -np.inf, np.float32)
    row[0, [3, 40]] = 0.0
    for u in (0.0, 0.49999, 0.50001, np.nextafter(np.float32(1), np.float32(0))):
        assert draw(mx.array(row), mx.zeros(1, mx.int32), mx.array(np.array([u], np.float32)), 1.0).tokens.item() in (
            3,
            40,
        )


def test_temperature_zero_takes_the_likeliest_token():
    rows = logits(4, 500)
    drawn = draw(mx.array(rows), mx.arange(4), mx.array(np.full(4, 0.9, np.float32)), 0.0)
    np.testing.assert_array_equal(np.array(drawn.tokens), rows.argmax(1))


def test_top_p_keeps_the_smallest_set_that_reaches_it_and_rescales():
    row = np.log(np.array([[0.1, 0.5, 0.3, 0.1]], np.float32))
    drawn = [
        draw(mx.array(row), mx.zeros(1, mx.int32), mx.array(np.array([u], np.float32)), 1.0, Keep(top_p=0.6))
        for u in np.linspace(0, 0.999, 50)
    ]
    assert {d.tokens.item() for d in drawn} == {1, 2}
    chosen = drawn[0]
    share = {1: 0.625, 2: 0.375}[chosen.tokens.item()]
    assert chosen.logprobs.item() == pytest.approx(np.log(share), abs=1e-5)
    assert np.isfinite(chosen.entropy.item())


def test_the_penalty_makes_seen_tokens_less_likely_on_either_side_of_zero():
    penalty = RepetitionPenalty(2.0, seen=np.array([[True, True, False]]))
    assert penalty(mx.array([[2.0, -2.0, 1.0]]), np.array([0])).tolist() == [[1.0, -4.0, 1.0]]


def test_a_sequences_random_numbers_depend_on_seed_and_place_alone():
    np.testing.assert_array_equal(uniforms(3, 5, 4), uniforms(3, 5, 9)[:4])
    assert not np.array_equal(uniforms(3, 5, 4), uniforms(3, 6, 4))
    assert not np.array_equal(uniforms(3, 5, 4), uniforms(4, 5, 4))


TIED = [
    [3.0, 5.0, 5.0, 1.0, 5.0, 5.0],
    [2.0, 2.0, 2.0, 2.0, 2.0, 2.0],
    [-1.0, 0.0, 4.0, 4.0, -0.0, 0.0],
    [-np.inf, 1.0, -np.inf, 1.0, -np.inf, 1.0],
]


def kept(how, rows=TIED, temperature=1.0, compiled=False):
    """Which tokens are drawn from each row, over many uniform numbers."""
    uniform = np.linspace(0, 1, 400, endpoint=False, dtype=np.float32)
    one = partial(draw, temperature=temperature, keep=how)
    drawn = (mx.compile(one) if compiled else one)(
        mx.array(rows, mx.float32),
        mx.array(np.repeat(np.arange(len(rows)), 400)),
        mx.array(np.tile(uniform, len(rows))),
    )
    return [sorted(set(row)) for row in np.array(drawn.tokens).reshape(len(rows), -1).tolist()]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_of_equal_logits_top_k_keeps_the_first_and_never_more_than_k(k, compiled):
    wanted = [sorted(np.argsort(-np.array(row), kind="stable")[:k].tolist()) for row in TIED]
    wanted[3] = [t for t in wanted[3] if np.isfinite(TIED[3][t])]
    assert kept(Keep(top_k=k), compiled=compiled) == wanted


def test_of_equal_logits_top_p_keeps_the_first():
    assert kept(Keep(top_p=0.5)) == [[1, 2, 4], [0, 1, 2], [2, 3], [1, 3]]
    assert kept(Keep(top_p=1e-30)) == kept(Keep(top_p=5e-324)) == [[1], [0], [2], [1]]


def test_filters_of_ties_apply_one_after_the_other():
    assert kept(Keep(top_k=4, top_p=0.6, min_p=1.0)) == [[1, 2, 4], [0, 1, 2], [2, 3], [1, 3]]


RIGHT = [0, 1e-6, 1e-3, 1, np.float32(0.7), np.int64(2), 1e30]
WRONG = [float("nan"), float("inf"), -1e-9, 1e-40, 5e-324, 1e31, True, np.True_, "0.5", None, [1.0], 1j, mx.array(1.0)]


@pytest.mark.parametrize("value", WRONG)
def test_a_temperature_that_is_no_number_or_out_of_range_is_refused(value):
    with pytest.raises(UserError, match=r"temperature is .*; set it to ") as caught:
        Sampling(4, temperature=value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", RIGHT)
def test_logprobs_are_finite_at_every_temperature_that_is_taken(value):
    temperature = Sampling(4, temperature=value).temperature
    assert type(temperature) is float
    rows = [[88.0, -1e4, 1e4, 9999.9], [1e-3, 0.0, -1e-3, -np.inf]]
    drawn = draw(mx.array(rows), mx.array([0, 1]), mx.array([0.3, 0.3]), temperature)
    assert np.isfinite(np.array(drawn.logprobs)).all()
    if 0 < temperature <= 1e-6:
        assert drawn.tokens.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        (
            "max_tokens",
            [0, -1, 2**31, 3.0, "8", True, None, float("nan"), np.float32(4)],
            [1, np.int8(5), np.uint16(9)],
        ),
        ("seed", [-1, 2**63, 1.0, "1", False, np.int64(-5), float("inf")], [0, 2**63 - 1, np.uint64(7)]),
        ("top_k", [-1, 2.0, "5", True, 10**40], [0, np.int32(3), 2**31 - 1]),
        ("top_p", [0, -0.1, 1.0000001, float("nan"), "0.9", True, None], [1, 1e-300, np.float16(0.5)]),
        ("min_p", [-1e-300, 1.1, float("nan"), float("inf"), "0", True], [0, 1, 5e-324]),
        ("repetition_penalty", [0, -1, 1e-40, 1e300, float("inf"), float("nan"), "1", True], [1, 1e-6, 1e6]),
    ],
)
def test_every_other_setting_is_of_its_kind_and_in_range(name, wrong, right):
    for value in wrong:
        with pytest.raises(UserError, match=f"{name} is .*; set it "):
            Sampling(**{name: value})
    for value in right:
        assert getattr(Sampling(**{name: value}), name) == value
        assert type(getattr(Sampling(**{name: value}), name)) in (int, float)
