"""Countdown: expressions, what is read out of a completion, scores, solvability, problems."""

from __future__ import annotations

import re

from vectors import Answer, Case, UnknownCase

from textpolicy.tasks.countdown import (
    TINYZERO_RULES,
    ExpressionError,
    evaluate_expression,
    extract_answer_tag,
    extract_expression_from_completion,
    generate_countdown_problems,
    is_solvable,
    score_countdown,
)

NOT_TARGETS = {
    "*_upstream": "it reads the first arithmetic line or what follows '=', we the last; compared where that is one",
}


def check(case: Case) -> list[Answer]:
    kind = case.id.partition("/")[0]
    if kind not in CHECKS:
        raise UnknownCase(case.id)
    return CHECKS[kind](case)


def _evaluate(case: Case) -> list[Answer]:
    try:
        result = evaluate_expression(case.inputs["expression"], case.inputs.get("numbers"))
    except ExpressionError:
        return [Answer("", {"error": True})]
    fraction = list(result.value.as_integer_ratio())
    return [Answer("", {"value": fraction, "numbers": result.numbers_used})]


def _extract(case: Case) -> list[Answer]:
    completion = case.inputs["completion"]
    answers = [Answer("tinyzero", extract_answer_tag(completion, last_line_only=True))]
    if _is_one_expression(completion):
        answers.append(Answer("upstream", extract_expression_from_completion(completion)))
    return answers


def _score(case: Case) -> list[Answer]:
    problem = (case.inputs["completion"], case.inputs["numbers"], case.inputs["target"])
    answers = [Answer("score_tinyzero", score_countdown(*problem, TINYZERO_RULES).reward)]
    if _is_one_expression(case.inputs["completion"]) and isinstance(case.expected["score_upstream"], float):
        ours = score_countdown(*problem)
        answers += [Answer("score_upstream", ours.reward), Answer("correct_upstream", ours.is_correct)]
    return answers


def _is_one_expression(completion: str) -> bool:
    """Whether one line of numbers and signs is all there is: then the first and the last line are the same."""
    return re.fullmatch("[-+*/()0-9 \u00d7\u00f7\u2212]*", completion) is not None


def _solvable(case: Case) -> list[Answer]:
    return [Answer("solvable_subset", is_solvable(case.inputs["numbers"], case.inputs["target"]))]


def _generator(case: Case) -> list[Answer]:
    settings = {k: v for k, v in case.params.items() if k != "n"}
    return [Answer("problems", generate_countdown_problems(case.params["n"], **settings))]


CHECKS = {
    "evaluate": _evaluate,
    "extract": _extract,
    "score": _score,
    "solvable": _solvable,
    "generator": _generator,
}
