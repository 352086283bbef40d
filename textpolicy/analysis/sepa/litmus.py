"""Check quickly whether a candidate is worth a campaign: thresholds on differences, without an error model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from math import isnan
from pathlib import Path
from typing import Any

from ...errors import unknown_name
from ..plain import plain
from .emergence_runs import EmergenceGroupStats, aggregate_group_stats, load_emergence_run_stats

CONFIRMED, FAILED, INCONCLUSIVE = "CONFIRMED", "FAILED", "INCONCLUSIVE"
_LOGGED = ("runs", "steps", "generations", "gram pairs")  # as in SEPALitmusEvidence


@dataclass(frozen=True, slots=True)
class SEPALitmusThresholds:
    """The least gains of the candidate's means."""

    reward: float = 0.01
    correct_rate: float = 0.005
    gram_entropy_delta: float = 0.01  # nats


@dataclass(frozen=True, slots=True)
class SEPALitmusEvidence:
    """The least that each arm must have logged for a status other than INCONCLUSIVE."""

    run_pairs: int = 1
    steps: int = 8
    generations: int = 32
    gram_pairs: int = 8


@dataclass(frozen=True, slots=True)
class SEPALitmusProfile:
    """The thresholds and the evidence of a named profile."""

    name: str
    thresholds: SEPALitmusThresholds
    evidence: SEPALitmusEvidence


@dataclass(frozen=True, slots=True)
class SEPALitmusResult:
    """The status CONFIRMED, FAILED or INCONCLUSIVE, with its reasons and numbers."""

    status: str
    reasons: tuple[str, ...]
    baseline: EmergenceGroupStats
    candidate: EmergenceGroupStats
    reward_gain: float
    correct_rate_gain: float
    gram_entropy_delta_gain: float
    thresholds: SEPALitmusThresholds
    evidence: SEPALitmusEvidence

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; NaN becomes None."""
        return plain(self)


_OFFICIAL = SEPALitmusProfile("official_v1", SEPALitmusThresholds(gram_entropy_delta=0.005), SEPALitmusEvidence())
_PROFILES = {"official_v1": _OFFICIAL, "official": _OFFICIAL, "default": _OFFICIAL}


def get_sepa_litmus_profile(name: str) -> SEPALitmusProfile:
    """Return the profile called ``name``. Raises UserError for an unknown one."""
    if name not in _PROFILES:
        raise unknown_name("litmus profile", name, _PROFILES)
    return _PROFILES[name]


def evaluate_sepa_litmus(
    baseline_run_dirs: Sequence[str | Path],
    candidate_run_dirs: Sequence[str | Path],
    *,
    thresholds: SEPALitmusThresholds | None = None,
    evidence: SEPALitmusEvidence | None = None,
) -> SEPALitmusResult:
    """Compare the means of two lists of run folders with thresholds.

    Whether a gain is more than chance takes a campaign over seeds. Raises UserError for an empty list or a run
    without a logged step.
    """
    thresholds, evidence = thresholds or SEPALitmusThresholds(), evidence or SEPALitmusEvidence()
    a, b = (
        aggregate_group_stats([load_emergence_run_stats(d) for d in dirs])
        for dirs in (baseline_run_dirs, candidate_run_dirs)
    )
    gains = {
        "reward": b.step_mean_reward - a.step_mean_reward,
        "correct_rate": b.gen_correct_rate - a.gen_correct_rate,
        "gram_entropy_delta": b.gen_gram_entropy_delta - a.gen_gram_entropy_delta,
    }
    logged = zip(_LOGGED, _logged(a), _logged(b), astuple(evidence), strict=True)
    lacking = [
        f"{min(x, y)} {name} in the smaller arm, and {least} are needed"
        for name, x, y, least in logged
        if min(x, y) < least
    ]
    missed = [
        f"the gain in {name} is {gains[name]:+z.4f}, below {least:+z.4f}"
        for name, least in asdict(thresholds).items()
        if gains[name] < least
    ]
    return SEPALitmusResult(
        status=INCONCLUSIVE if lacking else FAILED if missed else CONFIRMED,
        reasons=tuple(lacking or missed or ["every gain reaches its threshold"]),
        baseline=a,
        candidate=b,
        reward_gain=gains["reward"],
        correct_rate_gain=gains["correct_rate"],
        gram_entropy_delta_gain=gains["gram_entropy_delta"],
        thresholds=thresholds,
        evidence=evidence,
    )


def build_litmus_markdown(result: SEPALitmusResult) -> str:
    """Return the result as a Markdown page."""
    gains = [
        ("reward", result.reward_gain, result.thresholds.reward),
        ("correct rate", result.correct_rate_gain, result.thresholds.correct_rate),
        ("gram entropy delta, nats", result.gram_entropy_delta_gain, result.thresholds.gram_entropy_delta),
    ]
    lines = ["# SEPA litmus", "", f"Status: **{result.status}**", "", *(f"- {reason}" for reason in result.reasons), ""]
    lines += ["| gain of the candidate | observed | threshold |", "|---|---|---|"]
    for name, gain, least in gains:
        lines.append(f"| {name} | {'unknown' if isnan(gain) else f'{gain:+z.4f}'} | {least:+z.4f} |")
    lines += ["", "| logged | baseline | candidate |", "|---|---|---|"]
    for name, a, b in zip(_LOGGED, _logged(result.baseline), _logged(result.candidate), strict=True):
        lines.append(f"| {name} | {a} | {b} |")
    lines += ["", "Thresholds have no error model: whether a gain is more than chance takes a campaign over seeds."]
    return "\n".join(lines) + "\n"


def _logged(stats: EmergenceGroupStats) -> list[int]:
    """Return the amounts that SEPALitmusEvidence limits, in the order of _LOGGED."""
    return [stats.runs, stats.steps, stats.generations, stats.gram_pairs]
