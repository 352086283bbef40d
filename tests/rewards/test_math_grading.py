r"""Boxed answers and their grading, judged by hand; hostile answers end in time, from any thread."""

import importlib.util
import itertools
import subprocess
import sys
import threading
import time

import pytest

from textpolicy.errors import MissingDependencyError, UserError
from textpolicy.rewards import math as grading
from textpolicy.rewards.math import extract_boxed, grade_math_answer, normalize_math_answer

# ---- what is in the box


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{1}, no, \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"$\boxed{\left\{1,2\right\}}$", r"\left\{1,2\right\}"),
        (r"\boxed{\left\{x\right.} and } more", r"\left\{x\right."),
        (r"\boxed{a\\}b}", "a\\\\"),
        (r"} \boxed{3}", "3"),
        (r"\boxed{\boxed{4}}", "4"),
        (r"\boxed{}", ""),
        ("\\boxed{\n5\n}", "\n5\n"),
        (r"\boxed 7", "7"),
        (r"\boxed{1} then \boxed 7", "1"),
        (r"\boxed{1", None),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed{1} then \boxed{2", None),
        (r"\boxed{1\}", None),
        (r"\boxed", None),
        (r"\fbox{3}", "3"),
        ("boxed{3}", None),
        ("the answer is 3", None),
        ("", None),
    ],
)
def test_the_last_closed_box_holds_the_answer(text, content):
    assert extract_boxed(text) == content


@pytest.mark.parametrize(
    "text", [r"\boxed{" * 100_000, r"\boxed{" + "{" * 500_000, "\\" * 500_000, r"\boxed " * 100_000]
)
def test_reading_the_box_takes_time_in_proportion_to_the_text(text):
    start = time.perf_counter()
    extract_boxed(text)
    assert time.perf_counter() - start < 2


# ---- spelling


@pytest.mark.parametrize(
    "spellings",
    [
        (r"\frac{1}{2}", r"\dfrac{1}{2}", r"\tfrac12", r"\frac 12", r"\frac1{2}", r"\frac{1}2", "1/2", r"\(1/2\)"),
        (r"\sqrt{2}", r"\sqrt2", r"\sqrt 2", "sqrt2"),
        ("1000", "1,000", "1{,}000", r"1,\!000", r"1\,000", "1 000", r"\$1,000", "1000."),
        ("90", r"90^\circ", r"90^{\circ}", "90\N{DEGREE SIGN}", r"90\%", "90%"),
        ("yes", "Yes", r"\text{yes}", r"\textbf{Yes}", r"\mathrm{YES}", " yes. "),
        (r"(1,2)", r"\left(1, 2\right)", r"( 1 ,2 )"),
        (r"\pi", "pi", " pi "),
        (r"7\frac{3}{4}", "7 3/4", r"7\tfrac34"),
        (r"\infty", "infinity", "oo", "\N{INFINITY}"),
        ("11_2", "11_{2}"),
        ("x^2", "x^{2}", "x**2"),
    ],
)  # fmt: skip
def test_one_answer_has_one_spelling(spellings):
    assert len({normalize_math_answer(s) for s in spellings}) == 1, [normalize_math_answer(s) for s in spellings]


def test_different_answers_keep_different_spellings():
    different = [
        "2 3",
        "23",
        "2,3",
        "(1,234)",
        "1234",
        "A",
        "-1",
        "1",
        r"\pi x",
        "pix",
        r"[1,2)",
        "[1,2]",
        r"\Delta",
        r"\delta",
    ]
    assert len({normalize_math_answer(s) for s in different}) == len(different)


@pytest.mark.parametrize("answer", [r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\frac{1}{2}", "x^2", "no solution"])
def test_the_spelling_of_a_spelling_is_itself(answer):
    once = normalize_math_answer(answer)
    assert normalize_math_answer(once) == once


# ---- grading

EQUAL = [
    (r"x^2+2x+1", r"(x+1)^2"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"\frac{2}{4}", r"\frac{1}{2}"),
    ("0.5", r"\frac{1}{2}"),
    ("5.0", "5"),
    ("007", "7"),
    ("+5", "5"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("6, 4", "4, 6"),
    (r"x \in (1,2)", "(1,2)"),
    ("x=5", "5"),
    (r"12 \text{ cm}", "12"),
    (r"12\mathrm{~cm}", "12"),
    (r"12 \text{ cm}^2", "12"),
    ("12 cm^2", "12"),
    ("5 dollars", r"\$5"),
    ("90 degrees", r"90^\circ"),
    (r"50\%", "50"),
    (r"50\%", "0.5"),
    (r"\text{(C)}", "C"),
    ("(C)", r"\text{C}"),
    ("pi", r"\pi"),
    ("2pi/3", r"\frac{2\pi}{3}"),
    ("7 3/4", r"\frac{31}{4}"),
    ("-7 3/4", "-7.75"),
    ("1e3", "1000"),
    ("10^3", "1000"),
    (r"\pm 2", "2, -2"),
    (r"(1,\frac{\pi}{2})", r"\left(1, \pi/2\right)"),
    (r"(-\infty,1)\cup(2,\infty)", r"(2,\infty)\cup(-\infty,1)"),
    (r"\begin{pmatrix} 1 \\ 2/4 \end{pmatrix}", r"\begin{pmatrix} 1 \\ \frac12 \end{pmatrix}"),
    (r"\varnothing", r"\emptyset"),
    ("x^4+x^3+x^2+x", "x(x^3+x^2+x^1+1)"),
    ("2^{2^{4}}", "65536"),
    ("2^{-1.25}", r"\frac{1}{2^{1.25}}"),
    ("5!+2^3", "128"),
    ("(n-1)! n", "n!"),
    ("10^{1000}", "10^{999} \\cdot 10"),
    ("((((((1))))))", "1"),
    ("1" + "0" * 98, "10^{98}"),
]
UNEQUAL = [
    (None, "5"),
    ("", "5"),
    ("  ", "5"),
    ("$$", "5"),
    ("3", "4"),
    ("-5", "5"),
    ("1,000", "1"),
    ("1,234", "(1,234)"),
    ("2 3", "23"),
    ("0.333", r"\frac13"),
    ("3.14", r"\pi"),
    ("p", r"\pi"),
    ("7 3/4", r"\frac{21}{4}"),
    ("0.0000001", "0.0000002"),
    ("[1,2)", "[1,2]"),
    ("(1,2)", "(2,1)"),
    ("2,1", "(1,2)"),
    ("5 or 6", "5"),
    (r"\pm 2", "2"),
    ("y=5", "x=5"),
    ("x<5", "x>5"),
    (r"-\infty", r"\infty"),
    ("11_2", "11"),
    ("11", "11_2"),
    ("11_2", "11_3"),
    ("11_2", "3"),
    ("3:00", "4:00"),
    ("DAB", "BAD"),
    ("east", "seat"),
    (r"\text{even}", r"\text{odd}"),
    ("B", "A"),
    ("the answer is 5", "5"),
    (r"3} \boxed{4", "4"),
    (r"3} or \boxed{4", "3"),
    ("5" + " or 5" * 400, "5"),
]


@pytest.mark.parametrize(("given", "reference"), EQUAL)
def test_answers_that_a_person_finds_equal_are_equal(given, reference):
    assert grade_math_answer(given, reference)
    assert grade_math_answer(reference, given)


@pytest.mark.parametrize(("given", "reference"), UNEQUAL)
def test_answers_that_a_person_tells_apart_are_not_equal(given, reference):
    assert not grade_math_answer(given, reference)


@pytest.mark.parametrize("reference", ["", "  ", "$$", r"\,"])
@pytest.mark.parametrize("given", [None, "", "5"])
def test_an_empty_reference_is_refused(given, reference):
    with pytest.raises(UserError, match="empty"):
        grade_math_answer(given, reference)


@pytest.mark.parametrize("timeout", [0, -1])
def test_a_timeout_that_leaves_no_time_is_refused(timeout):
    with pytest.raises(UserError, match="timeout"):
        grade_math_answer("1", "1", timeout=timeout)


def test_an_answer_of_any_length_can_be_right():
    long = " + ".join(f"x_{{{i}}}" for i in range(400))
    assert grade_math_answer(f"${long}$", long)


# ---- hostile answers

HOPELESS = [
    "9^{9^{9}}", "9^{9^{9^{9}}}", "2^{2^{2^{2^{2}}}}", "10^{10^{10}}", "100000000!", "((2^{1000})!)!",
    "1e999999999", "(" * 400 + "1" + ")" * 400, "-(" * 30 + "1" + ")" * 30, "+" * 300 + "5", r"\infty" * 30, "1" * 900,
    "(x+y+1)^{999}", r"\sum_{i=1}^{9999} \frac{1}{i}", r"\binom{9999999}{5000000}", r"\sin" * 150 + "1",
    "-+" * 150 + "1",
    r"\sqrt" * 100 + "2", "x^{99999}" * 30, r"\sin(10^{99999})", "e^{e^{e^{e^9}}}", r"\ln" * 140 + " 9", "2^{0.3}" * 40,
    ".3" * 140 + "...", "0." + "12" * 140 + "...", "0.(" + "7" * 290 + ")", r"\frac1" * 100, "[" * 11 + "1," * 99,
    "$" * 299, "." * 299, "5 " + "a " * 140, r"\text{a}" * 40, "x=" * 140 + "1", r"\pm" * 90, ":" * 290, "1,000" * 55,
]  # fmt: skip


@pytest.mark.parametrize("hostile", HOPELESS)
def test_answers_that_no_person_writes_take_no_time(hostile):
    assert grade_math_answer("x+1", "1+x")  # so that mpmath is loaded
    assert seconds(lambda: grade_math_answer(hostile, "5", timeout=5)) < 0.2
    assert not grade_math_answer(hostile, "5")
    assert grade_math_answer(f" ${hostile}$ ", hostile) or "$" in hostile


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_an_answer_after_its_time_limit_equals_nothing(monkeypatch):
    assert grade_math_answer("x+1", "1+x", timeout=1)
    ticks = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: 0.5 * next(ticks))
    assert not grade_math_answer("x+1", "1+x", timeout=1)
    assert grade_math_answer("x+1", "1+x", timeout=1000)


@pytest.mark.parametrize(
    "hostile",
    ["\x00\n1\n", "\u2028", "\ud800", "__import__('os')", r"\frac{" * 100, "^" * 900, "$" * 900, "-" * 900 + "5"],
)
def test_text_that_cannot_be_parsed_is_incorrect(hostile):
    assert not grade_math_answer(hostile, "5")


def test_answers_are_not_mixed_up_between_threads():
    verdicts = {}

    def grade(i):
        right = grade_math_answer(rf"\sqrt{{{i}}}+\ln 4", rf"2\ln 2+\sqrt{{{4 * i}}}/2")
        verdicts[i] = right, grade_math_answer(rf"\sqrt{{{i}}}", rf"\sqrt{{{i + 1}}}")

    threads = [threading.Thread(target=grade, args=(i,)) for i in range(20, 60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == dict.fromkeys(range(20, 60), (True, False))


def test_without_mpmath_the_install_line_is_given(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    grading._require_mpmath.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"pip install 'textpolicy\[math\]'"):
        grade_math_answer("1", "1")
    grading._require_mpmath.cache_clear()


def test_mpmath_is_imported_when_it_is_needed():
    program = (
        "import sys; from textpolicy.rewards.math import grade_math_answer\n"
        "assert grade_math_answer('x', 'x') and 'mpmath' not in sys.modules\n"
        "assert grade_math_answer(r'\\sqrt8', r'2\\sqrt2') and 'mpmath' in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
