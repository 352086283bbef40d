r"""Texts that break graders: deep nesting, long numbers, powers, broken LaTeX, Unicode, near misses of every format.

Seeded, so that a failure can be repeated. ``completions`` are whole completions, with and without an answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

Make = Callable[[random.Random], str]

LATEX = [
    r"\frac{", r"\sqrt{", r"\sqrt[3]{", r"\text{", r"\left(", r"\right)", r"\begin{pmatrix}", r"\end{pmatrix}", r"\\",
    "&", r"\int_0^1", r"\sum_{i=1}^{9}", r"\lim_{x\to0}", r"\pi", r"\infty", r"\pm", r"\cup", r"\in", r"\cdot", r"\%",
    r"\$", "^{", "_{", "}", "}", "}", "{", "(", ")", "[", "]", "|", "!", ",", ";", ":", "=", "<", "+", "-", "*", "/",
    "^", "_", "0", "1", "2", "7", "9", "10", "0.5", "x", "y", "e", "i", "mod", "sin", "log", " ", "  ", "$", "~",
]  # fmt: skip
ARITHMETIC = [
    "1", "2", "7", "25", "99999999999999999999", "0", "+", "-", "*", "/", "**", "//", "(", ")", " ", ".", "=", "x",
]  # fmt: skip
UNICODE = ["\u00d7", "\u00f7", "\u2212", "\u221e", "\u00bd", "\u0663", "\uff11", "\u200b", "\u202e", "\u0301", "\ud800",
           "\x00", "\x1b[2J", "\U0001f600", "\u2028", "\u00a0", "\N{DEGREE SIGN}", "\u03c0"]  # fmt: skip
TAGS = [
    "<answer>", "</answer>", r"\boxed{", "}", "####", "Answer:", "```", "~~~py\n", "`", "**", "\n", "\r", "\u2028",
    "<think>", "</think>", "</think>", "<|channel|>final<|message|>",
]  # fmt: skip
TOWERS = ["9^{9^{9^{9}}}", "10^{10^{10}}", "100000000!", "9**9**9**9", "((2^{1000})!)!", "2^{2^{2^{2^{2^2}}}}"]
ENDLESS = ["(x+y+1)^{999}", r"\sum_{i=1}^{9999} \frac{1}{i}", r"\prod_{i=1}^{9999} (x+i)", r"\binom{9999999}{5000000}"]
CODE = ["__import__('os').system('true')", "eval('1')", "{}.__class__", "%s%n%x", "'; DROP TABLE rewards; --", "${7*7}"]


def soup(pieces: list[str], most: int) -> Make:
    """Pieces in any order, ``most`` of them at most."""
    return lambda r: "".join(r.choices(pieces, k=r.randint(0, most)))


def repeated(pieces: list[str], most: int) -> Make:
    """One piece, again and again."""
    return lambda r: r.choice(pieces) * r.randint(1, most)


def nested(most: int) -> Make:
    """Brackets inside each other, not always closed."""

    def make(r: random.Random) -> str:
        opening, closing = r.choice(
            [("(", ")"), ("{", "}"), (r"\frac{1}{", "}"), (r"\sqrt{", "}"), ("[", "]"), ("-(", ")")]
        )
        depth = r.randint(1, most)
        return opening * depth + "1" + closing * r.choice([0, depth - 1, depth, depth + 1])

    return make


def digits(most: int) -> Make:
    """A number of very many digits, sometimes with a sign, a point or an exponent."""

    def make(r: random.Random) -> str:
        number = "".join(r.choices("0123456789", k=r.randint(1, most)))
        return r.choice(["", "-", "+", "1/", "0."]) + number + r.choice(["", ".0", "e9", "e999999999", "!", "%", " cm"])

    return make


def any_unicode(r: random.Random) -> str:
    """Code points of all planes, lone surrogates among them."""
    return "".join(chr(r.choice([r.randrange(0x110000), r.randrange(0x3000)])) for _ in range(r.randint(0, 200)))


ANSWERS: list[Make] = [
    soup(LATEX, 60), soup(ARITHMETIC, 80), soup(UNICODE + ARITHMETIC, 60), soup(TAGS + LATEX, 60), any_unicode,
    nested(600), digits(900), repeated(LATEX + ARITHMETIC + UNICODE, 900),
    lambda r: r.choice(CODE), soup(CODE + TAGS, 8),
]  # fmt: skip
LONG: list[Make] = [
    nested(20_000),
    digits(20_000),
    repeated(LATEX + ARITHMETIC + TAGS + UNICODE, 20_000),
    soup(LATEX + TAGS, 5_000),
]
FRAMES = [
    "{}",
    r"\boxed{{{}}}",
    r"so \boxed{{{}",
    "<answer>{}</answer>",
    "the answer is\n{}",
    "{} = 24",
    r"\boxed{{{}}} \boxed{{",
]


def answers(count: int, seed: int = 0) -> Iterator[str]:
    """``count`` answers; one in fifty is a tower of powers, one in 500 looks harmless and has no end either."""
    r = random.Random(seed)
    for i in range(count):
        if i % 500 == 499:
            yield r.choice(ENDLESS)
        else:
            yield r.choice(TOWERS) if i % 50 == 49 else r.choice(ANSWERS)(r)


def completions(count: int, seed: int = 0) -> Iterator[str]:
    """``count`` completions: answers in a frame, and one in ten a text of up to 100,000 characters."""
    r = random.Random(seed)
    for i, answer in enumerate(answers(count, seed)):
        yield r.choice(LONG)(r) if i % 10 == 5 else r.choice(FRAMES).format(answer)
