"""The rewards that compare an answer with the correct one: mathematics, words in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from .math import extract_boxed, grade_math_answer
from .registry import reward

REFERENCES = ("answer", "label", "ground_truth")  # entries of an example that may hold the correct answer


@reward(name="math_accuracy")
def math_accuracy_reward(
    prompt: str,
    completion: str,
    example: Mapping[str, Any],
    extract_box: bool = True,
    format_penalty: float = 0.0,
    timeout: float = 3.0,
    **_: Any,
) -> dict[str, Any]:
    r"""Return 1 if the answer equals the example's, else 0; minus ``format_penalty`` without a closed ``\boxed{}``.

    The answer is the content of the last box, or the whole completion with ``extract_box=False``; the
    correct one is example["answer"], ["label"] or ["ground_truth"]. ``grade_math_answer`` compares them, for
    at most ``timeout`` seconds. Raises UserError when the example has no correct answer.
    """
    given = extract_boxed(completion) if extract_box else completion
    is_correct = grade_math_answer(given, str(_reference(example)), timeout)
    return {"reward": float(is_correct) - format_penalty * (given is None), "is_correct": is_correct}


@reward(name="f1_score")
def f1_score_reward(prompt: str, completion: str, example: Mapping[str, Any], **_: Any) -> float:
    """Return F1 = 2 c / (n + m): n words in the completion, m in the example's answer, c in common, with repetition.

    Words are lower-cased ``str.split()``. Two empty texts give 0. Raises UserError when the
    example has no correct answer (Rajpurkar et al., 2016, arXiv:1606.05250, without its removal of articles).
    """
    given, truth = (Counter(str(text).lower().split()) for text in (completion, _reference(example)))
    return 2 * (given & truth).total() / max(1, given.total() + truth.total())


def _reference(example: Mapping[str, Any]) -> Any:
    for key in REFERENCES:
        if example.get(key) is not None:
            return example[key]
    raise UserError(f"the example {dict(example)!r} has no correct answer; give it an 'answer'")
