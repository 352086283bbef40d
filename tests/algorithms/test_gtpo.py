"""GTPO and GRPO-S: hand-worked shares, a slow loop over the paper's sums, and what each normalisation keeps."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import random_episodes
from made_credit import make_credit, random_lengths

from textpolicy.algorithms import ALGORITHMS
from textpolicy.algorithms.gtpo import ShapeByEntropy, live_counts, normalize, sequence_rewards, shaped_rewards
from textpolicy.errors import UserError


def shaped(credit, **settings):
    return shaped_rewards(credit.entropy, credit.row, credit.position, credit.reward, credit.group, **settings)


def test_success_is_shared_by_entropy_and_blame_by_its_inverse():
    credit = make_credit([1, 1, 1, 1], reward=[1, 1, 0, 0], entropy=[1.0, 3.0, 1.0, 3.0])
    # of two successes: 2 x 1/4 and 2 x 3/4; of two failures: 2 x 3/4 and 2 x 1/4
    assert shaped(credit) == pytest.approx([1.05, 1.15, -1.15, -1.05])


def test_the_reward_of_a_success_counts_and_that_of_a_failure_does_not():
    credit = make_credit([1, 1, 1], reward=[0.9, 0.6, 0.2])
    assert shaped(credit, alpha_1=2.0) == pytest.approx([1.9, 1.3, -2.1])
    assert shaped(credit, alpha_1=2.0, reward_threshold=0.7) == pytest.approx([1.9, -2.1, -2.1])


def by_loop(credit, a1, a2, eps=1e-8):
    """Equations 3 and 5, one token at a time."""
    out = []
    for t in range(len(credit.row)):
        r = credit.reward[credit.row[t]]
        same = [
            k
            for k in range(len(credit.row))
            if credit.position[k] == credit.position[t]
            and credit.group[credit.row[k]] == credit.group[credit.row[t]]
            and (credit.reward[credit.row[k]] > 0.5) == (r > 0.5)
        ]
        if r > 0.5:
            out.append(a1 * r + a2 * credit.entropy[t] / sum(credit.entropy[k] for k in same) * len(same))
        else:
            inverse = sum(1 / (credit.entropy[k] + eps) for k in same)
            out.append(-a1 - a2 / (credit.entropy[t] + eps) / inverse * len(same))
    return out


def random_credit(seed, groups=3):
    rng = np.random.default_rng(seed)
    lengths = random_lengths(rng)
    return make_credit(
        lengths,
        entropy=rng.exponential(size=lengths.sum()),
        reward=rng.choice([0.0, 0.3, 0.8, 1.0], len(lengths)),
        group=rng.integers(0, groups, len(lengths)),
    )


@pytest.mark.parametrize("seed", range(5))
def test_sums_run_over_one_prompt_one_outcome_and_one_position(seed):
    credit = random_credit(seed)
    assert shaped(credit, alpha_1=0.9, alpha_2=0.3) == pytest.approx(by_loop(credit, 0.9, 0.3), rel=1e-12)


def test_alphas_of_sum_1_keep_the_mean_reward_of_successes_at_every_position():
    credit = make_credit([3, 3, 1], reward=[1, 1, 1], entropy=np.random.default_rng(0).exponential(size=7))
    values = shaped(credit, alpha_1=0.7, alpha_2=0.3)
    assert [values[credit.position == t].mean() for t in range(3)] == pytest.approx([1.0] * 3)


def test_live_counts_shrink_as_completions_end():
    credit = make_credit([3, 1, 2], reward=[1, 1, 0])
    counts = live_counts(credit.row, credit.position, credit.reward, credit.group)
    assert counts.tolist() == [2, 1, 1, 2, 1, 1]


def test_entropies_of_zero_stay_finite_and_share_blame_evenly():
    credit = make_credit([1] * 4, reward=[1, 1, 0, 0], entropy=[0.0, 0.0, 0.0, -1e-9])
    assert shaped(credit) == pytest.approx([1.0, 1.0, -1.1, -1.1])


def test_joint_normalisation_keeps_success_above_failure_in_every_group():
    credit = random_credit(1)
    advantage = ShapeByEntropy()(credit).advantage
    success = (credit.reward > 0.5)[credit.row]
    for g in range(3):
        mine = (credit.group[credit.row] == g) & (advantage != 0)
        assert advantage[mine & success].min() > advantage[mine & ~success].max()
    groups = [advantage[credit.group[credit.row] == g] for g in range(3)]
    assert [g.mean() for g in groups] == pytest.approx([0.0] * 3, abs=1e-12)


def test_separate_normalisation_cancels_both_alphas_and_forgets_the_outcome():
    credit = make_credit([4, 4, 4, 4], entropy=np.random.default_rng(2).exponential(size=16))
    paper = ShapeByEntropy(normalisation="separate")(credit).advantage
    other = ShapeByEntropy(alpha_1=7.0, alpha_2=0.4, normalisation="separate")(credit).advantage
    assert paper == pytest.approx(other, abs=1e-4)  # up to eps under the root
    success = (credit.reward > 0.5)[credit.row]
    assert paper[success].sum() == pytest.approx(0.0, abs=1e-12)
    assert (paper[success] < 0).any()


def test_equal_values_normalise_to_exactly_zero():
    values = np.full(10, 0.1)  # which summed one by one and divided by 10 is not 0.1
    assert normalize(values, np.ones(10, bool), np.zeros(10, int)).tolist() == [0.0] * 10


def test_separate_normalisation_is_also_per_prompt():
    values = np.array([1.0, 3.0, -5.0, -9.0, 10.0, 30.0, -1.0, -2.0])
    success, group = values > 0, np.repeat([0, 1], 4)
    advantage = normalize(values, success, group, "separate")
    assert advantage == pytest.approx([-1, 1, 1, -1, -1, 1, 1, -1])


@pytest.mark.parametrize("normalisation", ["joint", "separate"])
@pytest.mark.parametrize("rewards", [[1, 1, 1], [0, 0, 0], [0.4, 0.0, 0.3], [np.nan, 1, np.nan]])
def test_a_group_whose_outcomes_do_not_differ_gets_nothing(rewards, normalisation):
    credit = make_credit([3, 2, 4], reward=rewards, entropy=np.random.default_rng(0).exponential(size=9))
    assert ShapeByEntropy(normalisation=normalisation)(credit).advantage.tolist() == [0.0] * 9


def test_an_unscorable_completion_gets_nothing_and_changes_nothing_for_the_others():
    entropy = np.random.default_rng(0).exponential(size=8)
    with_it = make_credit([2, 3, 3], reward=[1, np.nan, 0], entropy=entropy)
    without = make_credit([2, 3], reward=[1, 0], entropy=np.delete(entropy, [2, 3, 4]))
    advantage = ShapeByEntropy()(with_it).advantage
    assert advantage[2:5].tolist() == [0.0] * 3
    assert np.delete(advantage, [2, 3, 4]) == pytest.approx(ShapeByEntropy()(without).advantage)


def test_a_prompt_is_shaped_as_if_it_were_alone():
    both = random_credit(4, groups=2)
    advantage = ShapeByEntropy()(both).advantage
    rows = np.flatnonzero(both.group == 1)
    tokens = np.isin(both.row, rows)
    alone = make_credit(
        np.bincount(both.row, minlength=12)[rows], reward=both.reward[rows], entropy=both.entropy[tokens]
    )
    assert advantage[tokens] == pytest.approx(ShapeByEntropy()(alone).advantage)


def test_the_baselines_advantage_is_replaced():
    credit = random_credit(0)
    doubled = replace(credit, advantage=5 * credit.advantage)
    assert np.array_equal(ShapeByEntropy()(credit).advantage, ShapeByEntropy()(doubled).advantage)


def test_grpo_s_shares_by_the_mean_entropy_of_whole_completions():
    credit = make_credit([2, 1, 0, 3], reward=[1, 1, 0, 0], entropy=[1.0, 3.0, 6.0, 5.0, 5.0, 5.0])
    rewards = sequence_rewards(credit.entropy, credit.row, credit.reward, credit.group, beta_1=0.9)
    assert rewards == pytest.approx([0.95, 1.05, 0.0, -1.0])  # 2 x 2/8, 2 x 6/8, nothing said, alone


def test_grpo_s_takes_a_completion_without_doubt_as_nearly_so():
    credit = make_credit([1, 1, 1, 1], reward=[1, 1, 0, 0], entropy=np.zeros(4))
    rewards = sequence_rewards(credit.entropy, credit.row, credit.reward, credit.group)
    assert rewards == pytest.approx([1.1, 1.1, -1.1, -1.1])


def test_the_recipe_credits_real_episodes_and_gates_groups_that_agree():
    episodes = [replace(e, reward=1.0) if e.group == 0 else e for e in random_episodes(np.random.default_rng(5))]
    credit = ALGORITHMS["gtpo_paper"].tokens(episodes)
    assert np.isfinite(credit.advantage).all()
    assert (credit.advantage[credit.group[credit.row] == 0] == 0).all()
    assert credit.advantage.any()


def test_without_exact_entropy_the_error_names_the_other_recipe():
    with pytest.raises(UserError, match=r"gtpo_paper needs exact entropy .* uncertainty = 'surprisal'"):
        ShapeByEntropy()(make_credit([1, 1], entropy=None))


def test_a_step_without_tokens_passes():
    assert ShapeByEntropy()(make_credit([0, 0])).advantage.shape == (0,)


@pytest.mark.parametrize("settings", [{"alpha_1": -1.0}, {"alpha_2": np.inf}, {"normalisation": "both"}])
def test_a_setting_that_cannot_work_is_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        ShapeByEntropy(**settings)


def test_the_function_also_refuses_an_unknown_normalisation():
    with pytest.raises(UserError, match="did you mean 'joint'"):
        normalize(np.ones(1), np.ones(1, bool), np.zeros(1, int), "jiont")
