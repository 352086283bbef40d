"""The random streams that Python and NumPy share with everybody, such as a reward that draws; ours come from seeds."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np


def seed_streams(seed: int) -> None:
    """Begin both anew."""
    random.seed(seed)
    np.random.seed(seed % 2**32)


def streams() -> dict[str, Any]:
    """Where both are, as plain JSON values."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
    }


def restore_streams(state: Mapping[str, Any]) -> None:
    """Put both where ``streams`` found them."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), position, has_gauss, cached))


@contextmanager
def untouched() -> Iterator[None]:
    """Both are afterwards where they were, whatever other threads draw: SDKs space their retries by chance.

    In another thread than the main one, whose rewards may be drawing meanwhile, nothing is put back.
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
