"""The built-in rewards: length, keywords, fluency, agreement with a reference. Words are ``str.split()``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .registry import reward

HEDGES = (
    "i think", "maybe", "perhaps", "possibly", "not sure", "might be", "could be", "i believe", "seems like",
)  # fmt: skip


@reward
def length_reward(
    prompt: str,
    completion: str,
    example: Mapping[str, Any],
    target_length: float = 50,
    tolerance: float = 0.2,
    **_: Any,
) -> float:
    """Return 1 within ``tolerance`` of ``target_length`` words, falling linearly to 0; 0 when blank.

    d = |n - T| / T; 1 if d <= tol, else max(0, 1 - (d - tol) / (1 - tol)).
    """
    n = len(completion.split())
    if n == 0 or target_length <= 0:  # T -> 0 sends d to infinity
        return 0.0
    d = abs(n - target_length) / target_length
    if d <= tolerance:
        return 1.0
    slope = 1 - tolerance
    return max(0.0, 1 - (d - tolerance) / slope) if slope > 0 else 0.0


@reward
def keyword_reward(
    prompt: str,
    completion: str,
    example: Mapping[str, Any],
    keywords: Sequence[str] | None = None,
    bonus_multiplier: float = 1.0,
    **_: Any,
) -> float:
    """Return min(1, share of keywords that occur + bonus_multiplier * share of new keywords that occur).

    ``keywords`` defaults to ``example["keywords"]``; new ones are absent from the prompt. Keywords are
    found as case-insensitive substrings. 0 when the completion is blank or there are no keywords.
    """
    wanted = [k.lower() for k in (keywords if keywords is not None else example.get("keywords") or ())]
    new = [k for k in wanted if k not in prompt.lower()]
    if not completion.strip():
        return 0.0
    return min(1.0, _share_found(wanted, completion) + bonus_multiplier * _share_found(new, completion))


@reward
def perplexity_reward(
    prompt: str,
    completion: str,
    example: Mapping[str, Any],
    model: Any = None,
    max_perplexity: float = 100.0,
    **_: Any,
) -> float:
    """Return a cheap estimate of fluency: share of distinct words * L * P.

    L = 1 up to a mean word length of 8 letters, else max(0.3, 1 - 0.1 (mean - 8)). P = 0.8 for ten
    words or more without any of ``. ! ?``, else 1. Blank is 0, fewer than three words 0.2. No model
    is used: ``model`` and ``max_perplexity`` are in the signature only.
    """
    words = completion.split()
    if len(words) < 3:
        return 0.2 if words else 0.0
    mean_length = float(np.mean([len(w) for w in words]))
    lengths = max(0.3, 1 - 0.1 * max(0.0, mean_length - 8))
    punctuation = 1.0 if len(words) < 10 or any(mark in completion for mark in ".!?") else 0.8
    return min(1.0, len(set(words)) / len(words) * lengths * punctuation)


@reward
def accuracy_reward(
    prompt: str,
    completion: str,
    example: Mapping[str, Any],
    ground_truth: Any = None,
    similarity_threshold: float = 0.7,
    **_: Any,
) -> float:
    """Return min(1, s / threshold), s the share of the reference's distinct words found in the completion.

    The reference is ``ground_truth``, else ``example["ground_truth"]``, else ``example["label"]``;
    words compare case-insensitively. An empty reference gives 0.5, a blank completion 0. Without a
    reference: max(0.3, 1 - 0.2 k), where k of nine hedges ("maybe", ...) occur.
    """
    references = (ground_truth, example.get("ground_truth"), example.get("label"))
    truth = next((r for r in references if r is not None), None)
    if not completion.strip():
        return 0.0
    if truth is None:
        return max(0.3, 1 - 0.2 * sum(hedge in completion.lower() for hedge in HEDGES))
    expected = set(str(truth).lower().split())
    if not expected:
        return 0.5
    s = len(expected & set(completion.lower().split())) / len(expected)
    return 1.0 if s >= similarity_threshold else s / similarity_threshold


def _share_found(keywords: Sequence[str], completion: str) -> float:
    return sum(k in completion.lower() for k in keywords) / max(1, len(keywords))
