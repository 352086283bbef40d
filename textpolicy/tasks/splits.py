"""The split of distinct problems into training, validation and test."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Self, TypeVar

from ..errors import UserError
from .base import Problem, Question

Made = TypeVar("Made")
_TEST, _VALIDATION = 200, 100  # at most, of a user's problems
_SEED = 2026
_KEPT = ("<super>", "<sub>", "<fraction>")  # whose compatible character means another number: 5² is not 52
_MARKS = " .,:;?!\u3002"
_AS_TYPED = str.maketrans("\u2018\u2019\u201c\u201d\u2010\u2011\u2013\u2212", "''\"\"----")


def question_key(question: Question) -> str:
    """Return what is the same in two spellings of one question, by which it stays in one split.

    Upper case is lower case; white space is one space, and none at the ends; invisible characters are none; characters
    are composed (NFC) and of plain width (NFKC, except raised and lowered ones and fractions), quotes and dashes those
    of a keyboard; and marks that end a sentence are left out at the end. Of messages the contents count.
    """
    text = str(question)
    if isinstance(question, list | tuple) and all(isinstance(message, Mapping) for message in question):
        text = "\n".join(str(message.get("content")) for message in question)
    if not text.isascii():
        plain = (
            c if unicodedata.decomposition(c).startswith(_KEPT) else unicodedata.normalize("NFKC", c)
            for c in text.translate(_AS_TYPED)
            if unicodedata.category(c) != "Cf"
        )
        text = unicodedata.normalize("NFC", "".join(plain))
    words = " ".join(text.casefold().split())
    return words.rstrip(_MARKS) or words


def distinct(made: Iterable[Made], key: Callable[[Made], Hashable], count: int, tries: int = 20) -> list[Made]:
    """Return the first ``count`` of ``made`` that differ by ``key``. Raises UserError after ``tries`` times as many."""
    found: dict[Hashable, Made] = {}
    for one in islice(made, count * tries):
        found.setdefault(key(one), one)
        if len(found) == count:
            return list(found.values())
    raise UserError(f"only {len(found)} of {count} problems differ; ask for fewer, or for a wider range")


@dataclass(frozen=True)
class Splits:
    """The problems of a Task."""

    train: tuple[Problem, ...]
    validation: tuple[Problem, ...]
    test: tuple[Problem, ...]

    @classmethod
    def cut(cls, problems: Sequence[Problem], test: int, validation: int) -> Self:
        """Put the first problems into ``test``, the next into ``validation``: they stay the same as training grows."""
        held_out = test + validation
        return cls(tuple(problems[held_out:]), tuple(problems[test:held_out]), tuple(problems[:test]))

    @classmethod
    def drawn(cls, problems: Iterable[Problem], source: str) -> Self:
        """Draw a fifth, at most 200, for ``test`` and a tenth, at most 100, for ``validation``, always the same ones.

        Of equal questions the first is kept, and those with one ``question_key`` are in one split and count as one.
        Raises UserError, naming the ``source``, for fewer than 3.
        """
        alike: dict[str, dict[str, Problem]] = {}
        for problem in problems:
            alike.setdefault(question_key(problem.question), {}).setdefault(str(problem.question), problem)
        n = len(alike)
        if n < 3:
            raise UserError(
                f"the number of different problems in {source} is {n}; give 3 or more, for training and evaluation"
            )
        keys = list(alike)
        random.Random(_SEED).shuffle(keys)
        test = min(_TEST, max(1, n // 5))
        held_out = test + min(_VALIDATION, max(1, n // 10))
        parts = keys[held_out:], keys[test:held_out], keys[:test]
        return cls(*(tuple(problem for key in part for problem in alike[key].values()) for part in parts))
