"""The start gate: the predicted share of groups that disagree against the measured one, and the advice."""

from types import SimpleNamespace

import numpy as np
import pytest

from textpolicy.errors import UserError
from textpolicy.loop.evaluation import Evaluation
from textpolicy.loop.start_gate import StartGate


def sampled(rates, n, rng):
    """n judged samples of problems that are solved with the given probabilities."""
    return Evaluation(
        [SimpleNamespace(group=g, is_correct=bool(right)) for g, p in enumerate(rates) for right in rng.random(n) < p]
    )


def test_the_predicted_share_of_informative_groups_is_the_measured_one():
    rng = np.random.default_rng(1)
    rates, size = rng.beta(0.4, 1.5, 400), 8
    expected = np.mean(1 - rates**size - (1 - rates) ** size)
    predicted = [StartGate.of(sampled(rates, 16, rng), size).informative.value for _ in range(30)]
    assert np.mean(predicted) == pytest.approx(expected, abs=0.01)  # without bias, though p is known from 16 alone
    groups = rng.random((400, size)) < rates[:, None]
    measured = np.mean(groups.any(axis=1) & ~groups.all(axis=1))
    assert predicted[0] == pytest.approx(measured, abs=0.08)


@pytest.mark.parametrize(
    ("rate", "stage", "words"),
    [
        (0.0, "sft", 'kind = "sft", or kind = "distill" with a teacher, before one of kind = "rl"'),
        (0.02, "rft", 'put [[stage]] kind = "rft" before one of kind = "rl"'),
        (0.3, "rl", "begin with rl"),
        (1.0, "", "little left to learn"),
    ],
)
def test_the_advice_is_the_stage_to_begin_with(rate, stage, words):
    gate = StartGate.of(sampled([rate] * 300, 16, np.random.default_rng(2)), 8)
    assert gate.stage == stage
    assert words in gate.advice


def test_fewer_samples_than_a_group_has_are_refused():
    with pytest.raises(UserError, match="has 4 judged samples and a group 8 completions"):
        StartGate.of(sampled([0.5], 4, np.random.default_rng(0)), 8)
