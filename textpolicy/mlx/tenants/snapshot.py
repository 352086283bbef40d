"""The weights of a sampler: the base, or an adapter as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.nn as nn

from ...errors import UserError
from ..adapters.merging import save_adapter


class Snapshot:
    """The weights that a sampler keeps; the arrays are shared with a learner until that moves on."""

    def __init__(self, model: nn.Module):
        self.model = model  # a twin of its own, whose arrays nobody replaces

    def save(self, folder: Path) -> None:
        """Write the adapter in mlx-lm's layout, by one rename. Raises OSError, and UserError for the base."""
        with writing():
            save_adapter(self.model, folder)


@contextmanager
def writing() -> Iterator[None]:
    """Raise the OSError that ``save_adapter`` makes a UserError of, since the folder is not the client's choice."""
    try:
        yield
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise
