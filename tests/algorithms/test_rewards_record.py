"""``Rewards`` and every baseline made of it, against the statistics module, one group at a time."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textpolicy.algorithms.credit import Rewards
from textpolicy.algorithms.grpo import GroupRelative
from textpolicy.algorithms.maxrl import MeanNormalized
from textpolicy.algorithms.reinforce import NoBaseline
from textpolicy.algorithms.rloo import LeaveOneOut
from textpolicy.errors import UserError

NAN = float("nan")

REWARDS = st.one_of(st.none(), st.just(NAN), st.sampled_from([0.0, 0.1, 0.25, 1.0, 3.5]), st.floats(0, 10, width=32))
STEPS = st.lists(st.tuples(REWARDS, st.sampled_from([7, -2, 10**12, 0])), min_size=1, max_size=14)
made = settings(max_examples=60, deadline=None, derandomize=True)


def scores(value):
    return value is not None and not math.isnan(value)


def of_group(step, i):
    """The scored rewards of the group of completion i."""
    return [r for r, g in step if g == step[i][1] and scores(r)]


def records(step):
    values, groups = zip(*step, strict=True)
    return Rewards.of(values, groups)


@made
@given(STEPS)
def test_statistics_are_those_of_each_groups_scored_rewards(step):
    rewards = records(step)
    for i, (r, _) in enumerate(step):
        group = of_group(step, i)
        assert rewards.scored[i] == scores(r)
        assert rewards.count[i] == len(group)
        assert rewards.mean[i] == pytest.approx(statistics.fmean(group) if group else 0.0)
        assert rewards.std()[i] == pytest.approx(statistics.stdev(group) if len(group) > 1 else 0.0, abs=1e-7)
        assert rewards.std(0)[i] == pytest.approx(statistics.pstdev(group) if group else 0.0, abs=1e-7)
        assert rewards.uniform[i] == (len(set(group)) <= 1)
        if not scores(r) or len(set(group)) <= 1:
            assert rewards.centered[i] == 0.0
        else:
            assert rewards.centered[i] == pytest.approx(r - statistics.fmean(group))


def centred(group, r):
    return 0.0 if len(set(group)) <= 1 else r - statistics.fmean(group)


def over_std(spread, eps=1e-6):
    def baseline(step, i):
        r, group = step[i][0], of_group(step, i)
        return centred(group, r) / (spread(step, group) + eps)

    return baseline


def others(step, i):
    """r_i minus the mean of the other scored completions of its prompt."""
    rest = [r for k, (r, g) in enumerate(step) if k != i and g == step[i][1] and scores(r)]
    return step[i][0] - statistics.fmean(rest) if rest else 0.0


def over_mean(step, i):
    group = of_group(step, i)
    m = statistics.fmean(group)
    return 0.0 if m <= 1e-6 else centred(group, step[i][0]) / (m + 1e-6)


def sample_std(values):
    return statistics.stdev(values) if len(values) > 1 else 0.0


BY_HAND = {
    "grpo": (GroupRelative(), over_std(lambda step, group: sample_std(group))),
    "grpo of the population": (GroupRelative(ddof=0), over_std(lambda step, group: statistics.pstdev(group))),
    "batch std": (
        GroupRelative("batch"),
        over_std(lambda step, group: sample_std([r for r, _ in step if scores(r)])),
    ),
    "no std": (GroupRelative("none"), lambda step, i: centred(of_group(step, i), step[i][0])),
    "rloo": (LeaveOneOut(), others),
    "maxrl": (MeanNormalized(), over_mean),
    "none": (NoBaseline(), lambda step, i: step[i][0]),
}
# far from 0 and from each other, so that a quotient of rounding errors is not compared
SPREAD = st.lists(
    st.tuples(st.one_of(st.none(), st.sampled_from([0.0, 0.25, 1.0, 3.5])), st.integers(0, 3)), min_size=1, max_size=14
)


@pytest.mark.parametrize("name", BY_HAND)
@made
@given(step=SPREAD)
def test_baselines_are_the_slow_loop_and_0_for_unscorable_completions(name, step):
    baseline, slow = BY_HAND[name]
    ours = baseline(records(step))
    assert ours.shape == (len(step),)
    for i, (r, _) in enumerate(step):
        assert ours[i] == pytest.approx(slow(step, i) if scores(r) else 0.0, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", [n for n in BY_HAND if n != "none"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 2.7, 1e-9, 1e9])
def test_a_group_that_agrees_is_exactly_0_whatever_a_mean_would_round_to(name, value):
    step = [(value, 0)] * 6 + [(1.0, 1), (0.0, 1)]
    assert BY_HAND[name][0](records(step))[:6].tolist() == [0.0] * 6


@pytest.mark.parametrize("name", [n for n in BY_HAND if n != "none"])
def test_a_group_of_one_is_0(name):
    assert BY_HAND[name][0](records([(5.0, 3), (1.0, 1), (0.0, 1)]))[0] == 0.0


@pytest.mark.parametrize("name", BY_HAND)
def test_nothing_scored_is_all_0_without_a_warning(name):
    assert BY_HAND[name][0](records([(None, 0), (NAN, 0), (None, 1)])).tolist() == [0.0] * 3


def test_rloo_by_hand_and_normalised():
    rewards = Rewards.of([1, 0, 0, 3], [0, 0, 0, 1])
    assert LeaveOneOut()(rewards) == pytest.approx([1.0, -0.5, -0.5, 0.0])
    scaled = LeaveOneOut(normalize_advantages=True)(rewards)
    assert scaled == pytest.approx(np.array([1.0, -0.5, -0.5, 0.0]) / (math.sqrt(0.5) + 1e-4))


def test_maxrl_by_hand_weighs_the_only_success_of_many_most():
    assert MeanNormalized()(Rewards.of([1, 0, 0, 0])) == pytest.approx([3, -1, -1, -1], abs=1e-4)
    assert MeanNormalized()(Rewards.of([1, 1, 1, 0])) == pytest.approx([1 / 3] * 3 + [-1], abs=1e-4)
    assert MeanNormalized()(Rewards.of([0, 0, 1e-7])).tolist() == [0.0] * 3  # a mean below eps


def test_ids_of_any_kind_become_dense_and_a_prompt_drawn_twice_has_two():
    assert Rewards.of([1, 2, 3], [40, 7, 40]).group.tolist() == [1, 0, 1]
    assert Rewards.of([1, 2, 3], ["b", "a", "b"]).group.tolist() == [1, 0, 1]
    assert Rewards.of([1, 2, 3]).group.tolist() == [0, 0, 0]
    assert Rewards.of([]).centered.shape == (0,)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_reward_is_refused_in_one_sentence(value):
    with pytest.raises(UserError, match="a reward is infinite; return a finite number, or None for what cannot be"):
        Rewards.of([1.0, value])


@pytest.mark.parametrize(("values", "groups"), [([1, 2], [0]), ([[1, 2]], [0]), ([1], [[0]])])
def test_shapes_that_differ_are_refused(values, groups):
    with pytest.raises(UserError, match=r"rewards have shape .* and group ids .*; give one of each per completion"):
        Rewards.of(np.array(values), groups)


def test_an_unknown_scale_is_refused():
    with pytest.raises(UserError, match="there is no scale of rewards 'groups'; did you mean 'group'"):
        GroupRelative("groups")
