"""The rows of a data set from the hub, or from the local cache if the hub does not answer within seconds."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import Any

from .._system.extras import extra
from ..errors import UserError

INSTALL = "textpolicy[data]"
PATIENCE = 3.0  # seconds to wait for the hub; the library itself waits for half a minute


def hub_rows(name: str, configs: Sequence[str], splits: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each split of a data set, those of its ``configs`` one after another.

    They come from the hub, or from the library's cache if the hub does not answer. Raises UserError when neither
    has them, MissingDependencyError without the package datasets.
    """
    library, reached = extra("datasets", INSTALL), reachable(name)
    before = library.config.HF_HUB_OFFLINE
    library.config.HF_HUB_OFFLINE = before or not reached  # offline, the library reads its cache at once
    try:
        return {s: [row for c in configs for row in library.load_dataset(name, c, split=s)] for s in splits}
    except (OSError, ValueError, library.exceptions.DatasetsError) as error:
        why = str(error).splitlines()[0] if reached else "the hub does not answer, and the cache does not have it"
        raise UserError(f"the data set {name} cannot be read ({why}); check the network, or use other data") from error
    finally:
        library.config.HF_HUB_OFFLINE = before


def reachable(name: str, seconds: float = PATIENCE) -> bool:
    """Return whether the hub describes the data set within ``seconds``; always False with HF_HUB_OFFLINE=1."""
    hub = extra("huggingface_hub", INSTALL)
    if hub.constants.HF_HUB_OFFLINE:
        return False
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(_describes(hub, name, seconds)), daemon=True).start()
    try:
        return answers.get(timeout=seconds)  # a look-up of the host name has no time limit of its own
    except queue.Empty:
        return False


def _describes(hub: Any, name: str, seconds: float) -> bool:
    """Return whether the hub describes the data set."""
    try:
        hub.HfApi().dataset_info(name, timeout=seconds)
    except Exception:  # noqa: BLE001 - the client's exceptions share no base class; all mean that the data set cannot be read
        return False
    return True
