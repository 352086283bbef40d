"""The documented import path of the text environments in ``single_turn.py`` and ``generation/suites.py``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .single_turn import TextGenerationEnv as TextGenerationEnv

if TYPE_CHECKING:
    from ..generation.suites import TextGenerationEnvironment as TextGenerationEnvironment
    from ..generation.suites import TextGenerationTask as TextGenerationTask

_IN_SUITES = ("TextGenerationEnvironment", "TextGenerationTask")  # imported on first use: they sample from a model


def __getattr__(name: str) -> Any:
    if name not in _IN_SUITES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
    return getattr(import_module("textpolicy.generation.suites"), name)
