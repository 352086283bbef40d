"""Environments: prompts, what answers the policy, and the scoring of what it says."""

from .base import Environment
from .conversation import Partner, Reply
from .multi_turn import MultiTurnEnv, ToolEnv
from .text_generation import TextGenerationEnv
from .tools import Tool, ToolCall, parse_calls

__all__ = [
    "Environment",
    "MultiTurnEnv",
    "Partner",
    "Reply",
    "TextGenerationEnv",
    "Tool",
    "ToolCall",
    "ToolEnv",
    "parse_calls",
]
