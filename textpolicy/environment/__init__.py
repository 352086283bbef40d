"""Environments: prompts, and the scoring of what a policy answers."""

from .base import Environment
from .text_generation import TextGenerationEnv

__all__ = ["Environment", "TextGenerationEnv"]
