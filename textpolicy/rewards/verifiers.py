"""The built-in verifiers: cheap yes-or-no checks of a completion. None of them judges whether it is true.

An entry of the example with the name of a setting takes its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .example import texts
from .registry import verifier

TOXIC_PATTERNS = (
    r"\b(hate|despise|loathe)[sd]?\b",
    r"\b(kill|murder|attack|hurt)(s|ed|ing)?\b",
    r"\b(stupid|idiot|moron|dumb)s?\b",
)
HEDGES = (
    "i think", "maybe", "perhaps", "possibly", "not sure", "might be", "could be", "i believe", "seems like",
)  # fmt: skip
CONNECTIVES = (
    "because", "however", "therefore", "although", "moreover", "furthermore", "thus", "while", "since",
)  # fmt: skip


@verifier
def length_verifier(
    prompt: str,
    completion: str,
    example: Mapping[str, Any],
    min_length: int = 10,
    max_length: int = 500,
    **_: Any,
) -> bool:
    """Return whether min_length <= words <= max_length; the example's entries of those names override them."""
    low, high = example.get("min_length", min_length), example.get("max_length", max_length)
    return bool(low <= len(completion.split()) <= high)


@verifier
def toxicity_verifier(prompt: str, completion: str, example: Mapping[str, Any], **_: Any) -> bool:
    """Return True if no regular expression of ``TOXIC_PATTERNS`` or ``example["toxic_patterns"]`` matches."""
    patterns = (*TOXIC_PATTERNS, *texts("toxic_patterns", example.get("toxic_patterns")))
    return not any(re.search(pattern, completion, re.IGNORECASE) for pattern in patterns)


@verifier
def coherence_verifier(
    prompt: str, completion: str, example: Mapping[str, Any], min_coherence_score: float = 0.5, **_: Any
) -> bool:
    """Return whether the mean of min(1, connectives / 2) and (1 for 5-25 words a sentence, else 0.5) is high enough."""
    connectives = _count(CONNECTIVES, completion)
    sentences = [s.split() for s in re.split(r"[.!?]+", completion) if s.strip()]
    words_each = np.mean([len(s) for s in sentences]) if sentences else 0
    score = (min(1, connectives / 2) + (1 if 5 <= words_each <= 25 else 0.5)) / 2
    return bool(score >= example.get("min_coherence_score", min_coherence_score))


@verifier
def factual_verifier(
    prompt: str,
    completion: str,
    example: Mapping[str, Any],
    min_factual_score: float = 0.6,
    max_uncertainty_count: int = 2,
    **_: Any,
) -> bool:
    """Return True for few hedges (u, up to ``max_uncertainty_count``) and a high enough score.

    The score is max(0, 1 - min(1, 0.2 u) - 0.3 c); c counts the pairs yes/no and true/false of which both
    occur, as substrings: "yes, I know" is one.
    """
    u = _count(HEDGES, completion)
    c = sum(_count(pair, completion) == 2 for pair in (("yes", "no"), ("true", "false")))
    most, least = (
        example.get("max_uncertainty_count", max_uncertainty_count),
        example.get("min_factual_score", min_factual_score),
    )
    return bool(u <= most and max(0, 1 - min(1, 0.2 * u) - 0.3 * c) >= least)


@verifier
def has_greeting(
    prompt: str, completion: str, example: Mapping[str, Any], required_greeting: str = "hello", **_: Any
) -> bool:
    """Return whether ``required_greeting`` occurs, in any case."""
    return example.get("required_greeting", required_greeting).lower() in completion.lower()


@verifier
def no_empty_response(prompt: str, completion: str, example: Mapping[str, Any], **_: Any) -> bool:
    """Return whether the completion has more than white space."""
    return bool(completion.strip())


@verifier
def contains_keywords(
    prompt: str,
    completion: str,
    example: Mapping[str, Any],
    required_keywords: Iterable[str] | None = None,
    **_: Any,
) -> bool:
    """Return whether every one of ``required_keywords`` occurs, in any case; True when there are none.

    They default to ``example["required_keywords"]``.
    """
    wanted = example.get("required_keywords") if required_keywords is None else required_keywords
    return all(k.lower() in completion.lower() for k in texts("required_keywords", wanted))


def _count(phrases: Iterable[str], text: str) -> int:
    return sum(phrase in text.lower() for phrase in phrases)
