"""What tasks with made-up problems share: distinct problems, cut into the three splits."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Self, TypeVar

from ..errors import UserError
from .base import Problem

Made = TypeVar("Made")
_TEST, _VALIDATION = 200, 100  # at most, of problems that somebody brings
_SEED = 2026


def distinct(made: Iterable[Made], key: Callable[[Made], Hashable], count: int, tries: int = 20) -> list[Made]:
    """The first ``count`` of ``made`` that differ by ``key``; a UserError after ``tries`` times as many."""
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
        """The first problems go to ``test``, the next to ``validation``: they stay when training grows."""
        judged = test + validation
        return cls(tuple(problems[judged:]), tuple(problems[test:judged]), tuple(problems[:test]))

    @classmethod
    def drawn(cls, problems: Iterable[Problem], source: str) -> Self:
        """A fifth, at most 200, to ``test`` and a tenth, at most 100, to ``validation``, drawn always alike.

        Of equal questions the first is kept. Raises UserError, naming the ``source``, for fewer than 3.
        """
        first: dict[str, Problem] = {}
        for problem in problems:
            first.setdefault(problem.question, problem)
        kept = list(first.values())
        n = len(kept)
        if n < 3:
            raise UserError(f"{source} holds {n} different problems; give 3 or more, for training and for judging")
        random.Random(_SEED).shuffle(kept)
        return cls.cut(kept, min(_TEST, max(1, n // 5)), min(_VALIDATION, max(1, n // 10)))
