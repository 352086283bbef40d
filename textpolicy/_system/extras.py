"""Packages that only some parts need: imported when they do, or refused with the line that installs them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..errors import MissingDependencyError


def extra(module: str, install: str) -> Any:
    """The ``module`` of an optional package. Raises MissingDependencyError, which says to pip install ``install``."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise  # it is there, and lacks something of its own
        raise MissingDependencyError(
            f"{error.name} is not installed; install it with: pip install '{install}'"
        ) from error
