"""Seed, save and restore the global random streams of Python and NumPy, which rewards and libraries may use."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np


def seed_streams(seed: int) -> None:
    """Seed both streams."""
    random.seed(seed)
    np.random.seed(seed % 2**32)


def streams() -> dict[str, Any]:
    """Return the state of both streams, as JSON values."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
    }


def restore_streams(state: Mapping[str, Any]) -> None:
    """Restore both streams to a state that ``streams`` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), position, has_gauss, cached))


@contextmanager
def untouched() -> Iterator[None]:
    """Restore both streams at the end: SDKs draw random delays for their retries, in threads too.

    Outside the main thread nothing is restored, because rewards in the main thread may draw meanwhile.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
