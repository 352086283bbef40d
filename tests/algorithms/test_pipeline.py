"""From scored episodes to a batch: signals, stages in their order, overlong answers, mini-batches and refusals."""

import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import random_episodes, recipe

from textpolicy.algorithms import ALGORITHMS, Algorithm
from textpolicy.algorithms.grpo import GroupRelative
from textpolicy.algorithms.top_entropy import KeepTopEntropy
from textpolicy.algorithms.weighting import WeightByUncertainty
from textpolicy.errors import UserError
from textpolicy.types import Completion, Episode

NAN = float("nan")
LETTERS = {" let": 1, " me": 2, " think": 3, " seven": 4, ".": 5}  # "let me think" is a strategic gram


def answer(words, surprisals, reward, group=0, entropies=None, prompt=(9, 8), **scored):
    """An episode whose completion is these words."""
    logprobs = -np.array(surprisals, np.float32)
    entropies = None if entropies is None else np.array(entropies, np.float32)
    completion = Completion(np.array([LETTERS[w] for w in words], np.int32), logprobs, entropies)
    return replace(
        Episode.from_completion(prompt, completion, reward=reward, group=group, pieces=tuple(words)), **scored
    )


def advantages(recipe, episodes, controller=None):
    """One list of token advantages per episode, read from the packed batch."""
    batch = recipe.credit(episodes, controller)
    live = batch.weights != 0
    return [row[mask].tolist() for row, mask in zip(batch.advantages, live, strict=True)]


class Steady:
    """A SEPA controller that pools with the same strength, and records the arguments of each call."""

    def __init__(self, strength):
        self.strength, self.calls = strength, []

    def advance(self, correct_rate, execution):
        self.calls.append((correct_rate, sorted(execution.tolist())))
        return self.strength


# ---- the recipes with stages, one token at a time

WORDS = [[" let", " me", " think", "."], [" seven", "."], [" seven", " let", " me"]]
SURPRISALS = [[0.5, 1.0, 3.0, 1.5], [2.0, 6.0], [1.0, 1.0, 4.0]]
PLANNING = [[True, True, True, False], [False, False], [False] * 3]
REWARDS = [1.0, 0.0, 0.5]


def shaped(base, pooling=0.0, beta=0.0, alpha=0.0):
    """Pool, weigh, amplify: SEPA, GTPO's weights and HICRA in the order of the recipe "full"."""
    out = []
    for a, uncertainty, planning in zip(base, SURPRISALS, PLANNING, strict=True):
        execution = [s for s, p in zip(uncertainty, planning, strict=True) if not p]
        pooled = [
            s if p else pooling * sum(execution) / len(execution) + (1 - pooling) * s
            for s, p in zip(uncertainty, planning, strict=True)
        ]
        mean = sum(pooled) / len(pooled)
        weighed = [a * (1 + beta * (s / mean - 1)) for s in pooled]
        out.append([w + alpha * abs(w) if p else w for w, p in zip(weighed, planning, strict=True)])
    return out


@pytest.mark.parametrize(
    ("name", "base", "how"),
    [
        ("dr_grpo", [0.5, -0.5, 0.0], {}),
        ("gtpo", [0.5, -0.5, 0.0], {"beta": 0.1}),
        ("sepa", [0.5, -0.5, 0.0], {"pooling": 0.5, "beta": 0.1}),
        ("hicra", [0.5, -0.5, 0.0], {"alpha": 0.2}),
        ("full", [1.0, -1.0, 0.0], {"pooling": 0.5, "beta": 0.1, "alpha": 0.2}),
    ],
)
def test_recipes_are_the_slow_loop_over_their_stages(name, base, how):
    episodes = [answer(*row) for row in zip(WORDS, SURPRISALS, REWARDS, strict=True)]
    ours = advantages(recipe(name), episodes, Steady(0.5))
    for mine, expected in zip(ours, shaped(base, **how), strict=True):
        assert mine == pytest.approx(expected, abs=1e-5)


def test_the_controller_hears_of_every_execution_token_once_per_step():
    episodes = [answer(*row) for row in zip(WORDS, SURPRISALS, REWARDS, strict=True)]
    controller = Steady(0.5)
    recipe("sepa").mini_batches(episodes * 2, 2, controller)
    [(rate, execution)] = controller.calls
    assert rate == pytest.approx(1 / 3)
    assert execution == sorted([1.5, 2.0, 6.0, 1.0, 1.0, 4.0] * 2)


@pytest.mark.parametrize(
    ("rewards", "correct", "rate"),
    [([1.0, 0.5, NAN], [None] * 3, 0.5), ([0.0, 9.0], [True, False], 0.5), ([NAN, NAN], [None] * 2, None)],
)
def test_the_correct_rate_is_that_of_scored_completions(rewards, correct, rate):
    controller = Steady(0.5)
    episodes = [answer([" seven"], [1.0], r, is_correct=c) for r, c in zip(rewards, correct, strict=True)]
    recipe("sepa").credit(episodes, controller)
    assert controller.calls[0][0] == rate


# ---- the signal


def test_the_signal_correctness_replaces_the_reward():
    episodes = [answer([" seven"], [1.0], r, is_correct=c) for r, c in [(9.0, False), (-3.0, True)]]
    assert advantages(recipe("dr_grpo"), episodes) == [[6.0], [-6.0]]
    assert advantages(replace(recipe("dr_grpo"), signal="correctness"), episodes) == [[-0.5], [0.5]]


def test_without_is_correct_the_signal_correctness_is_refused_with_what_to_return():
    with pytest.raises(UserError, match=r"signal is correctness .*return \{\"reward\": ..., \"is_correct\": ...\}"):
        replace(recipe("grpo"), signal="correctness").credit(random_episodes(np.random.default_rng(0)))


def test_an_unscorable_completion_is_unscorable_under_either_signal():
    episodes = [answer([" seven"], [1.0], r, is_correct=c) for r, c in [(1.0, True), (0.0, False), (NAN, None)]]
    for signal in ("reward", "correctness"):
        assert advantages(replace(recipe("dr_grpo"), signal=signal), episodes) == [[0.5], [-0.5], [0.0]]


@pytest.mark.parametrize(("name", "value"), [("signal", "rewards"), ("uncertainty", "surprise")])
def test_a_setting_with_two_choices_names_both(name, value):
    with pytest.raises(UserError, match=f"{name} is '{value}'; set it to .* or "):
        replace(recipe("grpo"), **{name: value})


# ---- entropy is not surprisal


def test_weights_read_surprisal_or_entropy_by_setting_and_the_two_differ():
    by = {
        kind: advantages(
            replace(recipe("gtpo"), uncertainty=kind),
            [
                answer([" seven", "."], [1.0, 3.0], 1.0, entropies=[2.0, 0.0]),
                answer([" seven"], [1.0], 0.0, entropies=[1.0]),
            ],
        )[0]
        for kind in ("surprisal", "entropy")
    }
    assert by["surprisal"] == pytest.approx([0.5 * 0.95, 0.5 * 1.05])
    assert by["entropy"] == pytest.approx([0.5 * 1.1, 0.5 * 0.9])


ASKING_FOR_ENTROPY = [
    (replace(recipe("gtpo"), uncertainty="entropy"), "uncertainty is entropy and the engine reports none"),
    (recipe("gtpo_paper"), "the engine reports none"),
    (replace(recipe("grpo"), stages=(KeepTopEntropy(),)), "keeping the tokens of highest entropy needs exact entropy"),
]


@pytest.mark.parametrize(("asking", "sentence"), ASKING_FOR_ENTROPY, ids=[s for _, s in ASKING_FOR_ENTROPY])
def test_missing_exact_entropy_is_refused_and_never_replaced(asking, sentence):
    seen = [replace(e, reward=i % 2) for i, e in enumerate(random_episodes(np.random.default_rng(0)))]
    asking.credit(seen)
    for blind in ([replace(e, entropy=None) for e in seen], [replace(seen[0], entropy=None), *seen[1:]]):
        with pytest.raises(UserError) as error:
            asking.credit(blind)
        assert sentence in str(error.value)
        assert "\n" not in str(error.value)


# ---- length


@pytest.mark.parametrize(("length", "penalty"), [(6, 0.0), (8, 0.0), (9, -0.5), (10, -1.0)])
def test_dapo_takes_from_the_reward_of_a_completion_that_nears_the_limit(length, penalty):
    """A fifth of ten tokens is the cache: the penalty grows from 8 to 10."""
    short = answer([" seven"], [1.0], 0.0)
    long = answer([" seven"] * length, [1.0] * length, 1.0)
    dapo = replace(ALGORITHMS["dapo"], length=10.0, baseline=GroupRelative("none"))
    assert advantages(dapo, [long, short])[0] == pytest.approx([(1 + penalty) / 2] * length)


def test_an_overlong_penalty_alone_does_not_make_a_group_disagree():
    episodes = [answer([" seven"] * n, [1.0] * n, 1.0) for n in (1, 10)]
    assert not np.any(replace(ALGORITHMS["dapo"], length=10.0).credit(episodes).advantages)


def test_mask_truncated_counts_a_truncated_completion_in_its_group_without_a_gradient():
    episodes = [answer([" seven"], [1.0], 1.0), answer([" seven", "."], [1.0, 1.0], 0.0, truncated=True)]
    kept, masked = (replace(recipe("dr_grpo"), mask_truncated=m).credit(episodes) for m in (False, True))
    assert (kept.weights != 0).sum() == 3
    assert np.flatnonzero(masked.weights.any(axis=1)).tolist() == [0]
    assert masked.advantages[0].max() == 0.5  # against the mean with the truncated one


# ---- a KL in the reward


def test_a_kl_in_the_reward_is_summed_over_the_completion_and_subtracted_for_rloo():
    """k1 = l - q at each token: 0.5 at the two of the first completion, -1 at the one of the second."""
    rows = [([1.0, 2.0], 0.5, 1.0), ([1.0], -1.0, 0.0), ([1.0, 1.0, 1.0], 0.0, 0.0)]
    episodes = []
    for surprisals, gap, reward in rows:
        e = answer([" seven"] * len(surprisals), surprisals, reward)
        episodes.append(replace(e, reference=np.where(e.mask, e.logprobs - gap, NAN).astype(np.float32)))
    shaped_rewards = [1 - 0.1 * 2 * 0.5, 0 + 0.1 * 1.0, 0.0]
    ours = advantages(replace(recipe("rloo"), reward_kl=0.1), episodes)
    for i, mine in enumerate(ours):
        rest = [r for k, r in enumerate(shaped_rewards) if k != i]
        assert mine == pytest.approx([shaped_rewards[i] - sum(rest) / 2] * len(mine), rel=1e-5)


def test_a_kl_in_the_reward_needs_the_reference():
    with pytest.raises(UserError, match="the reward has a KL penalty and an episode no reference log-probs"):
        replace(recipe("rloo"), reward_kl=0.1).credit(random_episodes(np.random.default_rng(0)))


# ---- mini-batches


def test_mini_batches_are_whole_groups_credited_together_and_normalised_each_on_its_own():
    episodes = random_episodes(np.random.default_rng(3), groups=5, size=3)
    whole = recipe("reinforce++").credit(episodes)
    parts = recipe("reinforce++").mini_batches(episodes, 2)
    assert [len(p) for p in parts] == [9, 6]
    for part, rows in zip(parts, (slice(0, 9), slice(9, 15)), strict=True):
        width = part.inputs.shape[1]
        np.testing.assert_array_equal(part.inputs, whole.inputs[rows, :width])
        np.testing.assert_array_equal(part.advantages, whole.advantages[rows, :width])
        assert part.weights.sum() == pytest.approx(1, abs=1e-5)  # token-mean, of its own tokens


def test_there_are_at_most_as_many_mini_batches_as_groups():
    episodes = random_episodes(np.random.default_rng(3), groups=2, size=3)
    assert [len(p) for p in recipe("grpo").mini_batches(episodes, 7)] == [3, 3]


def test_episodes_of_a_group_need_not_stand_together():
    episodes = random_episodes(np.random.default_rng(3), groups=2, size=2)
    woven = [episodes[i] for i in (0, 2, 1, 3)]
    first, second = recipe("grpo").mini_batches(woven, 2)
    assert [row.tolist()[: len(e.tokens) - 1] for row, e in zip(first.targets, episodes[:2], strict=True)] == [
        e.tokens[1:].tolist() for e in episodes[:2]
    ]
    assert len(second) == 2


# ---- groups that agree, and what a stage may not undo


def test_no_stage_gives_credit_to_a_group_that_agrees_or_to_an_unscorable_completion():
    def add_one(credit):
        return replace(credit, advantage=credit.advantage + 1)

    rewards = [1.0, 1.0, 1.0, 1.0, 0.0, NAN, NAN, 5.0, NAN]
    episodes = [answer([" seven"], [1.0], r, group=i // 3) for i, r in enumerate(rewards)]
    ours = advantages(replace(recipe("dr_grpo"), stages=(add_one,)), episodes)
    assert ours == [[0.0]] * 3 + [[1.5], [0.5], [0.0]] + [[0.0]] * 3


def test_stages_see_which_completion_and_place_a_token_has_and_whether_it_plans():
    seen = []

    def record(credit):
        seen.append(credit)
        return credit

    episodes = [answer(*row) for row in zip(WORDS, SURPRISALS, REWARDS, strict=True)]
    with_hole = replace(episodes[1], mask=np.array([False, False, False, True]), pieces=(".",))
    replace(recipe("hicra"), stages=(record,)).credit([episodes[0], with_hole, replace(episodes[2], group=7)])
    [credit] = seen
    assert credit.row.tolist() == [0, 0, 0, 0, 1, 2, 2, 2]
    assert credit.position.tolist() == [0, 1, 2, 3, 0, 0, 1, 2]
    assert credit.planning.tolist() == [True, True, True, False, False, False, False, False]
    assert credit.uncertainty.tolist() == [0.5, 1.0, 3.0, 1.5, 6.0, 1.0, 1.0, 4.0]
    assert credit.group.tolist() == [0, 0, 1]
    assert credit.entropy is None


@pytest.mark.parametrize("name", ALGORITHMS)
def test_completions_without_tokens_pass(name):
    episodes = [answer([], [], r, entropies=[]) for r in (1.0, 0.0)]
    batch = recipe(name).credit(episodes)
    assert not batch.weights.any()
    spoken = answer([" seven", "."], [1.0, 2.0], 1.0, entropies=[1.0, 2.0])
    batch = recipe(name).credit([*episodes, spoken])
    assert (batch.weights != 0).sum() == 2
    assert np.isfinite(batch.advantages).all()


# ---- refusals


def broken(**change):
    return [replace(e, **change) if i == 1 else e for i, e in enumerate(random_episodes(np.random.default_rng(0)))]


FIRST = random_episodes(np.random.default_rng(0))[1]
REFUSED = {
    "log-probs too few": (broken(logprobs=FIRST.logprobs[:-1]), "an episode's arrays are tokens"),
    "mask too short": (broken(mask=FIRST.mask[:-1]), "an episode's arrays are tokens"),
    "tokens too few": (broken(tokens=FIRST.tokens[:-1]), "an episode's arrays are tokens"),
    "entropies too few": (broken(entropy=FIRST.entropy[:-1]), "an episode's arrays are tokens"),
    "references too few": (broken(reference=FIRST.logprobs[:-1]), "an episode's arrays are tokens"),
    "a first token without a prompt before it": (broken(mask=np.ones_like(FIRST.mask)), "the first of them a prompt's"),
    "log-probs of nan": (broken(logprobs=np.where(FIRST.mask, np.nan, 0)), "has log-probs that are not finite"),
    "log-probs of -inf": (broken(logprobs=np.where(FIRST.mask, -np.inf, 0)), "has log-probs that are not finite"),
    "an infinite reward": (broken(reward=math.inf), "a reward is infinite"),
    "no temperature": (broken(temperature=None), "was sampled with temperature None"),
    "no episodes": ([], "a batch needs at least one episode, got none"),
}


@pytest.mark.parametrize("name", ["grpo", "gtpo", "gtpo_paper", "full", "reinforce++"])
@pytest.mark.parametrize("what", REFUSED)
def test_every_recipe_refuses_episodes_that_no_learner_can_use_in_one_sentence(what, name):
    episodes, sentence = REFUSED[what]
    pieced = [replace(e, pieces=("",) * int(e.mask.sum())) for e in episodes]
    with pytest.raises(UserError) as error:
        recipe(name).credit(pieced)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_a_stage_that_makes_advantages_that_are_not_finite_is_found_out(value):
    def spoil(credit):
        return replace(credit, advantage=np.where(credit.row == 0, value, credit.advantage))

    episodes = [answer([" seven"], [1.0], r) for r in (1.0, 0.0)]
    with pytest.raises(UserError, match="an episode's advantages are not finite; check the rewards"):
        replace(recipe("grpo"), stages=(spoil,)).credit(episodes)


def test_planning_tokens_cannot_be_found_without_the_text_of_every_token():
    episodes = [replace(e, pieces=e.pieces[:-1]) for e in random_episodes(np.random.default_rng(0))]
    with pytest.raises(UserError, match=r"has \d+ pieces of text for \d+ sampled tokens; collect episodes with"):
        recipe("hicra").credit(episodes)
    recipe("grpo").credit(episodes)


def test_an_overlong_penalty_without_a_length_is_an_error_that_names_the_setting():
    with pytest.raises(UserError, match="the overlong penalty needs the longest completion; set the algorithm's"):
        ALGORITHMS["dapo"].credit(random_episodes(np.random.default_rng(0)))


def test_a_users_recipe_needs_only_a_baseline():
    mine = Algorithm(lambda rewards: np.arange(len(rewards.value), dtype=float), (WeightByUncertainty(0.0),))
    episodes = [answer([" seven"], [1.0], r) for r in (1.0, 0.0, 0.0)]
    assert advantages(mine, episodes) == [[0.0], [1.0], [2.0]]
