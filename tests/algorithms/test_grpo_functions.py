"""compute_advantages, policy_loss, compute_metrics: numbers worked by hand, in NumPy and in MLX."""

import math

import numpy as np
import pytest

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx

from textpolicy.algorithms import grpo, hicra
from textpolicy.algorithms.grpo import (
    apply_entropy_weighting,
    compute_advantages,
    compute_advantages_dr_grpo,
    compute_advantages_gtpo,
    compute_advantages_maxrl,
    compute_gtpo_shaped_rewards,
    compute_metrics,
    compute_token_entropy,
    gtpo_loss,
    normalize_gtpo_advantages,
    policy_loss,
)

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
def test_an_argument_that_is_neither_list_nor_array_is_a_type_error(wrong):
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


# compute_advantages_maxrl


def test_maxrl_divides_by_the_success_rate_of_the_prompt(array):
    """K of n correct: (n - K) / K for the correct ones, -1 for the others."""
    got = compute_advantages_maxrl(array([1, 0, 0, 0, 1, 1, 0, 0]), prompt_ids=[3, 3, 3, 3, 7, 7, 9, 9])
    assert type(got) is type(array([0]))
    assert np.allclose(np.asarray(got), [3, -1, -1, -1, 0, 0, 0, 0], atol=1e-5)


# entropy


def test_the_entropy_of_hand_made_distributions(array):
    p = [[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]]
    got = np.asarray(compute_token_entropy(array(np.log(p) + 7)))
    assert np.allclose(got, [1.5 * math.log(2), math.log(3)], rtol=1e-6)


def test_huge_and_impossible_logits_have_an_entropy(array):
    got = np.asarray(compute_token_entropy(array([[1e4, -1e4, 0], [0, 0, -math.inf]])))
    assert np.allclose(got, [0, math.log(2)], atol=1e-6)


# weights by entropy

ENTROPIES = [1.0, 3.0, 2.0, 2.0, 5.0]  # of completions with 2 and 3 tokens: means 2 and 3


def test_weights_follow_the_entropy_within_each_completion(array):
    got = apply_entropy_weighting(array([1.0, 1, -2, -2, -2]), array(ENTROPIES), 0.5, [2, 3])
    assert type(got) is type(array([0]))
    assert np.allclose(np.asarray(got), [0.75, 1.25, -2 * (5 / 6), -2 * (5 / 6), -2 * (8 / 6)], rtol=1e-6)


def test_without_lengths_the_tokens_are_one_completion(array):
    got = apply_entropy_weighting(array([1.0] * 5), array(ENTROPIES), 1.0)
    assert np.allclose(np.asarray(got), np.array(ENTROPIES) / 2.6, rtol=1e-6)


@pytest.mark.parametrize(("entropies", "weight"), [([2.0] * 3, 0.5), ([0.0] * 3, 0.5), ([1.0, 2.0, 9.0], 0.0)])
def test_equal_entropies_none_and_no_weight_change_nothing(array, entropies, weight):
    got = apply_entropy_weighting(array([1.0, -2.0, 3.0]), array(entropies), weight)
    assert np.allclose(np.asarray(got), [1, -2, 3], rtol=1e-6)


def test_weights_never_turn_a_sign(array):
    got = apply_entropy_weighting(array([1.0, -1.0, 1.0]), array([0.0, 0.0, 3.0]), 2.0)
    assert np.allclose(np.asarray(got), [0, 0, 5], atol=1e-6)


def test_no_gradient_reaches_the_entropies():
    advantages = mx.ones(5)
    slope = mx.grad(lambda h: apply_entropy_weighting(advantages, h, 0.5).sum())(mx.array(ENTROPIES))
    assert np.array(slope).tolist() == [0.0] * 5


def test_gtpo_advantages_are_centred_rewards_under_the_weights(array):
    got = compute_advantages_gtpo(array([1.0, 0.0]), array(ENTROPIES), 0.5, [2, 3])
    assert np.allclose(np.asarray(got), [0.375, 0.625, -5 / 12, -5 / 12, -8 / 12], rtol=1e-6)


@pytest.mark.parametrize("lengths", [None, [5], [2, 2, 1], [2, 2]])
def test_lengths_that_fit_neither_rewards_nor_entropies_are_refused(lengths):
    with pytest.raises(ValueError, match="give"):
        compute_advantages_gtpo(np.array([1.0, 0.0]), np.array(ENTROPIES), 0.5, lengths)


# shaped rewards: two successes of 2 and 1 tokens, a failure of 2; alpha_1 = 1 and alpha_2 = 0.1
#   position 0: 1 + 0.1 * 2 * 1/4, 1 + 0.1 * 2 * 3/4; position 1: 1 + 0.1 * 1; the failure alone: -1 - 0.1

SHAPED_OF = {"rewards": [1.0, 1.0, 0.0], "token_entropies": [1.0, 5.0, 3.0, 0.5, 4.0], "episode_lengths": [2, 1, 2]}
SHAPED = [1.05, 1.1, 1.15, -1.1, -1.1]


def shaping(array, **changes):
    given = {**SHAPED_OF, **changes}
    return {**given, "rewards": array(given["rewards"]), "token_entropies": array(given["token_entropies"])}


def test_shaped_rewards_worked_by_hand(array):
    shaped, positive = compute_gtpo_shaped_rewards(**shaping(array))
    assert np.allclose(np.asarray(shaped), SHAPED, rtol=1e-5)
    assert np.asarray(positive).tolist() == [True, True, True, False, False]


def test_shaped_rewards_do_not_mix_prompts(array):
    """With each success in a prompt of its own, no position is shared."""
    shaped, _ = compute_gtpo_shaped_rewards(**shaping(array, prompt_ids=[0, 1, 0]))
    assert np.allclose(np.asarray(shaped), [1.1, 1.1, 1.1, -1.1, -1.1], rtol=1e-5)


def test_normalised_advantages_keep_the_outcome_and_the_paper_s_do_not(array):
    shaped, positive = (np.array(a) for a in compute_gtpo_shaped_rewards(**shaping(array)))
    joint = np.asarray(normalize_gtpo_advantages(array(shaped), positive))
    assert np.allclose(joint, (shaped - shaped.mean()) / shaped.std(), rtol=1e-4)
    assert (joint[:3] > 0).all()
    separate = np.asarray(normalize_gtpo_advantages(array(shaped), positive, normalisation="separate"))
    assert np.allclose(separate, [-math.sqrt(1.5), 0, math.sqrt(1.5), 0, 0], atol=1e-3)


def test_one_success_and_one_failure_are_not_erased(array):
    shaped, positive = compute_gtpo_shaped_rewards(array([1.0, 0.0]), array([0.5, 0.5]), [1, 1])
    assert np.allclose(np.asarray(normalize_gtpo_advantages(shaped, positive)), [1, -1], rtol=1e-5)


@pytest.mark.parametrize("rewards", [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
def test_completions_that_all_succeeded_or_all_failed_get_nothing(array, rewards):
    shaped, positive = compute_gtpo_shaped_rewards(**shaping(array, rewards=rewards))
    assert np.asarray(shaped).std() > 0
    assert np.asarray(normalize_gtpo_advantages(shaped, positive)).tolist() == [0.0] * 5


def test_prompts_are_normalised_apart(array):
    shaped, positive = np.array([1.0, -1.0, 10.0, -10.0]), np.array([True, False, True, False])
    got = normalize_gtpo_advantages(array(shaped), positive, prompt_ids=[0, 0, 1, 1])
    assert np.allclose(np.asarray(got), [1, -1, 1, -1], rtol=1e-5)


def test_the_gtpo_loss_is_the_surrogate_of_those_advantages(array):
    """Ratios of 1.5: clipped to 1.2 where the advantage is positive."""
    mean, std = np.mean(SHAPED), np.std(SHAPED)
    a = (np.array(SHAPED) - mean) / std
    terms = np.where(a > 0, 1.2, 1.5) * a
    loss = gtpo_loss(array(np.zeros(5)), array(np.full(5, math.log(1.5))), **shaping(array))
    assert float(loss) == pytest.approx(-terms.mean(), rel=1e-4)


def test_the_gtpo_loss_of_two_prompts_is_that_of_each(array):
    old, new = np.zeros(5), np.linspace(-0.1, 0.1, 5)
    rewards, entropies = [1.0, 0.0, 1.0, 0.0, 0.0], [1.0, 2.0, 0.5, 3.0, 1.5]
    both = gtpo_loss(array(old), array(new), array(rewards), array(entropies), [1] * 5, prompt_ids=[0, 0, 1, 1, 1])
    alone = [
        float(gtpo_loss(array(old[s]), array(new[s]), array(rewards[s]), array(entropies[s]), [1] * n)) * n
        for s, n in ((slice(0, 2), 2), (slice(2, 5), 3))
    ]
    assert float(both) == pytest.approx(sum(alone) / 5, rel=1e-5)


def test_the_gtpo_loss_of_no_tokens_is_zero(array):
    empty = array([])
    assert float(gtpo_loss(empty, empty, empty, empty, [])) == 0


def test_the_gtpo_loss_has_a_gradient():
    slope = mx.grad(lambda new: gtpo_loss(mx.zeros(5), new, **shaping(mx.array)))(mx.zeros(5))
    assert (np.sign(np.array(slope)) == [-1, -1, -1, 1, 1]).all()


# planning tokens


def test_amplification_worked_by_hand(array):
    got = hicra.apply_hicra_amplification(array([1.0, -1.0, 2.0, -2.0]), array([1, 1, 0, 0]), alpha=0.5)
    assert type(got) is type(array([0]))
    assert np.asarray(got).tolist() == [1.5, -0.5, 2, -2]


def test_boosted_entropies_worked_by_hand(array):
    mask = array([1, 0, 0, 1, 0])
    within = hicra.boost_entropy_with_planning(array(ENTROPIES), mask, 0.5, [2, 3])
    assert np.allclose(np.asarray(within), [2, 3, 2, 3.5, 5])
    overall = hicra.boost_entropy_with_planning(array(ENTROPIES), mask, 0.5)
    assert np.allclose(np.asarray(overall), [2.3, 3, 2, 3.3, 5])


def test_a_mask_of_another_size_is_refused():
    for function in (hicra.apply_hicra_amplification, hicra.boost_entropy_with_planning):
        with pytest.raises(ValueError, match="one number per token"):
            function(np.ones(3), np.ones(2))
