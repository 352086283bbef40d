"""Evaluation: one sample or many, unbiased pass@k, and intervals whose unit is the problem."""

from dataclasses import replace
from itertools import combinations
from statistics import mean

import numpy as np
import pytest

from textpolicy.engine import Sampling
from textpolicy.environment import TextGenerationEnv
from textpolicy.errors import UserError
from textpolicy.loop.evaluation import Estimate, Evaluation, Rate, clustered_interval, evaluate
from textpolicy.types import Completion, Episode


def answered(*answers):
    """An evaluation with the given answers (True, False or None) to each problem."""
    output = Completion(np.array([5], np.int32), np.zeros(1, np.float32))
    return Evaluation(
        [
            Episode.from_completion([1], output, reward=0.0, group=group, is_correct=right)
            for group, group_answers in enumerate(answers)
            for right in group_answers
        ]
    )


# ---- figures


def test_accuracy_is_of_one_answer_to_each_problem():
    assert answered([True], [False], [True], [None]).accuracy == Rate(2, 3)
    with pytest.raises(UserError, match="use average, or pass_at"):
        _ = answered([True, False]).accuracy
    with pytest.raises(UserError, match="never says whether"):
        _ = answered([None]).accuracy


def test_unscorable_answers_are_reported_as_unscorable():
    late = Evaluation([replace(e, reward=np.nan) for e in answered([None], [None]).episodes])
    with pytest.raises(UserError, match="none of 2 held-out completions could be scored"):
        _ = late.accuracy


def test_average_and_pass_at_k_by_counting_all_choices():
    answers = [[True, False, False, False], [False] * 4, [True, True, True, False]]
    result = answered(*answers)
    assert result.average.value == pytest.approx(mean([1 / 4, 0, 3 / 4]))
    for k in (1, 2, 3, 4):
        chosen = [mean(any(choice) for choice in combinations(a, k)) for a in answers]
        assert result.pass_at(k).value == pytest.approx(mean(chosen))
    with pytest.raises(UserError, match="k is 5"):
        result.pass_at(5)


def test_one_sample_of_each_has_the_interval_of_a_rate():
    result = answered(*[[i % 3 == 0] for i in range(60)])
    assert result.average.value == result.accuracy.value
    assert result.average.interval == pytest.approx(result.accuracy.interval, abs=1e-12)


def test_no_interval_is_a_point():
    for share in (0.0, 1.0):
        low, high = clustered_interval(np.full(20, share), 8)
        assert high - low == pytest.approx(
            Rate(20 * int(share), 20).interval[1] - Rate(20 * int(share), 20).interval[0]
        )
    low, high = clustered_interval(np.full(200, 0.5), 8)  # each problem right half of the time
    assert (low, high) == pytest.approx(Rate(800, 1600).interval, abs=5e-4)


@pytest.mark.parametrize("share", [0.0, 1 / 64, 0.5, 1.0])
def test_one_problem_says_nothing_and_two_that_agree_little(share):
    assert clustered_interval(np.array([share]), 64) == (0.0, 1.0)
    low, high = clustered_interval(np.full(2, share), 64)
    assert high - low > 0.5


def test_more_samples_never_widen_and_cannot_beat_the_problems():
    """Problems that are always or never solved tell as much with 64 samples as with one."""
    hard = np.array([0.0, 1.0] * 25)
    assert clustered_interval(hard, 64) == pytest.approx(clustered_interval(hard, 1))
    rng = np.random.default_rng(0)
    soft = [rng.binomial(n, 0.4, 50) / n for n in (1, 4, 16)]
    widths = [np.diff(clustered_interval(x, n))[0] for x, n in zip(soft, (1, 4, 16), strict=True)]
    assert widths[0] > widths[1] > widths[2]


@pytest.mark.parametrize(("a", "b", "problems", "samples"), [(2.0, 2.0, 3, 64), (0.4, 0.6, 4, 16), (5.0, 5.0, 6, 8)])
def test_the_interval_of_a_few_problems_covers_the_truth(a, b, problems, samples):
    rng = np.random.default_rng(2)
    shares = rng.binomial(samples, rng.beta(a, b, (1500, problems))) / samples
    covered = [low <= a / (a + b) <= high for low, high in (clustered_interval(x, samples) for x in shares)]
    assert np.mean(covered) > 0.925


@pytest.mark.parametrize(("a", "b"), [(0.4, 0.6), (2.0, 2.0), (0.2, 2.0)])
def test_the_interval_covers_the_truth_and_pretending_independence_does_not(a, b):
    """1,500 evaluations of 40 problems, 8 samples of each; the truth is the mean of Beta(a, b)."""
    rng = np.random.default_rng(1)
    covered = naive = 0
    for _ in range(1500):
        correct = rng.binomial(8, rng.beta(a, b, 40))
        low, high = clustered_interval(correct / 8, 8)
        covered += low <= a / (a + b) <= high
        low, high = Rate(int(correct.sum()), 320).interval
        naive += low <= a / (a + b) <= high
    assert covered / 1500 > 0.925
    assert naive / 1500 < 0.85


def test_an_estimate_is_printed_with_its_interval():
    assert str(Estimate(0.5, (0.25, 0.75), 10)) == "50.0% [25.0%, 75.0%]"


# ---- on an engine


class Ids:
    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))


def even(prompt, completion, example):
    right = int(completion.split()[0]) % 2 == 0 if completion else False
    return float(right), right


def test_every_prompt_is_answered_so_many_times(tiny_engine):
    env = TextGenerationEnv(["1 2", "3", "4 5"], even, max_tokens=3, tokenizer=Ids())
    result = evaluate(tiny_engine, env, Sampling(3, seed=4), samples=6)
    assert [len(a) for a in result.judged()] == [6, 6, 6]
    assert result.average.value == pytest.approx(mean(e.reward for e in result.episodes))
    assert result.average.value <= result.pass_at(3).value <= result.pass_at(6).value
    again = evaluate(tiny_engine, env, Sampling(3, seed=4), samples=6)
    assert [e.text for e in again.episodes] == [e.text for e in result.episodes]
    greedy = evaluate(tiny_engine, env, Sampling(3, temperature=0.0))
    assert greedy.accuracy.total == 3


def test_several_greedy_samples_are_refused(tiny_engine):
    env = TextGenerationEnv(["1 2"], even, max_tokens=3, tokenizer=Ids())
    with pytest.raises(UserError, match="2 samples at temperature 0 are all the same"):
        evaluate(tiny_engine, env, Sampling(3, temperature=0.0), samples=2)
    with pytest.raises(UserError, match="samples is 0"):
        evaluate(tiny_engine, env, Sampling(3), samples=0)
