"""More than a thousand pairs of an answer and a reference are graded as they were judged by hand."""

from pathlib import Path

import pytest

from textpolicy.rewards.math import grade_math_answer


def kinds():
    """The pairs of each kind: whether they are equal, the answer, the reference."""
    parts = (Path(__file__).parent / "judged_answers.txt").read_text(encoding="utf-8").split("\n\n# ")[1:]
    lines = {part.partition("\n")[0]: part.strip("\n").split("\n")[1:] for part in parts}
    return {kind: [(line[0] == "=", *line[2:].split(" :: ")) for line in pairs] for kind, pairs in lines.items()}


@pytest.mark.parametrize("pairs", kinds().values(), ids=kinds().keys())
def test_answers_are_graded_as_they_were_judged(pairs):
    assert [
        (given, reference) for equal, given, reference in pairs if grade_math_answer(given, reference) != equal
    ] == []


BETWEEN = (
    r"\frac{", r"\text{ or }", r"\left(", "\\\\", "&", r"\pi", r"\pm", r"\cup", r"\in", r"\cdot", r"\%", r"\$", "^{",
    "_{", "}", "{", "(", ")", "[", "]", "|", "!", ",", ";", ":", "=", "<", ">", "+", "-", "*", "/", "^", "_", "0",
    "x", " mod ", " or ", "~", r"\,", "$", ".", "'", '"', "\n", "\u2013", "\u2192", "%", "#", "`", "**", "\\", r"\{",
    r"\}", r"\neq", r"\le", r"\overline{", r"\bar", r"^\circ", r"\boxed{", r"\mid", r"\to", r"\ldots", "...",
    r"\pmod", "cm", "m ", "apples", "not ", "\xbd", "\u221a",
)  # fmt: skip


def test_whatever_stands_between_two_numbers_they_are_not_one_of_them():
    pairs = [f"17{a}{b}23" for a in BETWEEN for b in ("", *BETWEEN)]
    assert [s for s in pairs if grade_math_answer(s, "17") or grade_math_answer(s, "23")] == []


def test_the_pairs_are_of_many_kinds_and_half_of_them_are_not_equal():
    equal = [pair[0] for pairs in kinds().values() for pair in pairs]
    assert len(kinds()) > 40
    assert 500 < sum(equal) < len(equal) - 500
