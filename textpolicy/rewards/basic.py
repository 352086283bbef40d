"""The built-in rewards: length, keywords, fluency, agreement with a reference."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from string import punctuation
from typing import Any

import numpy as np

from .answer import answered
from .contract import judge
from .example import references, texts
from .registry import reward

_BEFORE = "([{\"'`*_!?\u201c\u2018\xab\xbf\xa1"  # marks around a number that are not of it
_AFTER = ".,;:!?)]}\"'`*_\u201d\u2019\xbb\u2026\u3002\uff0c"


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
@judge
def keyword_reward(
    prompt: str,
    completion: str,
    example: Mapping[str, Any],
    keywords: Sequence[str] | None = None,
    bonus_multiplier: float = 1.0,
    thinking: str = "",
    **_: Any,
) -> float:
    """Return min(1, share of keywords that occur + bonus_multiplier * share of new keywords that occur).

    ``keywords`` defaults to ``example["keywords"]``; new ones are absent from the prompt. Keywords are
    found as case-insensitive substrings of what follows the thought, cut off or not. 0 when that is blank or there
    are no keywords. Raises UserError for keywords that are no list of texts.
    """
    wanted = [k.lower() for k in texts("keywords", example.get("keywords") if keywords is None else keywords)]
    new = [k for k in wanted if k not in prompt.lower()]
    answer = answered(completion, thinking) or ""
    if not answer.strip():
        return 0.0
    return min(1.0, _share_found(wanted, answer) + bonus_multiplier * _share_found(new, answer))


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
@judge
def accuracy_reward(
    prompt: str,
    completion: str,
    example: Mapping[str, Any],
    ground_truth: Any = None,
    similarity_threshold: float = 0.7,
    truncated: bool = False,
    thinking: str = "",
    **_: Any,
) -> float:
    """Return min(1, s / threshold), s the share of the reference's distinct ``words`` found in the answer.

    The answer is what follows the thought; a blank one and a ``truncated`` completion get 0. The reference is
    ``ground_truth``, else ``example["ground_truth"]``, ["label"] or ["answer"]; of a list the nearest counts. Raises
    UserError without a reference.
    """
    known = example if ground_truth is None else {"ground_truth": ground_truth}
    expected = [set(words(reference)) for reference in references(known, ("ground_truth", "label", "answer"))]
    given = set(words(answered(completion, thinking, truncated) or ""))
    if not given:
        return 0.0
    s = max(len(one & given) / len(one) for one in expected)
    return 1.0 if s >= similarity_threshold else s / similarity_threshold


def words(text: str) -> list[str]:
    """Return the words of ``text`` in lower case, without punctuation, as the evaluation of SQuAD does.

    A word with a digit keeps what belongs to its number: -5, 3.14, 10:30, 50% and $5 stay themselves, and 1,000 is
    1000. A text of punctuation alone keeps it.
    """
    found = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.lower()).split()
    marks = _punctuation()
    bare = [w.lstrip(_BEFORE).rstrip(_AFTER) if re.search(r"\d", w) else w.translate(marks) for w in found]
    return [word for word in bare if word] or found


def _share_found(keywords: Sequence[str], completion: str) -> float:
    return sum(k in completion.lower() for k in keywords) / max(1, len(keywords))


@functools.cache
def _punctuation() -> dict[int, None]:
    """Return the table that removes punctuation from a text."""
    return dict.fromkeys(i for i in range(0x10000) if chr(i) in punctuation or unicodedata.category(chr(i))[0] == "P")
