"""The bounds of a model's tables: MLX reads other memory, or ends the process, where an index lies beyond them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn

from ...errors import UserError
from ...types import Batch, token_ids
from ..kernels.patching import StandIn, with_modules


@dataclass(frozen=True, slots=True)
class Bounds:
    """The number of tokens that a model knows, and of positions if it looks these up in a table."""

    vocabulary: int | None  # None: no table of tokens was found
    positions: int | None  # None: positions are computed for texts of any length

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Return the bounds of ``model``, found by what its tables are asked for while it reads the tokens 2, 0, 1.

        The table of positions is asked for 0, 1, 2. From now on it gives its last row for positions beyond its end,
        where batches have padding.
        """
        asked: list[tuple[Any, Any]] = []  # each with the indices, flat

        def call(table: nn.Module, indices: mx.array) -> mx.array:
            asked.append((table, indices.reshape(-1).tolist()))
            return table(indices)

        def watched(_: Any, part: nn.Module) -> Any:
            return (
                StandIn(part, partial(call, part)) if isinstance(part, nn.Embedding | nn.QuantizedEmbedding) else None
            )

        with_modules(model, watched)(mx.array([[2, 0, 1]]))
        vocabulary, positions = (
            next((table.weight.shape[0] for table, indices in asked if indices == wanted), None)
            for wanted in ([2, 0, 1], [0, 1, 2])
        )
        kind: Any
        for table, indices in asked:
            kind = type(table)
            if indices == [0, 1, 2] and not kind.__name__.startswith("Clamped"):
                table.__class__ = _clamped(kind)
        return cls(vocabulary, positions or vars(model).get("longest"))

    def refuse_beyond(self, count: int, what: str) -> None:
        """Raise UserError if ``what`` has more tokens than the table has positions."""
        if self.positions is not None and count > self.positions:
            raise UserError(
                f"{what} has up to {count} tokens and the model {self.positions} positions; shorten the "
                "prompt, or lower max_tokens"
            )

    def check(self, batch: Batch) -> None:
        """Raise UserError if ``batch`` has a token or a position that the model lacks."""
        for ids in (batch.inputs, batch.targets):
            token_ids(ids.reshape(-1), self.vocabulary)
        self.refuse_beyond(int(batch.lengths.max(initial=0)), "an episode")


@cache
def _clamped(kind: Any) -> type:
    """Return a subclass of the embedding ``kind`` that gives its last row for indices beyond its end."""
    call: Callable[..., mx.array] = kind.__call__

    def clamped(self: Any, indices: mx.array) -> mx.array:
        return call(self, mx.minimum(indices, self.weight.shape[0] - 1))

    return type(f"Clamped{kind.__name__}", (kind,), {"__call__": clamped})
