"""Rows of a data set on the hub, which is asked for a moment only: out of its reach, what was read before counts."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .._system.extras import extra
from ..errors import UserError

INSTALL = "textpolicy[data]"
PATIENCE = 3.0  # seconds that the hub has to answer; the library itself waits for half a minute


def hub_rows(name: str, configs: Sequence[str], splits: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each split of a data set, its ``configs`` one after another.

    They come from the hub, or from the library's cache where the hub does not answer. Raises UserError when neither
    has them, MissingDependencyError without the package datasets.
    """
    library, reached = extra("datasets", INSTALL), reachable(name)
    try:
        with _asking(library, reached):
            return {s: [row for c in configs for row in library.load_dataset(name, c, split=s)] for s in splits}
    except (OSError, ValueError, library.exceptions.DatasetsError) as error:
        why = str(error).splitlines()[0] if reached else "the hub does not answer, and it was not read here before"
        raise UserError(f"the data set {name} cannot be read ({why}); check the network, or take other data") from error


def reachable(name: str, seconds: float = PATIENCE) -> bool:
    """Whether the hub describes the data set within so many ``seconds``; it is not asked with HF_HUB_OFFLINE=1."""
    hub = extra("huggingface_hub", INSTALL)
    if hub.constants.HF_HUB_OFFLINE:
        return False
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(_describes(hub, name, seconds)), daemon=True).start()
    try:
        return answers.get(timeout=seconds)  # looking up a name knows no time limit of its own
    except queue.Empty:
        return False


def _describes(hub: Any, name: str, seconds: float) -> bool:
    try:
        hub.HfApi().dataset_info(name, timeout=seconds)
    except Exception:  # noqa: BLE001 - its client's exceptions are no one family, and all mean that it cannot be read
        return False
    return True


@contextmanager
def _asking(library: Any, allowed: bool) -> Iterator[None]:
    """Inside, the library asks the hub only if ``allowed``, and else reads its cache at once."""
    before = library.config.HF_HUB_OFFLINE
    library.config.HF_HUB_OFFLINE = before or not allowed
    try:
        yield
    finally:
        library.config.HF_HUB_OFFLINE = before
