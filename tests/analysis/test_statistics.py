"""The statistics against hand-worked tables, full enumeration and the definitions they stand for."""

import random
import subprocess
import sys
from itertools import combinations, product
from math import comb, erf, sqrt

import numpy as np
import pytest
from scipy.stats import binomtest, chi2, norm, t

from textpolicy import analysis as stats
from textpolicy.analysis.intervals import RATE_DIFFERENCE_METHODS, RATE_METHODS
from textpolicy.analysis.statistics import CORRECTIONS
from textpolicy.errors import MissingDependencyError, UserError

A = [0.31, 0.35, 0.29, 0.40, 0.33]
B = [0.36, 0.41, 0.34, 0.39, 0.44]
ALIKE = [0.3, 0.3, 0.3]


def binomial(k, n, p=0.5):
    return comb(n, k) * p**k * (1 - p) ** (n - k)


# ---- rates


def test_fisher_on_the_lady_tasting_tea():
    assert stats.fisher_test([[3, 1], [1, 3]], "greater").p == pytest.approx(17 / 70)
    assert stats.fisher_test([[3, 1], [1, 3]]).p == pytest.approx(34 / 70)
    assert stats.fisher_test([[3, 1], [1, 3]]).statistic == pytest.approx(9)


def worst_tail(table):
    """Barnard's p by its definition: the largest chance, over common rates, of a Wald z as far from 0."""
    (a, b), (c, d) = table
    n, m = a + b, c + d

    def z(i, j):
        rate = (i + j) / (n + m)
        return 0.0 if rate in (0, 1) else (i / n - j / m) / sqrt(rate * (1 - rate) * (1 / n + 1 / m))

    tail = [(i, j) for i in range(n + 1) for j in range(m + 1) if abs(z(i, j)) >= abs(z(a, c)) - 1e-9]
    return max(sum(binomial(i, n, q) * binomial(j, m, q) for i, j in tail) for q in np.linspace(0, 1, 201))


@pytest.mark.parametrize("table", [[[8, 2], [1, 5]], [[2, 8], [5, 1]], [[0, 10], [5, 5]], [[1, 6], [9, 4]]])
def test_barnard_holds_the_size_of_the_arms_fixed_and_has_more_power_than_fisher(table):
    p = stats.barnard_test(table).p
    assert p == pytest.approx(worst_tail(table), abs=2e-4)
    assert p < stats.fisher_test(table).p


def test_scipys_barnard_is_never_above_ours():
    for table in ([[8, 2], [1, 5]], [[0, 10], [5, 5]]):
        assert stats.barnard_test(table, mirrored=False).p <= stats.barnard_test(table).p


def test_both_table_tests_take_greater_for_more_in_the_first_row():
    for test in (stats.fisher_test, stats.barnard_test):
        assert test([[8, 2], [1, 5]], "greater").p < 0.05 < test([[8, 2], [1, 5]], "less").p


@pytest.mark.parametrize("table", [[[0, 9], [0, 4]], [[9, 0], [4, 0]]])
def test_arms_that_are_all_wrong_or_all_correct_do_not_differ(table):
    assert stats.fisher_test(table).p == stats.barnard_test(table).p == 1.0
    (a, b), (c, d) = table
    assert stats.pooled_z_test(a, a + b, c, c + d) == stats.Outcome(0.0, 1.0)


@pytest.mark.parametrize(("only_a", "only_b"), [(1, 5), (5, 1), (0, 6), (4, 4), (7, 6)])
def test_mcnemar_counts_the_splits_at_least_as_uneven_and_mid_p_half_of_those_equally_so(only_a, only_b):
    n, gap = only_a + only_b, abs(only_a - only_b)
    gaps = [abs(n - 2 * k) for k in range(n + 1)]
    more = sum(binomial(k, n) for k in range(n + 1) if gaps[k] > gap)
    equal = sum(binomial(k, n) for k in range(n + 1) if gaps[k] == gap)
    assert stats.mcnemar_test(only_a, only_b).p == pytest.approx(more + equal)
    assert stats.mcnemar_test(only_a, only_b, "mid-p").p == pytest.approx(more + equal / 2)


def test_mcnemar_chi2_is_corrected_for_continuity():
    assert stats.mcnemar_test(30, 12, "chi2").statistic == pytest.approx(17**2 / 42)


@pytest.mark.parametrize("method", ["exact", "mid-p", "chi2"])
def test_models_that_solve_the_same_problems_do_not_differ(method):
    assert stats.mcnemar_test(0, 0, method) == stats.Outcome(0.0, 1.0)


def test_pooled_z_by_hand():
    found = stats.pooled_z_test(30, 100, 50, 100)
    z = 0.2 / sqrt(0.4 * 0.6 * 0.02)
    assert found.statistic == pytest.approx(z)
    assert found.p == pytest.approx(1 - erf(z / sqrt(2)))


# ---- means and ranks


def test_paired_t_by_hand():
    found = stats.paired_test([0, 0, 0], [1, 2, 3])
    assert found.t == pytest.approx(2 * sqrt(3))
    assert found.df == 2
    half = 4.302652729911275 / sqrt(3)  # t(0.975, 2) s / sqrt(n)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))


def test_student_and_welch_agree_on_t_with_equal_sizes_and_differ_in_their_degrees_of_freedom():
    student, welch = stats.student_test([1, 2, 3], [2, 6, 10]), stats.welch_test([1, 2, 3], [2, 6, 10])
    assert student.t == pytest.approx(welch.t) == pytest.approx(4 / sqrt(1 / 3 + 16 / 3))
    assert student.df == 4
    assert welch.df == pytest.approx((1 + 16) ** 2 / (1 / 2 + 256 / 2))


def test_an_arm_that_never_varies_can_still_be_tested_against_one_that_does():
    assert stats.welch_test(ALIKE, [0.4, 0.5, 0.6]).t == pytest.approx(0.2 / (0.1 / sqrt(3)))


def test_effect_sizes_by_hand():
    assert stats.cohens_d([1, 2, 3], [2, 3, 4]) == pytest.approx(1)
    assert stats.cohens_d([1, 3], [4, 4, 4, 4]) == pytest.approx(2 / sqrt(2 / 4))
    assert stats.cohens_dz([0, 0, 0], [1, 2, 3]) == pytest.approx(2)


@pytest.mark.parametrize("test", [stats.student_test, stats.welch_test, stats.cohens_d])
def test_runs_that_never_vary_leave_t_undefined(test):
    with pytest.raises(UserError, match="all alike"):
        test(ALIKE, [0.4, 0.4, 0.4])


@pytest.mark.parametrize("test", [stats.paired_test, stats.cohens_dz])
def test_pairs_that_differ_by_one_amount_up_to_rounding_leave_t_undefined(test):
    with pytest.raises(UserError, match="every pair differs by the same amount"):
        test([0.4, 0.5, 0.3], [0.5, 0.6, 0.4])


def test_ranks_of_arms_that_do_not_overlap():
    assert stats.mann_whitney_test([1, 2, 3], [4, 5, 6]) == stats.Outcome(9.0, pytest.approx(2 / 20))
    assert stats.mann_whitney_test([1, 2, 3], [4, 5, 6], "greater").p == pytest.approx(1 / 20)
    assert stats.wilcoxon_test([1, 2, 3], [2, 4, 6]).p == pytest.approx(2 / 8)


def test_equal_differences_are_tied_whatever_their_rounding():
    hundredths = [round(100 * x) for x in A], [round(100 * x) for x in B]
    assert 0.36 - 0.31 != 0.34 - 0.29
    assert stats.wilcoxon_test(A, B) == stats.wilcoxon_test(*hundredths)


def test_no_difference_at_all_is_not_evidence():
    assert stats.wilcoxon_test(ALIKE, ALIKE).p == 1.0
    assert stats.mann_whitney_test(ALIKE, ALIKE).p == 1.0
    assert stats.sign_flip_test(ALIKE, ALIKE).p_two_sided == 1.0


# ---- permutation


def tails(observed, null):
    """The shares of a null that are at most, at least, and as far from 0 as the observed value, ties within 1e-12."""
    n = len(null)
    return (
        sum(x <= observed + 1e-12 for x in null) / n,
        sum(x >= observed - 1e-12 for x in null) / n,
        sum(abs(x) >= abs(observed) - 1e-12 for x in null) / n,
    )


def test_sign_flips_go_through_every_sign():
    d = [b - a for a, b in zip(A, B, strict=True)]
    null = [sum(s * x for s, x in zip(signs, d, strict=True)) / 5 for signs in product((1, -1), repeat=5)]
    found = stats.sign_flip_test(A, B)
    assert (found.p_less, found.p_greater, found.p_two_sided) == tails(sum(d) / 5, null)
    assert (found.arrangements, found.exact) == (32, True)
    assert found.difference == pytest.approx(0.052)


@pytest.mark.parametrize("candidate", [B, [*B, 0.5, 0.2]])
def test_labels_go_through_every_deal(candidate):
    pool, n = A + candidate, len(A)
    null = []
    for chosen in combinations(range(len(pool)), n):
        rest = [pool[i] for i in range(len(pool)) if i not in chosen]
        null.append(sum(rest) / len(rest) - sum(pool[i] for i in chosen) / n)
    observed = sum(candidate) / len(candidate) - sum(A) / n
    found = stats.label_permutation_test(A, candidate)
    assert (found.p_less, found.p_greater, found.p_two_sided) == tails(observed, null)
    assert found.arrangements == comb(len(pool), n)


def test_the_two_two_sided_p_values_differ_between_arms_of_different_size():
    assert stats.label_permutation_test(A, B).p_doubled == stats.label_permutation_test(A, B).p_two_sided
    lopsided = stats.label_permutation_test([1, 2, 3, 4, 10], [11, 12])
    assert lopsided.p_doubled == pytest.approx(2 / 21)
    assert lopsided.p_two_sided == pytest.approx(1 / 21)


@pytest.mark.parametrize("pairs", range(2, 9))
def test_pairs_that_all_improve_reach_the_smallest_p_and_six_are_needed_for_5_percent(pairs):
    reached = stats.sign_flip_test([0] * pairs, range(1, pairs + 1)).p_two_sided
    assert reached == stats.smallest_sign_flip_p(pairs)
    assert (reached < 0.05) == (pairs >= 6)


def test_a_sampled_p_is_never_zero():
    flips = stats.sign_flip_test(range(30), range(100, 130), resamples=99)
    labels = stats.label_permutation_test(range(30), range(100, 130), resamples=99)
    assert flips.p_two_sided == labels.p_two_sided == 1 / 100
    assert not flips.exact
    assert not labels.exact


@pytest.mark.parametrize("rng", [None, np.random.default_rng(3), random.Random(3)])
def test_sampled_labels_come_close_to_all_of_them(rng):
    drawn = stats.label_permutation_test(A, B, resamples=4000, rng=rng)
    assert drawn.p_two_sided == pytest.approx(stats.label_permutation_test(A, B).p_two_sided, abs=0.02)


def test_sampled_signs_come_close_to_all_of_them():
    drawn = stats.sign_flip_test(A, B, resamples=4000)
    assert drawn.p_two_sided == pytest.approx(stats.sign_flip_test(A, B).p_two_sided, abs=0.02)
    assert drawn == stats.sign_flip_test(A, B, resamples=4000, rng=np.random.default_rng(0))


def test_more_arrangements_than_can_be_enumerated_need_a_sample():
    with pytest.raises(UserError, match="set resamples"):
        stats.sign_flip_test(range(18), range(18))
    with pytest.raises(UserError, match="set resamples"):
        stats.label_permutation_test(range(11), range(11))


def test_testing_after_every_pair_has_more_than_5_percent_false_positives():
    p = {
        (n, ups): stats.sign_flip_test([0] * n, [1] * ups + [-1] * (n - ups)).p_two_sided
        for n in range(6, 13)
        for ups in range(n + 1)
    }
    null = list(product((0, 1), repeat=12))
    at_the_end = sum(p[12, sum(signs)] <= 0.05 for signs in null) / len(null)
    after_any_pair = sum(any(p[n, sum(signs[:n])] <= 0.05 for n in range(6, 13)) for signs in null) / len(null)
    assert at_the_end <= 0.05 < after_any_pair
    assert "no optional stopping" in stats.STOPPING_RULE


# ---- bootstrap


def test_the_exhaustive_bootstrap_takes_every_resample():
    means = sorted(sum(draw) / 4 for draw in product(A[:4], repeat=4))
    found = stats.bootstrap_exhaustive(A[:4], level=0.9)
    assert found.resamples == 256
    assert found.se == pytest.approx(sqrt(sum((m - found.estimate) ** 2 for m in means) / 256))
    assert found.se == pytest.approx(stats.bootstrap_standard_error(A[:4]))
    assert (found.low, found.high) == pytest.approx((means[12], means[-13]))


@pytest.mark.parametrize("method", ["percentile", "basic", "BCa"])
def test_a_sampled_bootstrap_comes_close_to_the_exhaustive_one(method):
    sampled, exhaustive = stats.bootstrap_mean(A, method=method), stats.bootstrap_exhaustive(A)
    assert sampled.estimate == exhaustive.estimate
    assert sampled.se == pytest.approx(exhaustive.se, rel=0.03)
    assert (sampled.low, sampled.high) == pytest.approx((exhaustive.low, exhaustive.high), abs=0.02)


def test_the_basic_interval_is_the_percentile_one_mirrored_at_the_estimate():
    basic, percentile = stats.bootstrap_mean(A, method="basic"), stats.bootstrap_mean(A, method="percentile")
    assert basic.low == pytest.approx(2 * basic.estimate - percentile.high)
    assert basic.high == pytest.approx(2 * basic.estimate - percentile.low)


def test_pairs_are_resampled_together():
    baseline = [0.1, 0.5, 0.9, 0.3, 0.7]
    candidate = [x + gain for x, gain in zip(baseline, [0.1, 0.11, 0.09, 0.1, 0.12], strict=True)]
    paired = stats.bootstrap_difference(baseline, candidate, paired=True)
    unpaired = stats.bootstrap_difference(baseline, candidate, paired=False)
    assert paired.estimate == pytest.approx(unpaired.estimate) == pytest.approx(0.104)
    assert paired.se < unpaired.se / 10


def test_one_seed_gives_one_interval():
    assert stats.bootstrap_mean(A, rng=5) == stats.bootstrap_mean(A, rng=5)
    assert stats.bootstrap_mean(A, rng=5) != stats.bootstrap_mean(A, rng=6)


def test_runs_that_never_vary_have_a_percentile_interval_but_no_bca():
    assert stats.bootstrap_mean(ALIKE, method="percentile").high == pytest.approx(0.3)
    with pytest.raises(UserError, match="leaves BCa undefined"):
        stats.bootstrap_mean(ALIKE)


# ---- intervals of rates


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (3, 10), (10, 10), (421, 1600)])
def test_wilson_agrees_with_scipy(correct, total):
    found = stats.rate_interval(correct, total)
    other = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    assert (found.low, found.high) == pytest.approx((other.low, other.high), abs=1e-12)
    assert found.estimate == correct / total


def test_clopper_pearson_ends_where_a_tail_has_half_of_alpha():
    found = stats.rate_interval(3, 10, alpha=0.1, method="beta")
    assert sum(binomial(k, 10, found.low) for k in range(3, 11)) == pytest.approx(0.05)
    assert sum(binomial(k, 10, found.high) for k in range(4)) == pytest.approx(0.05)


@pytest.mark.parametrize("method", RATE_METHODS)
def test_an_interval_contains_its_rate(method):
    for correct in range(1, 10):
        found = stats.rate_interval(correct, 10, method=method)
        assert found.low < found.estimate < found.high


def test_only_the_normal_interval_has_no_width_without_a_success():
    widths = {m: stats.rate_interval(0, 10, method=m) for m in RATE_METHODS}
    assert [m for m, found in widths.items() if found.high == found.low] == ["normal"]


def test_newcombe_adds_the_squares_of_wilsons_margins():
    a, b = stats.rate_interval(5, 20), stats.rate_interval(18, 30)
    found = stats.rate_difference_interval(5, 20, 18, 30)
    assert found.estimate == pytest.approx(0.35)
    assert found.low == pytest.approx(0.35 - sqrt((0.6 - b.low) ** 2 + (a.high - 0.25) ** 2))
    assert found.high == pytest.approx(0.35 + sqrt((b.high - 0.6) ** 2 + (0.25 - a.low) ** 2))


@pytest.mark.parametrize("method", RATE_DIFFERENCE_METHODS)
def test_a_difference_of_rates_turns_its_sign_with_the_arms(method):
    there = stats.rate_difference_interval(0, 10, 3, 12, method=method)
    back = stats.rate_difference_interval(3, 12, 0, 10, method=method)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


# ---- clusters


def test_the_standard_error_by_problem_sees_problems_and_not_their_copies():
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 2, (3, 40)) for _ in range(2))
    once, copied = stats.clustered_difference(a, b), stats.clustered_difference(np.tile(a, (4, 1)), np.tile(b, (4, 1)))
    assert copied.se_by_problem == pytest.approx(once.se_by_problem)
    assert copied.se_iid == pytest.approx(once.se_iid / 2)


def test_clustered_difference_by_hand():
    found = stats.clustered_difference([[0, 0], [0, 1]], [[1, 0], [1, 1]])
    assert found.mean == 0.5
    assert found.per_run == (0.5, 0.5)
    assert found.se_by_run == 0.0
    assert found.se_by_problem == pytest.approx(0.5)  # means 1 and 0: SD sqrt(1/2), over sqrt(2)
    assert found.se_iid == pytest.approx(sqrt((3 / 16 + 3 / 16) / 4))


def test_answers_that_only_repeat_themselves_are_worth_one_each():
    scores = np.tile([0, 1] * 500, (8, 1))  # eight runs, the same answers
    assert stats.observed_design_effect(scores) == pytest.approx(8 * 1000 / 999)


def test_independent_answers_have_a_design_effect_of_about_one():
    scores = np.random.default_rng(1).integers(0, 2, (16, 4000))
    assert stats.observed_design_effect(scores) == pytest.approx(1, abs=0.1)


def test_sixteen_answers_a_problem_at_icc_0_3_are_worth_a_fifth():
    assert stats.design_effect(16, 0.3) == pytest.approx(5.5)
    assert stats.effective_answers(1600, 16, 0.3) == pytest.approx(1600 / 5.5)
    assert stats.design_effect(16, 0) == stats.design_effect(1, 1) == 1


# ---- power


def test_four_seeds_can_show_only_effects_of_more_than_two_standard_deviations():
    assert stats.detectable_with_runs(4) == pytest.approx(2.38, abs=0.005)
    assert stats.detectable_with_pairs(4) == pytest.approx(2.13, abs=0.005)


@pytest.mark.parametrize("effect", [0.2, 0.5, 1.0, 2.0, -0.5])
def test_a_sample_size_has_the_wanted_power(effect):
    assert stats.power_of_pairs(effect, stats.pairs_needed(effect)) == pytest.approx(0.8, abs=1e-4)
    assert stats.power_of_runs(effect, stats.runs_needed_per_arm(effect)) == pytest.approx(0.8, abs=1e-4)


@pytest.mark.parametrize("alpha", [0.2, 0.05, 1e-3, 1e-6])
@pytest.mark.parametrize("effect", [1e-12, 1e-4, 0.03, 0.7, 3.0, 8.0, 40.0, 1e4])
def test_every_effect_has_a_size_with_the_wanted_power(effect, alpha):
    """By Z - t sqrt(chi2 / df) over 20,001 quantiles of chi2."""
    for size, needed, df, shift in (
        (stats.pairs_needed, 1, lambda n: n - 1, lambda n: effect * sqrt(n)),
        (stats.runs_needed_per_arm, 2, lambda n: 2 * n - 2, lambda n: effect * sqrt(n / 2)),
    ):
        n = size(effect, alpha=alpha, power=0.9)
        s = np.sqrt(chi2.ppf((np.arange(20_001) + 0.5) / 20_001, df(n)) / df(n)) * t.isf(alpha / 2, df(n))
        power = (norm.sf(s - shift(n)) + norm.sf(s + shift(n))).mean()
        assert power > 0.9 if n == 2 else power == pytest.approx(0.9, abs=1e-3), (needed, n)


@pytest.mark.parametrize("alpha", [0.05, 1e-3, 1e-5])
@pytest.mark.parametrize("runs", [2, 3, 12, 100])
@pytest.mark.parametrize("power", [0.5, 0.8, 0.999])
def test_what_can_be_detected_is_found_with_the_wanted_power(runs, alpha, power):
    found = stats.detectable_with_pairs(runs, alpha=alpha, power=power)
    assert stats.power_of_pairs(found, runs, alpha=alpha) == pytest.approx(power, abs=1e-6)
    found = stats.detectable_with_runs(runs, alpha=alpha, power=power)
    assert stats.power_of_runs(found, runs, alpha=alpha) == pytest.approx(power, abs=1e-6)


def test_the_power_of_pairs_is_the_share_of_experiments_that_find_the_effect():
    d = np.random.default_rng(2).normal(1.0, 1.0, (20_000, 6))
    t = d.mean(axis=1) / (d.std(axis=1, ddof=1) / sqrt(6))
    assert stats.power_of_pairs(1.0, 6) == pytest.approx((np.abs(t) > 2.570581835636314).mean(), abs=0.01)


def test_no_effect_is_found_once_in_twenty():
    assert stats.power_of_runs(0.0, 5) == pytest.approx(0.05)


def test_the_normal_formula_asks_for_too_few_runs():
    assert stats.runs_needed_per_arm_normal(2.0) == pytest.approx(2 * ((1.959964 + 0.841621) / 2) ** 2, rel=1e-6)
    assert stats.runs_needed_per_arm_normal(2.0) < stats.runs_needed_per_arm(2.0) - 1


def test_two_runs_are_the_least_however_large_the_effect():
    assert stats.pairs_needed(1000) == stats.runs_needed_per_arm(1000) == 2


def test_answers_needed_by_hand():
    p, q = sqrt(2 * 0.55 * 0.45), sqrt(0.5 * 0.5 + 0.6 * 0.4)
    by_hand = ((1.959964 * p + 0.841621 * q) / 0.1) ** 2
    assert stats.answers_needed_per_arm_pooled_z(0.5, 0.6) == pytest.approx(by_hand, rel=1e-6)
    assert stats.answers_needed_per_arm_pooled_z(0.6, 0.5) == pytest.approx(by_hand, rel=1e-6)
    assert stats.answers_needed_per_arm(0.5, 0.6) == pytest.approx(by_hand, rel=1e-3)


def test_cohens_h_spans_pi_from_never_to_always():
    assert stats.cohens_h(0, 1) == pytest.approx(np.pi)
    assert stats.cohens_h(0.4, 0.3) < 0


# ---- several tests


def test_holm_and_benjamini_hochberg_by_hand():
    p = [0.04, 0.01, 0.03]
    assert stats.correct_p_values(p, method="holm").p == pytest.approx((0.06, 0.03, 0.06))
    assert stats.correct_p_values(p, method="fdr_bh").p == pytest.approx((0.04, 0.03, 0.04))
    assert stats.correct_p_values(p, method="bonferroni").p == pytest.approx((0.12, 0.03, 0.09))
    assert stats.correct_p_values(p, method="sidak").p == pytest.approx([1 - (1 - x) ** 3 for x in p])


@pytest.mark.parametrize("method", CORRECTIONS)
def test_every_correction_takes_p_values_from_0_to_1(method):
    found = stats.correct_p_values([0.0, 0.01, 0.5, 1.0], method=method)
    assert found.reject == (True, True, False, False)
    assert all(0 <= p <= 1 for p in found.p)


# ---- curves


def test_a_curve_is_summed_up_by_hand():
    found = stats.summarize_curve([0.1, 0.2, 0.4, 0.3], last=2)
    assert (found.auc, found.final, found.best, found.mean_last) == pytest.approx((0.8 / 3, 0.3, 0.4, 0.35))


def test_the_area_weighs_points_by_the_steps_between_them():
    assert stats.summarize_curve([0, 1, 1], steps=[0, 10, 100]).auc == pytest.approx(0.95)
    assert stats.summarize_curve([0.7]).auc == 0.7


# ---- arguments that cannot work


REFUSED = {
    "shape": (lambda: stats.student_test([0.3], B), "baseline has shape"),
    "matrix": (lambda: stats.bootstrap_mean([A, B]), "values has shape"),
    "nan": (lambda: stats.welch_test(A, [0.1, float("nan")]), "candidate contains nan"),
    "unpaired": (lambda: stats.sign_flip_test(A, B[:4]), "give the same seeds to both"),
    "level": (lambda: stats.paired_test(A, B, level=95), "level is 95"),
    "alternative": (lambda: stats.wilcoxon_test(A, B, "bigger"), "no alternative 'bigger'"),
    "rank method": (lambda: stats.mann_whitney_test(A, B, method="fast"), "no Mann-Whitney method 'fast'"),
    "wilcoxon method": (lambda: stats.wilcoxon_test(A, B, method="fast"), "no Wilcoxon method 'fast'"),
    "table": (lambda: stats.fisher_test([[1, 2, 3]]), "a row per arm"),
    "negative table": (lambda: stats.barnard_test([[1, -1], [2, 2]]), "a row per arm"),
    "ragged table": (lambda: stats.fisher_test([[1, 2], [3]]), "a row per arm"),
    "half an answer": (lambda: stats.fisher_test([[1.5, 2], [3, 4]]), "a row per arm"),
    "no number": (lambda: stats.barnard_test([[float("nan"), 2], [3, 4]]), "a row per arm"),
    "endless": (lambda: stats.fisher_test([[float("inf"), 2], [3, 4]]), "a row per arm"),
    "beyond counting": (lambda: stats.fisher_test([[1e20, 2], [3, 4]]), "a row per arm"),
    "marks": (lambda: stats.fisher_test([[True, False], [True, True]]), "a row per arm"),
    "words": (lambda: stats.barnard_test([["1", "2"], ["3", "4"]]), "a row per arm"),
    "nothing": (lambda: stats.fisher_test([[None, 2], [3, 4]]), "a row per arm"),
    "half a problem": (lambda: stats.mcnemar_test(0.5, 3), "the counts are 0.5 and 3"),
    "unknown problems": (lambda: stats.mcnemar_test(1, float("nan")), "the counts are 1 and nan"),
    "half of a rate": (lambda: stats.rate_interval(1.5, 3), "1.5 of 3 is not a rate"),
    "part of a total": (lambda: stats.pooled_z_test(1, 2.5, 1, 2), "1 of 2.5 is not a rate"),
    "unknown total": (lambda: stats.rate_difference_interval(1, 2, 1, float("nan")), "1 of nan is not a rate"),
    "half a sample": (lambda: stats.pass_at_k(4, 1.5, 1), "whole numbers of samples"),
    "half of k": (lambda: stats.plug_in_pass_at_k(4, 1, 1.5), "whole numbers of samples"),
    "mcnemar": (lambda: stats.mcnemar_test(-1, 3), "the counts are -1 and 3"),
    "mcnemar method": (lambda: stats.mcnemar_test(1, 3, "mid"), "did you mean 'mid-p'"),
    "rate": (lambda: stats.rate_interval(3, 2), "3 of 2 is not a rate"),
    "no answers": (lambda: stats.rate_interval(0, 0), "0 of 0 is not a rate"),
    "z": (lambda: stats.pooled_z_test(1, 2, 3, 2), "3 of 2 is not a rate"),
    "rate method": (lambda: stats.rate_interval(1, 2, method="wilsen"), "did you mean 'wilson'"),
    "difference": (lambda: stats.rate_difference_interval(1, 2, 1, 2, method="score"), "choose one of"),
    "resamples": (lambda: stats.bootstrap_mean(A, resamples=10), "resamples is 10"),
    "no resamples": (lambda: stats.sign_flip_test(A, B, resamples=0), "resamples is 0"),
    "bootstrap": (lambda: stats.bootstrap_mean(A, method="bca"), "no bootstrap method 'bca'"),
    "exhaustive": (lambda: stats.bootstrap_exhaustive(range(8)), "use bootstrap_mean above 7"),
    "pairs": (lambda: stats.smallest_sign_flip_p(0), "pairs is 0"),
    "scores": (lambda: stats.clustered_difference([[1, 0]], [[1, 0]]), "at least two of each"),
    "other scores": (lambda: stats.clustered_difference(np.eye(2), np.eye(3)), "the same runs and problems"),
    "constant": (lambda: stats.observed_design_effect(np.ones((2, 2))), "every score is 1.0"),
    "icc": (lambda: stats.design_effect(0.5, 0.1), "the cluster size is 0.5"),
    "effect": (lambda: stats.pairs_needed(0.0), "the effect is 0.0"),
    "same rates": (lambda: stats.answers_needed_per_arm(0.3, 0.3), "the effect is 0.0"),
    "h": (lambda: stats.cohens_h(0.3, 30), "p2 is 30"),
    "power": (lambda: stats.pairs_needed(1.0, power=0.01), "set it above alpha"),
    "alpha": (lambda: stats.power_of_runs(1.0, 5, alpha=5), "alpha is 5"),
    "one run": (lambda: stats.power_of_pairs(1.0, 1), "pairs is 1"),
    "correction": (lambda: stats.correct_p_values([0.1], method="bh"), "no correction 'bh'"),
    "p": (lambda: stats.correct_p_values([1.2]), "from 0 to 1"),
    "last": (lambda: stats.summarize_curve([1, 2], last=3), "last is 3"),
    "steps": (lambda: stats.summarize_curve([1, 2], steps=[1, 1]), "in rising order"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_cannot_work_are_refused(name):
    call, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        call()


def test_without_statsmodels_the_error_has_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "statsmodels.stats.proportion", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'textpolicy\[analysis\]'"):
        stats.rate_interval(1, 2)


def test_importing_the_statistics_does_not_import_statsmodels():
    code = "import sys, textpolicy.analysis; sys.exit('statsmodels' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
