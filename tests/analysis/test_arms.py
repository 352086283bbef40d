"""Arms against a baseline: tests, intervals, power and advice, against slow loops and hand-worked tables."""

from itertools import combinations, product
from math import comb, inf, isclose, isnan

import numpy as np
import pytest
from scipy.stats import ttest_ind

from textpolicy import analysis
from textpolicy.analysis.comparison import DECLINE, IMPROVEMENT, INSUFFICIENT
from textpolicy.analysis.sequential import smallest_anytime_p
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


@pytest.mark.parametrize(("alpha", "pairs"), [(0.01, 9), (0.01, 12), (0.002, 11), (0.002, 14), (0.0005, 12)])
def test_at_a_small_alpha_power_is_that_of_the_few_signs_that_count(alpha, pairs):
    """Counted by the sums of subsets that are at most 0: flipping those makes the mean no smaller."""
    effect = analysis.detectable_by_sign_flips(pairs, alpha=alpha)
    assert analysis.smallest_sign_flip_p(pairs) <= alpha
    subsets = (np.arange(2**pairs)[:, None] >> np.arange(pairs)) & 1
    found = []
    for d in np.random.default_rng(9).normal(effect, 1, (600, pairs)):
        found.append(min(1, 2 * (subsets @ (d if d.sum() > 0 else -d) <= 0).sum() / 2**pairs) <= alpha)
    assert np.mean(found) == pytest.approx(0.8, abs=0.06)
    assert analysis.pairs_needed_by_sign_flips(0.9 * effect, alpha=alpha) > pairs
    assert analysis.pairs_needed_by_sign_flips(1.2 * effect, alpha=alpha) <= pairs


@pytest.mark.parametrize("alpha", [0.2, 0.05 / 3, 0.001])
@pytest.mark.parametrize("effect", [1e-15, 1.0, 50.0])
def test_every_effect_has_a_number_of_runs(alpha, effect):
    pairs = analysis.pairs_needed_by_sign_flips(effect, alpha=alpha)
    assert analysis.smallest_sign_flip_p(min(pairs, 1000)) <= alpha
    assert analysis.power_of_sign_flips(effect, pairs, alpha=alpha) >= 0.79
    runs = analysis.runs_needed_by_labels(effect, alpha=alpha)
    assert 2 / comb(2 * min(runs, 1000), min(runs, 1000)) <= alpha
    assert analysis.power_of_labels(effect, runs, alpha=alpha) >= 0.79


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


@pytest.mark.parametrize("shift", [0.0, 0.1, -0.25])
@pytest.mark.parametrize("stopping", ["fixed", "anytime"])
@pytest.mark.parametrize("seeds", [2, 6, 9, 20])
def test_seeds_that_all_agree_have_no_interval_of_no_width(shift, stopping, seeds):
    a = dict(enumerate(np.random.default_rng(seeds).random(seeds)))
    b = {seed: value + shift for seed, value in a.items()}
    c = analysis.compare(a, b, analysis.Question(stopping=stopping))
    assert (c.interval.low, c.interval.high, c.bootstrap) == (-inf, inf, None)
    assert isnan(c.detectable) == (c.detectable != inf) == (seeds >= 6)
    assert (c.p <= 0.05) == (seeds >= 6 and shift != 0)
    unpaired = analysis.compare(dict.fromkeys(a, 0.5), dict.fromkeys(a, 0.5 + shift), paired=False)
    assert (unpaired.interval.low, unpaired.interval.high, unpaired.bootstrap) == (-inf, inf, None)


def equal_on_average(rng, seeds):
    """Two arms of shares of 100 whose sums are the same and whose pairs are not."""
    a = rng.integers(20, 80, seeds)
    moved = rng.integers(-9, 10, seeds)
    moved[-1] -= moved.sum()
    return dict(enumerate(a / 100)), dict(enumerate((a + moved) / 100))


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("stopping", ["fixed", "anytime"])
def test_differences_that_cancel_are_none(paired, stopping):
    rng = np.random.default_rng(3)
    for _ in range(12):
        a, b = equal_on_average(rng, int(rng.integers(2, 12)))
        if stopping == "fixed" or paired:
            c = analysis.compare(a, b, analysis.Question(stopping=stopping), paired=paired)
            assert (c.difference, c.runs_needed, c.recommendation) == (0.0, None, INSUFFICIENT)


@pytest.mark.parametrize("size", [1e-14, 1e-9, 1e-5])
def test_a_difference_however_small_has_a_verdict(size):
    a = {seed: 0.5 + 0.05 * (-1) ** seed for seed in range(8)}
    b = {seed: 0.5 - 0.05 * (-1) ** seed + size for seed in a}
    c = analysis.compare(a, b)
    assert c.recommendation == INSUFFICIENT
    assert c.runs_needed is None if size < 1e-12 else c.runs_needed > 100_000


@pytest.mark.parametrize(("arms", "seeds"), [(3, 6), (5, 7), (9, 8)])
@pytest.mark.parametrize("stopping", ["fixed", "anytime"])
def test_what_no_result_can_show_among_so_many_arms_is_not_said_to_be_found(arms, seeds, stopping):
    """However large and sure the differences, the least p of so few pairs, adjusted, is above alpha."""
    rng = np.random.default_rng(arms)
    base = dict(enumerate(rng.random(seeds)))
    values = {"base": base}
    for n in range(1, arms):
        values[str(n)] = {s: v + 10.0**s * (1 + rng.random()) for s, v in base.items()}
    found = analysis.compare_arms(values, "base", analysis.Question(stopping=stopping))
    assert all(c.recommendation == INSUFFICIENT and c.detectable == inf for c in found)
    alone = analysis.compare(base, values["1"], analysis.Question(stopping=stopping))
    assert alone.recommendation == IMPROVEMENT
    assert alone.detectable < inf


@pytest.mark.parametrize(("arms", "seeds"), [(3, 8), (4, 9)])
def test_what_is_detectable_among_arms_is_found_after_holms_correction(arms, seeds):
    """Whatever the other arms show: here they differ by nothing."""
    rng = np.random.default_rng(seeds)
    family = arms - 1
    effect = analysis.detectable_by_sign_flips(seeds, alpha=0.05 / family)
    p = analysis.sign_flip_p_values(
        rng.standard_normal((family * 3000, seeds)) + np.tile([effect] + [0] * (family - 1), 3000)[:, None]
    )
    found = [holm(row)[0] <= 0.05 for row in p.reshape(3000, family)]
    assert 0.78 <= np.mean(found) <= 0.86
    base = dict(enumerate(rng.standard_normal(seeds)))
    values = {n: {s: v + rng.normal(0.1) for s, v in base.items()} for n in range(family)}
    c = analysis.compare_arms({"base": base, **values}, "base")[0]
    assert c.detectable == pytest.approx(c.sd * effect, abs=0.011 * c.sd)
    assert c.runs_needed == analysis.pairs_needed_by_sign_flips(c.difference / c.sd, alpha=0.05 / family)


def holm(p):
    """Each p times the number of those not below it, and never below an adjusted smaller one."""
    adjusted, largest = np.empty(len(p)), 0.0
    for rank, i in enumerate(np.argsort(p)):
        largest = max(largest, min(1.0, p[i] * (len(p) - rank)))
        adjusted[i] = largest
    return adjusted


def test_the_least_p_of_an_anytime_test_is_never_passed():
    rng = np.random.default_rng(4)
    for pairs in range(1, 12):
        growing = [1 / slow_e(1e9 ** np.arange(pairs))] if pairs < 12 else []
        tried = [analysis.anytime_test(np.zeros(pairs), np.abs(rng.standard_cauchy(pairs))).p for _ in range(50)]
        least = smallest_anytime_p(pairs)
        assert min(1.0, growing[0]) == pytest.approx(min(1.0, least), rel=1e-6)
        assert min(tried) >= min(1.0, least) * (1 - 1e-9)
    assert smallest_anytime_p(5) > 0.05 >= smallest_anytime_p(6)


def test_an_anytime_interval_of_pairs_that_drift_apart_is_none():
    d = np.random.default_rng(6).normal(0, 0.01, 60) + np.repeat([1, -1], 30)
    found = analysis.anytime_interval(d)
    assert (found.low, found.high) == (-inf, inf)


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
        (lambda: analysis.Question(alpha=0.6, power=0.5), "power is 0.5 with alpha 0.6"),
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
