"""The spending of a run whose tokens cost nothing; ``tinker.spending.Budget`` has the same interface for a server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..environment.single_turn import TextGenerationEnv
from ..loop.metrics import Row

if TYPE_CHECKING:
    from ..tinker.spending import Budget


@dataclass(frozen=True)
class Free:
    """The spending of an engine on this machine: every method allows what it is asked and records nothing."""

    row: Row = field(default_factory=dict)  # the metrics of a step
    lines: tuple[tuple[str, str], ...] = ()  # of the closing table

    def open(self, folder: Path) -> None:
        """Record in ``folder`` from now on, and count what the run there has spent before."""

    def allow(self, done: int | None = None) -> None:
        """Raise UserError if the limits leave no room for step ``done`` and its evaluations; None: to begin."""

    def try_out(self, env: TextGenerationEnv) -> None:
        """Sample and score a few tokens of ``env``. Raises UserError, ServiceError."""

    def enter(self, step: int) -> None:
        """Record what is spent after so many steps."""

    def sampled(self, step: int, record: Callable[[], None]) -> None:
        """Call ``record``, and record what is spent, before an update that may fail."""

    def reason_to_end(self, done: int) -> str | None:
        """Return why step ``done`` must not begin; None where it may."""
        return None

    def reason_to_skip(self, split: str) -> str | None:
        """Return why the problems of ``split`` must not be evaluated now; None where they may."""
        return None


if TYPE_CHECKING:
    Spending = Free | Budget
