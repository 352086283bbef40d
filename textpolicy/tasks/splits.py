"""What tasks with made-up problems share: distinct problems, cut into the three splits."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Self, TypeVar

from ..errors import UserError
from .base import Problem

Made = TypeVar("Made")


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
