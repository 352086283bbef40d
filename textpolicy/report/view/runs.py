"""The runs that a page shows, kept up to date while they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ...errors import UserError
from ...record import layout
from ...record.reader import load_run
from .index import SHOWN, Address, Index, Kind, Query

if TYPE_CHECKING:
    import pyarrow as pa

PER_PAGE = 50


@dataclass(frozen=True, slots=True)
class Listed:
    """The line of one completion in the list."""

    address: Address
    figures: dict[str, Any]
    prompt: str
    text: str


@dataclass(frozen=True, slots=True)
class Page:
    """The lines of one page of the list."""

    lines: Sequence[Listed]
    total: int
    number: int
    pages: int


class ViewedRun:
    """The completions of one run folder, as a page shows them."""

    def __init__(self, number: int, folder: Path) -> None:
        """Open the run as number ``number`` of the page. Raises UserError for a folder that is not a run."""
        load_run(folder)
        self.number, self.folder, self.name = number, folder, folder.resolve().name
        self.indices: dict[str, Index] = {kind: Index(folder / kind) for kind in get_args(Kind)}

    @property
    def over(self) -> bool:
        """The state of the run: True once it has finished."""
        return (self.folder / layout.SUMMARY).is_file()

    def index(self, kind: str) -> Index:
        """Return the index of ``kind``, up to date. Raises UserError for an unknown kind."""
        if kind not in self.indices:
            raise UserError(f"there are no {kind!r}; ask for {' or '.join(self.indices)}")
        self.indices[kind].refresh()
        return self.indices[kind]

    def page(self, query: Query) -> Page:
        """Return the completions that match ``query``; a page beyond the last is the last."""
        index = self.index(query.kind)
        found = index.select(query)
        pages = max(1, -(-found.num_rows // PER_PAGE))
        number = min(max(1, query.page), pages)
        places = found.slice((number - 1) * PER_PAGE, PER_PAGE)
        return Page(self._lines(query.kind, index, places), found.num_rows, number, pages)

    def siblings(self, address: Address, row: dict[str, Any]) -> list[Listed]:
        """Return the completions in the group of ``row``, itself included."""
        index = self.index(address.kind)
        query = Query(kind=address.kind, step_from=row["step"], step_to=row["step"], group=row["group"], sort="oldest")  # type: ignore[arg-type]  # index() has checked it
        lines = self._lines(address.kind, index, index.select(query))
        return [line for line in lines if line.address.file == address.file]

    def _lines(self, kind: str, index: Index, places: pa.Table) -> list[Listed]:
        """Return the lines of the list for the completions at ``places``."""
        lines: list[Listed] = []
        for row, shown in zip(places.to_pylist(), index.read(places, SHOWN), strict=True):
            address = Address(self.number, kind, index.files[row["file"]].stem, row["row"])
            lines.append(Listed(address, row, shown["prompt"], shown["text"]))
        return lines
