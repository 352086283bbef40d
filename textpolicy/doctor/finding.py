"""The ``Finding`` of a rule of the doctor, in words, with its evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Example:
    """The completion that shows a finding. A model wrote its text, so it is printed escaped."""

    step: int
    prompt: str
    text: str
    reward: float  # NaN where it could not be scored
    truncated: bool


@dataclass(frozen=True, slots=True)
class Finding:
    """The description of something in a run's mechanics that keeps it from learning what it should."""

    name: str  # of the rule
    what: str  # one sentence or two, with the numbers that matter
    change: str  # which setting, reward or problem to change
    evidence: Mapping[str, float] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()
