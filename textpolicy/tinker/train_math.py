"""The documented path of ``python -m textpolicy.tinker.train_math``; the program is ``textpolicy.run.train_math``."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """Return a name of the program, which this package, being what it builds on, does not import by itself."""
    return getattr(import_module("textpolicy.run.train_math"), name)


if __name__ == "__main__":
    sys.exit(import_module("textpolicy.run.train_math").main())
