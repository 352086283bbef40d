"""Arms against a baseline: tests, intervals, power and advice, against slow loops and hand-worked tables."""

from itertools import combinations, product
from math import inf, isclose

import numpy as np
import pytest
from scipy.stats import ttest_ind

from textpolicy import analysis
from textpolicy.analysis.comparison import DECLINE, IMPROVEMENT, INSUFFICIENT
from textpolicy.errors import UserError

BASE = {0: 0.50, 1: 0.55, 2: 0.48, 3: 0.52, 4: 0.51, 5: 0.57}
BETTER = {
    seed: value + gain for (seed, value), gain in zip(BASE.items(), [0.1, 0.12, 0.08, 0.11, 0.09, 0.13], strict=True)
}
MIXED = {
    seed: value + gain for (seed, value), gain in zip(BASE.items(), [0.1, -0.1, 0.02, 0.03, -0.02, 0.05], strict=True)
}


# ---- many at once


def test_many_sign_flip_tests_at_once_are_the_test_many_times():
    d = np.random.default_rng(0).normal(0.3, 1, (30, 7))
    d[0] = [1, -1, 1, -1, 1, -1, 1]  # ties
    singly = [analysis.sign_flip_test(np.zeros(7), row).p_two_sided for row in d]
    assert analysis.sign_flip_p_values(d) == pytest.approx(singly, abs=1e-12)


def test_many_label_permutation_tests_at_once_are_the_test_many_times():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 1, (20, 4)), rng.normal(1, 1, (20, 3))
    singly = [analysis.label_permutation_test(x, y).p_two_sided for x, y in zip(a, b, strict=True)]
    assert analysis.label_permutation_p_values(a, b) == pytest.approx(singly, abs=1e-12)


# ---- the interval of the sign-flip test


def test_six_pairs_span_their_interval_and_five_have_none():
    d = [0.3, -0.1, 0.2, 0.5, 0.4, 0.1]
    found = analysis.sign_flip_interval(d)
    assert (found.low, found.high) == (-0.1, 0.5)  # one subset mean of 63 on either side: those of one pair alone
    assert (analysis.sign_flip_interval(d[:5]).low, analysis.sign_flip_interval(d[:5]).high) == (-inf, inf)


@pytest.mark.parametrize("pairs", [6, 7, 9])
def test_the_interval_contains_the_shifts_that_the_test_does_not_reject(pairs):
    d = np.random.default_rng(pairs).normal(0.2, 1, pairs)
    found = analysis.sign_flip_interval(d)
    for end, inside in ((found.low, 1e-6), (found.high, -1e-6)):
        assert analysis.sign_flip_test(np.zeros(pairs), d - (end + inside)).p_two_sided > 0.05
        assert analysis.sign_flip_test(np.zeros(pairs), d - (end - inside)).p_two_sided <= 0.05


def test_many_pairs_have_an_interval_near_that_of_t():
    d = np.random.default_rng(2).normal(0.1, 1, 40)
    found, t = analysis.sign_flip_interval(d), analysis.paired_test(np.zeros(40), d)
    assert (found.low, found.high) == pytest.approx((t.low, t.high), abs=0.05)


# ---- power


def test_six_pairs_find_an_effect_when_all_have_its_sign():
    # p = 2/64 is the only p below 0.05, and takes six differences of one sign: P(N(1.5, 1) > 0)^6
    assert analysis.power_of_sign_flips(1.5, 6) == pytest.approx(0.9332**6, abs=0.02)
    assert analysis.power_of_pairs(1.5, 6) > 0.8  # which the t-test's formula does not know
    assert analysis.power_of_sign_flips(9, 5) == 0


def test_no_effect_is_found_as_often_as_alpha_allows():
    assert analysis.power_of_sign_flips(0, 6) == pytest.approx(2 / 64, abs=0.01)
    assert analysis.power_of_labels(0, 4) == pytest.approx(2 / 70, abs=0.01)


def test_a_detectable_effect_is_found_with_the_wanted_power():
    assert analysis.power_of_sign_flips(analysis.detectable_by_sign_flips(7), 7) == pytest.approx(0.8, abs=0.02)
    assert analysis.power_of_labels(analysis.detectable_by_labels(4), 4) == pytest.approx(0.8, abs=0.02)
    assert analysis.detectable_by_sign_flips(5) == analysis.detectable_by_labels(3) == inf


def test_from_eleven_pairs_and_seven_runs_on_power_is_that_of_t():
    assert analysis.power_of_sign_flips(1.0, 11) == analysis.power_of_pairs(1.0, 11)
    assert analysis.power_of_labels(1.0, 7) == analysis.power_of_runs(1.0, 7)
    assert analysis.power_of_sign_flips(1.0, 11) == pytest.approx(analysis.power_of_sign_flips(1.0, 10), abs=0.1)
    assert analysis.power_of_labels(1.0, 7) == pytest.approx(analysis.power_of_labels(1.0, 6), abs=0.12)


def test_what_many_runs_can_detect_is_found_with_the_wanted_power():
    assert analysis.power_of_sign_flips(analysis.detectable_by_sign_flips(12), 12) == pytest.approx(0.8, abs=0.001)
    assert analysis.power_of_labels(analysis.detectable_by_labels(9, power=0.9), 9) == pytest.approx(0.9, abs=0.001)
    assert analysis.detectable_by_sign_flips(12) < analysis.detectable_by_sign_flips(10)
    assert analysis.detectable_by_labels(9) < analysis.detectable_by_labels(6)


def test_a_detectable_effect_is_found_at_a_small_alpha_although_scipys_power_has_gaps():
    rng, effect = np.random.default_rng(0), analysis.detectable_with_runs(7, alpha=1e-4)
    x, y = rng.standard_normal((2, 50_000, 7))
    assert (ttest_ind(y + effect, x, axis=1).pvalue <= 1e-4).mean() == pytest.approx(0.8, abs=0.01)


def test_the_pairs_needed_are_the_fewest():
    pairs = analysis.pairs_needed_by_sign_flips(1.3)
    assert analysis.power_of_sign_flips(1.3, pairs) >= 0.8 > analysis.power_of_sign_flips(1.3, pairs - 1)
    assert analysis.pairs_needed_by_sign_flips(0.3) == int(np.ceil(analysis.pairs_needed(0.3)))
    assert analysis.runs_needed_by_labels(9) == 4  # 2/70; three and three have no p below 0.1


# ---- testing after every pair


def slow_e(d):
    """The product of bets, one strength and direction after another."""
    total = 0.0
    for strength, direction in product((0.5, 1, 2, 4), (1, -1)):
        wealth = 1.0
        for i, x in enumerate(d):
            size = np.sqrt(np.mean(np.square(d[: i + 1])))
            wealth *= 1 + np.tanh(strength * direction * x / size)
        total += wealth / 8
    return total


def test_the_e_process_is_a_mixture_of_bets_on_the_next_sign():
    d = [0.3, -0.1, 0.2, 0.5]
    found = analysis.anytime_test(np.zeros(4), d)
    assert found.e == pytest.approx([slow_e(d[:n]) for n in range(1, 5)])
    assert found.p == pytest.approx(1 / max(found.e))


def test_over_all_signs_the_mean_of_e_is_1_so_no_way_to_stop_gains():
    sizes = [0.3, 0.1, 0.7, 0.2, 0.5, 0.4]
    e = analysis.e_process(np.array([np.multiply(sizes, signs) for signs in product((1, -1), repeat=6)]))
    assert e.mean(axis=0) == pytest.approx(np.ones(6))
    stopped = [row[np.argmax(row >= 3)] if (row >= 3).any() else row[-1] for row in e]
    assert np.mean(stopped) == pytest.approx(1)


def test_six_equal_pairs_stop_and_nothing_takes_it_back():
    assert analysis.anytime_test(np.zeros(8), [1] * 6 + [-5, -5]).stopped == 6
    assert analysis.anytime_test(np.zeros(5), [1] * 5).stopped is None
    assert analysis.anytime_test([0.0], [0.0]).e == (1.0,)


def test_the_anytime_interval_contains_the_shifts_that_were_never_rejected():
    d = np.random.default_rng(5).normal(0.5, 1, 14)
    found = analysis.anytime_interval(d)
    assert found.low < found.estimate < found.high
    for shift in (found.low, found.high):
        outward = 1.05 * (shift - np.median(d)) + np.median(d)
        assert analysis.anytime_test(np.zeros(14), d - shift).stopped is None
        assert analysis.anytime_test(np.zeros(14), d - outward).stopped is not None
    fixed = analysis.sign_flip_interval(d)
    assert found.low < fixed.low < fixed.high < found.high


def test_six_pairs_can_bound_the_interval_and_five_cannot():
    assert np.isfinite(analysis.anytime_interval([0.1, 0.12, 0.11, 0.1, 0.12, 0.11]).low)
    assert analysis.anytime_interval([0.1, 0.12, 0.11, 0.1, 0.12]).low == -inf
    assert analysis.anytime_interval([0.1] * 7).high == pytest.approx(0.1, abs=1e-3)


def test_testing_after_every_pair_costs_seeds():
    assert analysis.pairs_needed_by_anytime(1.0) > analysis.pairs_needed_by_sign_flips(1.0)
    assert analysis.pairs_needed_by_anytime(0.01) is None
    assert analysis.power_of_anytime(1.0, analysis.pairs_needed_by_anytime(1.0)) == pytest.approx(0.8, abs=0.05)


# ---- comparisons


def test_six_pairs_that_all_gain_are_an_improvement():
    c = analysis.compare(BASE, BETTER)
    assert (c.paired, c.seeds, c.p, c.recommendation) == (True, (0, 1, 2, 3, 4, 5), 2 / 64, IMPROVEMENT)
    assert (c.interval.low, c.interval.high) == pytest.approx((0.08, 0.13))
    assert c.bootstrap is not None
    assert c.interval.low < c.bootstrap.low < c.difference < c.bootstrap.high < c.interval.high
    assert analysis.compare(BETTER, BASE).recommendation == DECLINE


def test_pairs_that_disagree_are_insufficient_evidence_and_the_missing_seeds_are_counted():
    c = analysis.compare(BASE, MIXED)
    assert c.recommendation == INSUFFICIENT
    assert c.runs_needed == analysis.pairs_needed_by_sign_flips(c.difference / c.sd)
    assert c.further_runs == c.runs_needed - 6
    assert c.detectable == pytest.approx(c.sd * analysis.detectable_by_sign_flips(6))


def test_the_smallest_effect_that_matters_decides_how_many_seeds_are_needed():
    c = analysis.compare(BASE, MIXED, analysis.Question(smallest_effect=0.05))
    assert c.runs_needed == analysis.pairs_needed_by_sign_flips(0.05 / c.sd)


def test_seeds_that_one_arm_lacks_are_left_out_and_named():
    c = analysis.compare(BASE, {**BETTER, 9: 0.1})
    assert c.unmatched == (9,)
    assert c.p == 2 / 64


def test_pairs_are_matched_by_seed_and_not_by_order():
    assert analysis.compare(BASE, dict(reversed(BETTER.items()))) == analysis.compare(BASE, BETTER)


def test_runs_of_other_seeds_are_compared_by_their_labels():
    other = {seed + 10: value for seed, value in BETTER.items()}
    c = analysis.compare(BASE, other, paired=False)
    assert not c.paired
    assert (
        c.p
        == sum(
            abs(np.mean(x) - (sum([*BASE.values(), *other.values()]) - sum(x)) / 6) >= c.difference - 1e-9
            for x in combinations([*BASE.values(), *other.values()], 6)
        )
        / 924
    )
    with pytest.raises(UserError, match="share no seed"):
        analysis.compare(BASE, other)


def test_one_seed_per_arm_decides_nothing():
    c = analysis.compare({0: 0.1}, {0: 0.9})
    assert (c.p, c.recommendation, c.sd, c.runs_needed, c.detectable) == (1.0, INSUFFICIENT, None, None, inf)


def test_pairs_that_all_differ_alike_have_a_p_and_no_spread():
    c = analysis.compare(BASE, {seed: value + 0.1 for seed, value in BASE.items()})
    assert (c.p, c.sd, c.bootstrap, c.runs_needed) == (2 / 64, 0.0, None, None)
    assert analysis.compare(BASE, BASE).p == 1


def test_p_is_adjusted_for_the_number_of_arms():
    arms = {"a": BASE, "b": BETTER, "c": MIXED}
    b, c = analysis.compare_arms(arms, "a")
    assert (b.p, b.p_adjusted) == (2 / 64, 4 / 64)
    assert b.recommendation == INSUFFICIENT
    assert isclose(c.p_adjusted, c.p)
    with pytest.raises(UserError, match="there is no arm 'd'"):
        analysis.compare_arms(arms, "d")


def test_an_anytime_question_is_answered_by_the_e_process():
    c = analysis.compare(BASE, BETTER, analysis.Question(stopping="anytime"))
    assert c.p == c.anytime.p
    assert c.test.startswith("e-process")
    with pytest.raises(UserError, match="needs pairs"):
        analysis.compare(BASE, BETTER, analysis.Question(stopping="anytime"), paired=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: analysis.Question(alpha=5), "alpha is 5"),
        (lambda: analysis.Question(stopping="early"), "no stopping rule 'early'"),
        (lambda: analysis.Question(smallest_effect=-1), "smallest_effect is -1"),
        (lambda: analysis.Question(resamples=50), "resamples is 50"),
        (lambda: analysis.compare(BASE, {}), "candidate has no finished run"),
        (lambda: analysis.sign_flip_p_values(np.zeros((1, 18))), "18 pairs"),
        (lambda: analysis.label_permutation_p_values(np.zeros(3), np.zeros((1, 3))), "as \\(campaigns, runs\\)"),
    ],
)
def test_arms_that_cannot_be_compared_are_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
