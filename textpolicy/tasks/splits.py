"""The split of distinct problems into training, validation and test."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Self, TypeVar

from ..errors import UserError
from .base import Problem

Made = TypeVar("Made")
_TEST, _VALIDATION = 200, 100  # at most, of a user's problems
_SEED = 2026


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

        Of equal questions the first is kept. Raises UserError, naming the ``source``, for fewer than 3.
        """
        first: dict[str, Problem] = {}
        for problem in problems:
            first.setdefault(problem.question, problem)
        kept = list(first.values())
        n = len(kept)
        if n < 3:
            raise UserError(
                f"the number of different problems in {source} is {n}; give 3 or more, for training and evaluation"
            )
        random.Random(_SEED).shuffle(kept)
        return cls.cut(kept, min(_TEST, max(1, n // 5)), min(_VALIDATION, max(1, n // 10)))
