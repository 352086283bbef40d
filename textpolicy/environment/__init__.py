"""Environments: prompts, what answers the policy, and the scoring of what it says."""

from .base import DrivenEnv, Environment
from .conversation import Partner, Reply
from .gym import GymAdapter, GymnasiumTextEnv, VectorizedEnvironment, make_vectorized_env
from .multi_turn import MultiTurnEnv, ToolEnv
from .reasoning_gym import reasoning_gym_env
from .rows import env_from_rows, read_rows
from .suites import (
    TextGenerationEnvironment,
    TextGenerationTask,
    get_task_suite,
    list_task_suites,
    register_task_suite,
)
from .text_generation import TextGenerationEnv
from .tools import Tool, ToolCall, parse_calls
from .verifiers import VerifiersEnv, verifiers_env

__all__ = [
    "DrivenEnv",
    "Environment",
    "GymAdapter",
    "GymnasiumTextEnv",
    "MultiTurnEnv",
    "Partner",
    "Reply",
    "TextGenerationEnv",
    "TextGenerationEnvironment",
    "TextGenerationTask",
    "Tool",
    "ToolCall",
    "ToolEnv",
    "VectorizedEnvironment",
    "VerifiersEnv",
    "env_from_rows",
    "get_task_suite",
    "list_task_suites",
    "make_vectorized_env",
    "parse_calls",
    "read_rows",
    "reasoning_gym_env",
    "register_task_suite",
    "verifiers_env",
]
