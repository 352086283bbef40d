"""The room that memory has beside what is in it: adapters, passes and completions, by the costs of the base."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn

from ...errors import UserError
from ...serving import Adapter
from ..adapters.merging import attach
from ..memory import Costs, Workload, limit_memory
from ..read.context import Context
from ..score.checkpointing import held
from .shared import lora, twin

_MARGIN = 1.1  # on predictions: MLX allocates some steps ahead
_KEPT = 5  # arrays of the size of an adapter: itself, two moments, the accumulated gradient and a new one


@dataclass(frozen=True, slots=True)
class Room:
    """The memory that arrays may take, and what a base's passes take of it, measured with its default adapter."""

    costs: Costs
    budget: float  # bytes

    @classmethod
    def of(cls, base: nn.Module, limit: float | None = None) -> Self:
        """Set MLX's limits for ``limit`` bytes, what the machine allows if None, and measure ``base``."""
        budget = limit_memory(limit)
        model = twin(base)
        return cls(Costs.measure(attach(model, lora(model, Adapter())), limit=budget), budget)

    @property
    def free(self) -> float:
        """The bytes that are not in use."""
        return self.budget - mx.get_active_memory()

    def refuse_adapter(self, size: int) -> None:
        """Raise UserError where a learner of so many bytes, just made, leaves no room for its optimiser."""
        if (_KEPT - 1) * size > self.free:
            raise UserError(
                f"an adapter of {size / 1e6:.0f} MB needs {_KEPT * size / 1e6:.0f} MB to be trained, and "
                f"{max(self.free, 0) / 1e6:.0f} MB are free; lower its rank, or close other training clients"
            )

    def pass_tokens(self, rows: int, longest: int, most: int) -> int:
        """Return the padded tokens of a micro-batch for ``rows`` rows of up to ``longest`` tokens, at most ``most``.

        Raises UserError where not even one row fits.
        """
        work, fixed = Workload(rows, 1, 1, longest), self.costs.weights + 2 * self.costs.trained
        sizes = [most, *(n * longest for n in range(min(rows, most // longest), 0, -1))]
        for size in sizes:
            if self.costs.update(work, size) - fixed <= self.free:
                return size
        need = self.costs.update(work, sizes[-1]) - fixed
        raise UserError(
            f"a datum of {longest} tokens needs about {need / 1e9:.2f} GB and {max(self.free, 0) / 1e9:.2f} GB are "
            "free; shorten it, or close other training clients"
        )

    def places(self, sizes: Iterable[tuple[int, int]], running: Iterable[Context]) -> int:
        """Return how many of the first completions fit side by side, each a prompt's tokens and the most that follow.

        ``running`` hold what those among them that have started have read so far.
        """
        slots: list[Any] = [array for context in running for array in held(context.layers).values()]
        room, count = self.free + sum(array.nbytes for array in slots), 0
        for prompt, more in sizes:
            # the context is held twice while rows join, leave or fork
            context = 2 * ((prompt + more) * self.costs.cache + self.costs.state)
            room -= _MARGIN * (context + self.costs.logits)
            if room < _MARGIN * self.costs.reading(prompt, prompt * prompt):
                break
            count += 1
        return count
