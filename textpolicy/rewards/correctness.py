"""The rewards that compare an answer with the correct one: mathematics, words in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from .answer import answered, extract_boxed
from .basic import words
from .contract import judge
from .example import REFERENCES as REFERENCES
from .example import references
from .math import grade_math_answer
from .registry import reward


@reward(name="math_accuracy")
@judge
def math_accuracy_reward(
    prompt: str,
    completion: str,
    example: Mapping[str, Any],
    extract_box: bool = True,
    format_penalty: float = 0.0,
    timeout: float = 3.0,
    truncated: bool = False,
    thinking: str = "",
    **_: Any,
) -> dict[str, Any]:
    r"""Return 1 if the answer equals the example's, else 0; minus ``format_penalty`` where there is no answer.

    The answer stands after the thought (``answer.answered``): the content of the last box, or with
    ``extract_box=False`` all of a completion that is not ``truncated``. The correct one is example["answer"],
    ["label"] or ["ground_truth"]; of a list one is enough. ``grade_math_answer`` compares them, for at most
    ``timeout`` seconds each. Raises UserError when the example has no correct answer.
    """
    correct = references(example)
    if extract_box:
        given = extract_boxed(answered(completion, thinking) or "")
    else:
        given = answered(completion, thinking, truncated)
    is_correct = any(grade_math_answer(given, reference, timeout) for reference in correct)
    return {"reward": float(is_correct) - format_penalty * (given is None), "is_correct": is_correct}


@reward(name="f1_score")
@judge
def f1_score_reward(
    prompt: str,
    completion: str,
    example: Mapping[str, Any],
    truncated: bool = False,
    thinking: str = "",
    **_: Any,
) -> float:
    """Return F1 = 2 c / (n + m): n words in the answer, m in the example's, c in common, with repetition.

    The answer is what follows the thought; a ``truncated`` completion gets 0. Of a list of references the nearest
    counts. ``words`` says what words are. Raises UserError when the example has no correct answer
    (Rajpurkar et al., 2016, arXiv:1606.05250, without its removal of articles).
    """
    given = Counter(words(answered(completion, thinking, truncated) or ""))
    truths = [Counter(words(reference)) for reference in references(example)]
    return max(2 * (given & truth).total() / max(1, given.total() + truth.total()) for truth in truths)
