"""The credit functions of plain lists: tables worked by hand, and the order of the operators."""

import pytest

from textpolicy.tinker.advantages import (
    DEFAULT_STRATEGIC_GRAMS,
    SEPAController,
    apply_gtpo_weighting,
    apply_hicra,
    apply_sepa_pooling,
    compute_composable_advantages,
    compute_grpo_advantages,
    compute_maxrl_advantages,
    identify_planning_tokens,
)

WORDS = ["x", "let", "me", "think"]


class Tokenizer:
    """Token i is the i-th word, with a space in front."""

    def decode(self, ids):
        return "".join(f" {WORDS[i]}" for i in ids)


# one function, one formula


def test_grpo_advantages_are_rewards_minus_their_mean():
    assert compute_grpo_advantages([1, 0, 0, 3]) == [0, -1, -1, 2]
    assert compute_grpo_advantages([]) == []


def test_maxrl_advantages_divide_by_the_mean():
    assert compute_maxrl_advantages([1, 0, 0, 0]) == pytest.approx([3, -1, -1, -1], rel=1e-5)
    assert compute_maxrl_advantages([0, 0]) == [0, 0]
    with pytest.raises(ValueError, match="reward of -1"):
        compute_maxrl_advantages([1, -1])


def test_weights_worked_by_hand():
    assert apply_gtpo_weighting(2.0, [1, 3], beta=0.5) == pytest.approx([1.5, 2.5])
    assert apply_gtpo_weighting(-2.0, [1, 3], beta=3.0) == pytest.approx([0, -5])
    assert apply_gtpo_weighting(2.0, [1, 3], beta=0) == [2, 2]
    assert apply_gtpo_weighting(2.0, [0, 0]) == [2, 2]
    assert apply_gtpo_weighting(2.0, []) == []


def test_planning_tokens_gain_in_success_and_lose_less_in_failure():
    assert apply_hicra([1, 1, -1, -1], [0, 1, 0, 1], alpha=0.5) == [1, 1.5, -1, -0.5]
    assert apply_hicra([1, -1], [1, 1], alpha=0) == [1, -1]


def test_pooling_leaves_planning_tokens_alone():
    assert apply_sepa_pooling([1, 9, 3], [0, 1, 0], 0.5) == [1.5, 9, 2.5]
    assert apply_sepa_pooling([1, 9, 3], [0, 1, 0], 7) == [2, 9, 2]
    assert apply_sepa_pooling([1, 9, 3], [0, 1, 0], -1) == [1, 9, 3]
    assert apply_sepa_pooling([1, 2], [1, 1], 1) == [1, 2]


def test_planning_tokens_are_those_of_whole_phrases():
    assert identify_planning_tokens([0, 1, 2, 3, 0], Tokenizer()) == [0, 1, 1, 1, 0]
    assert "let me think" in DEFAULT_STRATEGIC_GRAMS


def test_the_controller_is_the_one_of_the_recipes():
    controller = SEPAController(sepa_steps=4, sepa_delay_steps=2)
    assert [controller.resolve_lambda(step) for step in (0, 2, 4, 9)] == [0, 0, 0.5, 1]


# all together: a success without planning, a failure that plans with its last three tokens

REWARDS, TOKENS = [1, 0], [[0, 0], [0, 1, 2, 3]]
LOGPROBS = [[-1.0, -3.0], [-2.0, -1.0, -1.0, -4.0]]


def composed(transform, advantage="grpo", rewards=REWARDS, tokenizer=None, **changes):
    settings = {"gtpo_beta": 0.5, "hicra_alpha": 0.1, "sepa_lambda": 1.0, **changes}
    return compute_composable_advantages(
        rewards, TOKENS, LOGPROBS, tokenizer, advantage_mode=advantage, transform_mode=transform, **settings
    )


@pytest.mark.parametrize(
    ("transform", "success", "failure"),
    [
        ("none", [0.5, 0.5], [-0.5] * 4),
        ("gtpo", [0.375, 0.625], [-0.5, -0.375, -0.375, -0.75]),
        ("gtpo_hicra", [0.375, 0.625], [-0.5, -0.3375, -0.3375, -0.675]),
        ("gtpo_sepa", [0.5, 0.5], [-0.5, -0.375, -0.375, -0.75]),
        ("gtpo_sepa_hicra", [0.5, 0.5], [-0.5, -0.3375, -0.3375, -0.675]),
    ],
)
def test_every_mode_worked_by_hand(transform, success, failure):
    planning = transform not in ("none", "gtpo")
    advantages, stats = composed(transform, tokenizer=Tokenizer() if planning else None)
    assert advantages == [pytest.approx(success), pytest.approx(failure)]
    assert (stats is not None) == planning


def test_maxrl_is_a_base_of_every_mode():
    advantages, _ = composed("gtpo", "maxrl")
    assert advantages[0] == pytest.approx([0.75, 1.25], rel=1e-5)


def test_the_statistics_are_those_of_the_surprisals_before_pooling():
    _, stats = composed("gtpo_sepa", tokenizer=Tokenizer())
    assert stats == pytest.approx(
        {"exec_entropy_mean": 2, "exec_entropy_var": 2 / 3, "plan_entropy_mean": 2, "plan_entropy_var": 2}
    )
    _, stats = composed("gtpo_sepa", tokenizer=Tokenizer(), strategic_grams=["think hard"])
    assert set(stats) == {"exec_entropy_mean", "exec_entropy_var"}


def test_a_group_that_agrees_gets_nothing_in_any_mode():
    for transform in ("none", "gtpo_sepa_hicra"):
        advantages, _ = composed(transform, rewards=[1, 1], tokenizer=Tokenizer())
        assert advantages == [[0, 0], [0, 0, 0, 0]]


def test_a_completion_without_tokens_counts_in_its_group():
    advantages, _ = compute_composable_advantages(
        [1, 0, 0], [[0], [], [0]], [[-1.0], [], [-1.0]], None, advantage_mode="grpo", transform_mode="gtpo"
    )
    assert advantages == [pytest.approx([2 / 3]), [], pytest.approx([-1 / 3])]


def test_no_completions_have_no_advantages():
    nothing = compute_composable_advantages([], [], [], None, advantage_mode="grpo", transform_mode="none")
    assert nothing == ([], None)


# what cannot work


@pytest.mark.parametrize("changes", [{"advantage": "gae"}, {"transform": "sepa"}])
def test_unknown_modes_are_refused_by_name(changes):
    with pytest.raises(ValueError, match=r"mode '(gae|sepa)'; .*choose one of"):
        composed(**{"transform": "none", **changes})


@pytest.mark.parametrize(
    "call",
    [
        lambda: apply_hicra([1.0, 1.0], [1]),
        lambda: apply_sepa_pooling([1.0], [1, 0], 0.5),
        lambda: composed("none", rewards=[1, 0, 0]),
        lambda: compute_composable_advantages(
            [1], [[0, 0]], [[-1.0]], None, advantage_mode="grpo", transform_mode="none"
        ),
    ],
)
def test_lists_of_different_lengths_are_refused(call):
    with pytest.raises(ValueError, match="give one"):
        call()


def test_negative_strengths_are_refused():
    with pytest.raises(ValueError, match="beta is -1"):
        apply_gtpo_weighting(1.0, [1.0], beta=-1)
    with pytest.raises(ValueError, match="alpha is -1"):
        apply_hicra([1.0], [1], alpha=-1)
