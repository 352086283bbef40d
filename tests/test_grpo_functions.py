"""compute_advantages, policy_loss, compute_metrics: numbers worked by hand, in NumPy and in MLX."""

import math

import numpy as np
import pytest

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx

from textpolicy.algorithms import grpo
from textpolicy.algorithms.grpo import compute_advantages, compute_advantages_dr_grpo, compute_metrics, policy_loss

# ratios 2, 0.5, 1, 1.1 against a clip range of [0.8, 1.28]
OLD = [-1.0, -1.0, -2.0, -3.0]
NEW = [-1.0 + math.log(2), -1.0 - math.log(2), -2.0, -3.0 + math.log(1.1)]
ADVANTAGES = [1.0, -2.0, 3.0, 10.0]
# min(2 * 1, 1.28 * 1), min(0.5 * -2, 0.8 * -2), 3, 11
TERMS = [1.28, -1.6, 3.0, 11.0]


@pytest.fixture(params=["numpy", "mlx"])
def array(request):
    return {"numpy": lambda v: np.array(v, np.float32), "mlx": lambda v: mx.array(v, mx.float32)}[request.param]


def test_the_module_is_reachable_as_the_documentation_spells_it():
    assert grpo.compute_advantages is compute_advantages
    assert grpo.policy_loss is policy_loss


# compute_advantages


def test_advantages_are_rewards_minus_their_mean(array):
    got = compute_advantages(array([1, 0, 0, 3]))
    assert type(got) is type(array([0]))
    assert np.asarray(got).tolist() == [0, -1, -1, 2]


def test_a_list_gives_a_numpy_array():
    got = compute_advantages([1, 2, 6])
    assert isinstance(got, np.ndarray)
    assert got.tolist() == [-2, -1, 3]


def test_a_group_that_agrees_gets_exactly_zero(array):
    assert np.asarray(compute_advantages(array([0.1] * 7))).tolist() == [0.0] * 7


def test_an_empty_group_stays_empty(array):
    assert compute_advantages([]).shape == (0,)
    assert compute_advantages(array([])).shape == (0,)


@pytest.mark.parametrize("wrong", ["abc", 3, None, {"a": 1}, (1, 2), object()])
def test_what_is_neither_list_nor_array_is_a_type_error(wrong):
    with pytest.raises(TypeError, match="give an array of numpy or mlx"):
        compute_advantages(wrong)


def test_rewards_of_several_groups_at_once_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 2\)"):
        compute_advantages(np.ones((2, 2)))


def test_dr_grpo_advantages_are_not_divided_by_a_standard_deviation(array):
    assert np.asarray(compute_advantages_dr_grpo(array([0, 4]))).tolist() == [-2, 2]


# policy_loss


def test_the_loss_is_the_mean_of_the_hand_worked_terms(array):
    loss = policy_loss(array(OLD), array(NEW), array(ADVANTAGES))
    assert float(loss) == pytest.approx(-sum(TERMS) / 4, rel=1e-6)


def test_one_clip_ratio_sets_both_bounds(array):
    terms = [1.5, -1.0, 3.0, 11.0]  # [0.5, 1.5]
    loss = policy_loss(array(OLD), array(NEW), array(ADVANTAGES), clip_ratio=0.5)
    assert float(loss) == pytest.approx(-sum(terms) / 4, rel=1e-6)


def test_a_constant_divides_the_sum(array):
    loss = policy_loss(array(OLD), array(NEW), array(ADVANTAGES), normalize_constant=100.0)
    assert float(loss) == pytest.approx(-sum(TERMS) / 100, rel=1e-6)


@pytest.mark.parametrize("constant", [0, -1.0])
def test_a_constant_that_is_not_positive_is_refused(constant):
    with pytest.raises(ValueError, match="normalize_constant"):
        policy_loss(np.array(OLD), np.array(NEW), np.array(ADVANTAGES), normalize_constant=constant)


def test_no_tokens_lose_nothing(array):
    empty = array([])
    assert float(policy_loss(empty, empty, empty)) == 0


def test_the_minimum_is_taken_after_clipping():
    """The gradient by log r: r A where the raw term is the smaller one, 0 where the clipped one is."""
    old, advantages = mx.zeros(4), mx.array([1.0, 1.0, -1.0, -1.0])
    new = mx.log(mx.array([2.0, 0.5, 2.0, 0.5]))
    gradient = mx.grad(lambda logprobs: policy_loss(old, logprobs, advantages))(new)
    assert np.allclose(gradient, [0, -0.5 / 4, 2 / 4, 0], atol=1e-6)


def test_arrays_of_different_shapes_are_refused_rather_than_broadcast(array):
    with pytest.raises(ValueError, match="one number per token"):
        policy_loss(array(OLD), array(NEW), array([[a] for a in ADVANTAGES]))


def test_lists_are_refused_by_the_loss():
    with pytest.raises(TypeError, match="give an array of numpy or mlx"):
        policy_loss(OLD, NEW, ADVANTAGES)


# compute_metrics


def test_metrics_of_the_hand_worked_tokens(array):
    got = compute_metrics(array(OLD), array(NEW), array(ADVANTAGES))
    ratios = [2, 0.5, 1, 1.1]
    wanted = {
        "mean_advantage": 3,
        "std_advantage": math.sqrt(sum((a - 3) ** 2 for a in ADVANTAGES) / 4),
        "min_advantage": -2,
        "max_advantage": 10,
        "mean_ratio": 4.6 / 4,
        "clip_fraction": 0.5,
        "clip_fraction_lower": 0.25,
        "clip_fraction_upper": 0.25,
        "kl_divergence": sum(r - 1 - math.log(r) for r in ratios) / 4,
        "clip_ratio_low": 0.2,
        "clip_ratio_high": 0.28,
    }
    assert got == pytest.approx(wanted, rel=1e-5)


def test_the_divergence_is_never_negative():
    old, new = np.array([-1.0, -1.0]), np.array([-0.5, -0.9])
    assert (old - new).mean() < 0
    assert compute_metrics(old, new, np.zeros(2))["kl_divergence"] > 0


def test_metrics_of_no_tokens_are_refused():
    with pytest.raises(ValueError, match="no tokens"):
        compute_metrics(np.zeros(0), np.zeros(0), np.zeros(0))
