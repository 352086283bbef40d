"""Boxed answers read and graded, against human judgement."""

from __future__ import annotations

from test_golden import CASES
from vectors import Answer, Case, UnknownCase

from textpolicy.errors import UserError
from textpolicy.rewards.math import extract_boxed, grade_math_answer

NOT_TARGETS = {
    "cookbook*": "what another grader says; where a text has no closed box, our reading is compared to its",
    "math_verify_*": "what math-verify says alone, which errs on three of the cases; 'human' is the target",
}


def check(case: Case) -> list[Answer]:
    if "text" in case.inputs:
        return [_read_as_specified(case)]
    if "reference" in case.inputs:
        return [Answer("human", _graded(case.inputs["given"], case.inputs["reference"]))]
    if "agree_with_human" in case.expected:
        return [_tally(case)]
    raise UnknownCase(case.id)


def _read_as_specified(case: Case) -> Answer:
    """Our reading, where upstream has a closed box to read; without one it says "" or drops a character."""
    text = case.inputs["text"]
    ours = extract_boxed(text)
    if ours is not None and r"\boxed{" in text:
        return Answer("upstream", ours)
    recorded = case.expected["cookbook"]
    if ours is None and recorded:  # it passes over a box that does not close and takes the one before
        ours = extract_boxed(text[: text.rindex(r"\boxed")])
    return Answer("cookbook", "" if ours is None and recorded == "" else ours)


def _graded(given: str | None, reference: str) -> bool:
    """Our verdict; a reference that is refused makes nothing correct."""
    try:
        return grade_math_answer(given, reference)
    except UserError:
        assert not reference.strip()
        return False


def _tally(case: Case) -> Answer:
    """How many recorded verdicts of each grader agree with ours, over the cases at hand; the others may do either."""
    graded = [c for c in CASES if c.file == case.file and "reference" in c.inputs]
    ours = [_graded(c.inputs["given"], c.inputs["reference"]) for c in graded]
    counts = {
        grader: sum(c.expected[grader] == verdict for c, verdict in zip(graded, ours, strict=True))
        for grader in case.expected["agree_with_human"]
    }
    return Answer("agree_with_human", counts, atol=case.params["n"] - len(graded))
