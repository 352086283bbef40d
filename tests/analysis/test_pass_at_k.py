"""pass@k and pass^k against drawing every subset of the samples."""

from itertools import combinations
from statistics import fmean

import pytest

from textpolicy.analysis import mean_pass_at_k, mean_pass_hat_k, pass_at_k, pass_hat_k, plug_in_pass_at_k
from textpolicy.errors import UserError

CASES = [(n, c, k) for n in range(1, 7) for c in range(n + 1) for k in range(1, n + 1)]


def test_every_subset_of_k_samples_counts_once():
    for n, c, k in CASES:
        subsets = list(combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(fmean(map(any, subsets)), rel=1e-15), (n, c, k)
        assert pass_hat_k(n, c, k) == pytest.approx(fmean(map(all, subsets)), rel=1e-15), (n, c, k)


def test_a_rare_success_among_many_samples_keeps_its_digits():
    assert pass_at_k(10**6, 1, 1) == 1e-6
    assert pass_at_k(10**5, 1, 10**4) == 0.1


def test_the_plug_in_estimate_is_never_above_the_unbiased_one():
    for n, c, k in CASES:
        assert plug_in_pass_at_k(n, c, k) <= pass_at_k(n, c, k) + 1e-15, (n, c, k)


def test_the_plug_in_estimate_treats_samples_as_endless():
    assert plug_in_pass_at_k(2, 1, 2) == 0.75
    assert pass_at_k(2, 1, 2) == 1.0


def test_the_mean_weighs_problems_alike_whatever_their_number_of_samples():
    assert mean_pass_at_k([2, 4], [1, 4], 1) == 0.75
    assert mean_pass_hat_k([2, 4], [1, 4], 2) == 0.5


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [
        (4, 2, 5, "k is 5 with 4 samples"),
        (4, 2, 0, "k is 0 with 4 samples"),
        (0, 0, 1, "k is 1 with 0 samples"),
        (4, 5, 1, "5 of 4 samples correct is impossible"),
        (4, -1, 1, "-1 of 4 samples correct is impossible"),
    ],
)
def test_every_estimate_refuses_impossible_counts(n, c, k, message):
    for estimate in (pass_at_k, pass_hat_k, plug_in_pass_at_k):
        with pytest.raises(UserError, match=message):
            estimate(n, c, k)


def test_a_mean_needs_both_counts_of_every_problem():
    for mean in (mean_pass_at_k, mean_pass_hat_k):
        for n, c in (([], []), ([4], [1, 2])):
            with pytest.raises(UserError, match="at least one problem"):
                mean(n, c, 1)


def test_a_mean_refuses_a_problem_with_too_few_samples():
    with pytest.raises(UserError, match="k is 4 with 2 samples"):
        mean_pass_at_k([8, 2], [1, 1], 4)
