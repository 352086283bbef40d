"""The evaluation of a policy on problems it was not trained on, with intervals over problems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit  # scipy.stats, which has them as norm.ppf and t.ppf, takes long to import

from ..engine import Engine, Sampling
from ..environment.base import DrivenEnv
from ..environment.single_turn import TextGenerationEnv
from ..errors import UserError
from ..types import Episode
from .collect import collect
from .pass_at_k import pass_at_k


@dataclass(frozen=True)
class Rate:
    """The share of problems solved, with its 95% Wilson interval."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        """The share, 0 to 1."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The ends of the interval (Newcombe, 1998)."""
        n, p, z = self.total, self.value, float(ndtri(0.975))
        twice = 2 * (n + z**2)
        center, half = (2 * n * p + z**2) / twice, z / twice * math.sqrt(4 * n * p * (1 - p) + z**2)
        return center - half if self.correct else 0.0, center + half if self.correct < n else 1.0

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} [{low:.1%}, {high:.1%}]"


@dataclass(frozen=True)
class Estimate:
    """The mean over problems of shares from 0 to 1, with its 95% interval over problems."""

    value: float
    interval: tuple[float, float]
    problems: int

    @classmethod
    def over(cls, shares: Sequence[float], samples: int) -> Estimate:
        """Return the estimate from (N,) ``shares``, each of so many ``samples``."""
        x = np.asarray(shares, float)
        return cls(float(x.mean()), clustered_interval(x, samples), len(x))

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} [{low:.1%}, {high:.1%}]"


@dataclass(frozen=True)
class Evaluation:
    """The completions of an environment's prompts, equally many of each."""

    episodes: Sequence[Episode]

    @property
    def accuracy(self) -> Rate:
        """The share of correct completions, one of each problem. Raises UserError."""
        judged = self.judged()
        if any(len(answers) > 1 for answers in judged):
            raise UserError("accuracy is of one completion per problem and there are more; use average, or pass_at(k)")
        return Rate(sum(answers[0] for answers in judged), len(judged))

    @property
    def average(self) -> Estimate:
        """The avg@n: the share of correct completions, n of each problem, averaged over problems."""
        judged = self.judged()
        return Estimate.over([sum(answers) / len(answers) for answers in judged], len(judged[0]))

    def pass_at(self, k: int) -> Estimate:
        """Return pass@k, unbiased: the chance that k completions of a problem include a correct one, averaged.

        Raises UserError for a k above the number of completions.
        """
        judged = self.judged()
        return Estimate.over([pass_at_k(len(answers), sum(answers), k) for answers in judged], len(judged[0]))

    def judged(self) -> list[list[bool]]:
        """Return which completions of each problem are correct, without problems that have none judged.

        Raises UserError where no completion at all is judged.
        """
        answers: dict[int, list[bool]] = {}
        for e in self.episodes:
            if e.is_correct is not None:
                answers.setdefault(e.group, []).append(e.is_correct)
        if not answers:
            if self.episodes and all(math.isnan(e.reward) for e in self.episodes):
                raise UserError(
                    f"none of {len(self.episodes)} held-out completions could be scored; the log above says why "
                    "(raise the reward's time_limit, or fix it)"
                )
            raise UserError(
                "the reward never says whether a completion is correct; "
                'return {"reward": ..., "is_correct": ...} from it to measure accuracy, or set rewards.correct_from to '
                "the reward that is enough"
            )
        return list(answers.values())


def evaluate(engine: Engine, env: TextGenerationEnv | DrivenEnv, sampling: Sampling, samples: int = 1) -> Evaluation:
    """Answer every prompt of ``env`` ``samples`` times, greedily if ``sampling.temperature`` is 0.

    Raises UserError for several greedy samples, which are all the same.
    """
    if samples < 1:
        raise UserError(f"samples is {samples}; set it to 1 or more")
    if samples > 1 and sampling.temperature == 0:
        raise UserError(f"{samples} samples at temperature 0 are all the same; set a temperature above 0, or 1 sample")
    return Evaluation(collect(engine, env, range(len(env)), samples, sampling, pieces=False))


def clustered_interval(shares: np.ndarray, samples: int) -> tuple[float, float]:
    """Return Wilson's 95% interval for the mean p of (N,) shares of problems, at the effective sample size m.

    m = p (1 - p) / (s^2 / N) (z / t)^2, with s^2 the variance of the shares over problems (Kish, 1965), and z and t the
    97.5% quantiles of the normal and of Student's t with N - 1 df, because s^2 is known from N problems alone (Korn and
    Graubard, 1998). m lies between N, where all answers to a problem agree, and N times ``samples``. One problem says
    nothing of others: its interval is all of 0 to 1.
    """
    n, p, z = len(shares), float(shares.mean()), float(ndtri(0.975))
    if n == 1:
        return 0.0, 1.0
    of_mean = float(shares.var(ddof=1)) / n
    effective = p * (1 - p) / of_mean if of_mean > 0 else n * samples if 0 < p < 1 else n
    m = min(max(min(effective, n * samples) * (z / float(stdtrit(n - 1, 0.975))) ** 2, n), n * samples)
    center = (p + z * z / (2 * m)) / (1 + z * z / m)
    half = z / (1 + z * z / m) * math.sqrt(p * (1 - p) / m + z * z / (4 * m * m))
    return max(0.0, center - half), min(1.0, center + half)
