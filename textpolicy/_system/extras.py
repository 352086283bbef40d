"""Import optional packages, or raise an error with the command that installs them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..errors import MissingDependencyError
from .machine import installer


def extra(module: str, install: str) -> Any:
    """Import ``module``. Raises MissingDependencyError with the command that installs ``install``."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise  # installed, but a dependency of it is missing
        raise MissingDependencyError(
            f"{error.name} is not installed; install it with: {installer()} '{install}'"
        ) from error
