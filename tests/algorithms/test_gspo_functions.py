"""GSPO's documented functions against slow loops and numbers worked by hand, in NumPy and in MLX."""

import math

import numpy as np
import pytest

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx

from textpolicy.algorithms import grpo, gspo
from textpolicy.algorithms.gspo import (
    compute_metrics_sequence,
    compute_sequence_importance_weights,
    create_gspo_policy_loss,
    policy_loss_sequence,
    policy_loss_token,
)

# log ratios of three completions of 1, 3 and 2 tokens: their means are log 2, 0 and -log 2
LENGTHS = [1, 3, 2]
LOG_R = [math.log(2), 0.3, -0.1, -0.2, -math.log(2) - 0.4, -math.log(2) + 0.4]
OLD = [-1.0, -2.0, -0.5, -3.0, -1.5, -0.25]
NEW = [o + r for o, r in zip(OLD, LOG_R, strict=True)]
RATIOS = [2.0, 1.0, 0.5]
BAND = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}


@pytest.fixture(params=["numpy", "mlx"])
def array(request):
    return {"numpy": lambda v: np.array(v, np.float64), "mlx": lambda v: mx.array(v, mx.float32)}[request.param]


def slow_loss(old, new, advantages, lengths, low, high):
    """Eq. 5 completion by completion; advantages are one per completion."""
    total, counted, start = 0.0, 0, 0
    for n, a in zip(lengths, advantages, strict=True):
        if n:
            s = math.exp(sum(new[t] - old[t] for t in range(start, start + n)) / n)
            total += min(s * a, min(max(s, 1 - low), 1 + high) * a)
            counted += 1
        start += n
    return -total / counted


def gradient(loss, advantages, lengths=LENGTHS, old=OLD, new=NEW, **settings):
    """(N,) d loss / d new, by MLX."""
    of = mx.grad(lambda at: loss(mx.array(old), at, mx.array(advantages), sequence_lengths=lengths, **settings))
    return np.array(of(mx.array(new)))


# the loss


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, -1), (1, -1, 1), (-1, 1, -1)])
def test_the_loss_is_that_of_a_loop_over_completions(array, signs):
    advantages = [2.0 * signs[0], 0.5 * signs[1], 1.5 * signs[2]]
    loss = policy_loss_sequence(array(OLD), array(NEW), array(advantages), LENGTHS, **BAND)
    assert float(loss) == pytest.approx(slow_loss(OLD, NEW, advantages, LENGTHS, 0.2, 0.28), rel=1e-5)


def test_a_loss_worked_by_hand(array):
    """min(2, 1.28) + min(-1, -1) + min(-0.5, -0.8), over three completions."""
    loss = policy_loss_sequence(array(OLD), array(NEW), array([1.0, -1.0, -1.0]), LENGTHS, **BAND)
    assert float(loss) == pytest.approx(-(1.28 - 1 - 0.8) / 3, rel=1e-5)


def test_the_band_is_that_of_the_paper_unless_another_is_given(array):
    advantages = array([1.0, 1.0, -1.0])
    assert float(policy_loss_sequence(array(OLD), array(NEW), advantages, LENGTHS)) == pytest.approx(
        -(1.0004 + 1 - 0.9997) / 3, rel=1e-6
    )
    both = policy_loss_sequence(array(OLD), array(NEW), advantages, LENGTHS, clip_ratio=0.1)
    assert float(both) == pytest.approx(-(1.1 + 1 - 0.9) / 3, rel=1e-6)


def test_advantages_per_completion_and_per_token_give_the_same_loss(array):
    per_completion, per_token = array([1.0, -2.0, 0.5]), array(np.repeat([1.0, -2.0, 0.5], LENGTHS))
    one = policy_loss_sequence(array(OLD), array(NEW), per_completion, LENGTHS, **BAND)
    other = policy_loss_sequence(array(OLD), array(NEW), per_token, mx.array(LENGTHS), **BAND)
    assert float(one) == pytest.approx(float(other), rel=1e-6)


def test_the_real_lengths_count_and_not_an_even_split():
    even = policy_loss_sequence(np.array(OLD), np.array(NEW), np.array([1.0, -1.0, 1.0]), [2, 2, 2], **BAND)
    real = policy_loss_sequence(np.array(OLD), np.array(NEW), np.array([1.0, -1.0, 1.0]), LENGTHS, **BAND)
    assert abs(float(even) - float(real)) > 0.01


@pytest.mark.parametrize("loss", [policy_loss_sequence, policy_loss_token])
def test_outside_the_band_the_gradient_is_cut_only_where_clipping_would_flatter(loss):
    """-(1/B) s A / n on each token, and 0 for the good too likely and the bad too unlikely."""
    wanted = {1.0: [0.0, 1.0, 0.5], -1.0: [-2.0, -1.0, 0.0]}  # s A, by completion
    for sign, terms in wanted.items():
        expected = -np.repeat(np.array(terms) / LENGTHS / 3, LENGTHS)
        assert np.allclose(gradient(loss, [sign] * 3, **BAND), expected, atol=1e-6)


def test_gspo_token_has_the_value_of_gspo_where_a_completion_has_one_advantage(array):
    arguments = (array(OLD), array(NEW), array([1.0, -1.0, -1.0]), LENGTHS)
    assert float(policy_loss_token(*arguments, **BAND)) == pytest.approx(
        float(policy_loss_sequence(*arguments, **BAND))
    )


def test_gspo_token_pushes_each_token_by_its_own_advantage():
    advantages = [0.0, 3.0, -6.0, 0.0, 0.0, 0.0]
    expected = -np.array([0.0, 3.0, -6.0, 0.0, 0.0, 0.0]) / 9  # s = 1, three tokens, three completions
    assert np.allclose(gradient(policy_loss_token, advantages, **BAND), expected, atol=1e-6)


def test_a_completion_without_tokens_is_not_counted(array):
    kept = policy_loss_sequence(array(OLD), array(NEW), array([1.0, -1.0, -1.0]), LENGTHS, **BAND)
    padded = policy_loss_sequence(array(OLD), array(NEW), array([1.0, 9.0, -1.0, -1.0, 9.0]), [1, 0, 3, 2, 0], **BAND)
    assert float(padded) == pytest.approx(float(kept), rel=1e-6)


def test_no_tokens_lose_nothing(array):
    empty = array([])
    assert float(policy_loss_sequence(empty, empty, empty, [])) == 0
    assert float(policy_loss_sequence(empty, empty, array([1.0, 2.0]), [0, 0])) == 0


# what cannot work


@pytest.mark.parametrize("loss", [policy_loss_sequence, policy_loss_token, compute_metrics_sequence])
def test_without_lengths_nothing_is_guessed(loss):
    with pytest.raises(ValueError, match="sequence_lengths"):
        loss(np.array(OLD), np.array(NEW), np.ones(6))


@pytest.mark.parametrize("lengths", [[3, 4], [6.0], [[6]], [7, -1]])
def test_lengths_that_do_not_fit_the_tokens_are_refused(lengths):
    with pytest.raises(ValueError, match="give their token counts"):
        policy_loss_sequence(np.array(OLD), np.array(NEW), np.ones(6), lengths)


def test_advantages_that_are_neither_of_tokens_nor_of_completions_are_refused():
    with pytest.raises(ValueError, match="6 tokens or 3 completions"):
        policy_loss_sequence(np.array(OLD), np.array(NEW), np.ones(4), LENGTHS)


def test_log_probs_that_are_not_in_one_line_are_refused():
    with pytest.raises(ValueError, match="in one line"):
        policy_loss_sequence(np.zeros((1, 6)), np.zeros((1, 6)), np.ones(6), [6])
    with pytest.raises(ValueError, match="one number per token"):
        policy_loss_sequence(np.zeros(5), np.zeros(6), np.ones(6), [6])


def test_lists_are_refused():
    with pytest.raises(TypeError, match="give an array of numpy or mlx"):
        policy_loss_sequence(OLD, NEW, [1.0] * 6, LENGTHS)


# the factory


@pytest.mark.parametrize(("variant", "loss"), [("sequence", policy_loss_sequence), ("token", policy_loss_token)])
def test_the_factory_fixes_the_bounds(variant, loss):
    arguments = (np.array(OLD), np.array(NEW), np.array([1.0, -1.0, -1.0]))
    made = create_gspo_policy_loss(variant, **BAND)(*arguments, sequence_lengths=LENGTHS)
    assert made == loss(*arguments, LENGTHS, **BAND)


def test_another_variant_is_refused_by_name():
    with pytest.raises(ValueError, match="'hybrid'; choose one of sequence, token"):
        create_gspo_policy_loss("hybrid")


def test_the_module_is_reachable_as_the_documentation_spells_it():
    assert gspo.policy_loss_sequence is policy_loss_sequence
    assert grpo.policy_loss is not gspo.policy_loss_token


# ratios and metrics


def test_importance_weights_are_not_clipped(array):
    weights = compute_sequence_importance_weights(array(OLD), array(NEW), LENGTHS)
    assert type(weights) is type(array([0]))
    assert np.allclose(np.array(weights), RATIOS, rtol=1e-5)


def test_the_weight_of_a_completion_without_tokens_is_one(array):
    weights = compute_sequence_importance_weights(array(OLD), array(NEW), [0, *LENGTHS, 0])
    assert np.allclose(np.array(weights), [1, *RATIOS, 1], rtol=1e-5)


def test_sums_over_many_long_completions_stay_exact_in_float32():
    """64 x 770 tokens, where differences of a running float32 sum are 0.2 nats off."""
    rng = np.random.default_rng(0)
    old = rng.uniform(-8, 0, (64, 770)).astype(np.float32)
    new = old + rng.normal(0, 0.01, old.shape).astype(np.float32)
    got = compute_sequence_importance_weights(mx.array(old.reshape(-1)), mx.array(new.reshape(-1)), [770] * 64)
    exact = np.exp((new.astype(np.float64) - old.astype(np.float64)).mean(axis=1))
    assert np.allclose(np.array(got), exact, rtol=1e-6)


def test_metrics_of_the_hand_worked_completions(array):
    got = compute_metrics_sequence(array(OLD), array(NEW), array([1.0, -1.0, 3.0]), LENGTHS, **BAND)
    wanted = {
        "mean_advantage": 1,
        "std_advantage": math.sqrt(8 / 3),
        "mean_seq_weight": 3.5 / 3,
        "std_seq_weight": math.sqrt(sum((r - 3.5 / 3) ** 2 for r in RATIOS) / 3),
        "min_seq_weight": 0.5,
        "max_seq_weight": 2,
        "seq_clip_fraction": 2 / 3,
        "kl_divergence": sum(math.exp(r) - 1 - r for r in LOG_R) / 6,
    }
    assert got == pytest.approx(wanted, rel=1e-5)


def test_metrics_of_no_tokens_are_refused():
    with pytest.raises(ValueError, match="no tokens"):
        compute_metrics_sequence(np.zeros(0), np.zeros(0), np.zeros(0), [])
