"""The environments: prompts, replies to the policy, and the scoring of its completions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._system.lazy import lazy_names

if TYPE_CHECKING:
    from ..generation.suites import TextGenerationEnvironment as TextGenerationEnvironment
    from ..generation.suites import TextGenerationTask as TextGenerationTask
    from ..generation.suites import get_task_suite as get_task_suite
    from ..generation.suites import list_task_suites as list_task_suites
    from ..generation.suites import register_task_suite as register_task_suite
    from .base import DrivenEnv as DrivenEnv
    from .base import Environment as Environment
    from .libraries.gym import GymAdapter as GymAdapter
    from .libraries.gym import GymnasiumTextEnv as GymnasiumTextEnv
    from .libraries.gym import VectorizedEnvironment as VectorizedEnvironment
    from .libraries.gym import make_vectorized_env as make_vectorized_env
    from .libraries.reasoning_gym import reasoning_gym_env as reasoning_gym_env
    from .libraries.verifiers import VerifiersEnv as VerifiersEnv
    from .libraries.verifiers import verifiers_env as verifiers_env
    from .multi_turn import MultiTurnEnv as MultiTurnEnv
    from .multi_turn import ToolEnv as ToolEnv
    from .rows import env_from_rows as env_from_rows
    from .rows import read_rows as read_rows
    from .single_turn import TextGenerationEnv as TextGenerationEnv
    from .text.conversation import Partner as Partner
    from .text.conversation import Reply as Reply
    from .tools import Tool as Tool
    from .tools import ToolCall as ToolCall
    from .tools import parse_calls as parse_calls

_HOME = {  # public name -> the module it is in
    "DrivenEnv": ".base",
    "Environment": ".base",
    "GymAdapter": ".libraries.gym",
    "GymnasiumTextEnv": ".libraries.gym",
    "MultiTurnEnv": ".multi_turn",
    "Partner": ".text.conversation",
    "Reply": ".text.conversation",
    "TextGenerationEnv": ".single_turn",
    "TextGenerationEnvironment": "..generation.suites",
    "TextGenerationTask": "..generation.suites",
    "Tool": ".tools",
    "ToolCall": ".tools",
    "ToolEnv": ".multi_turn",
    "VectorizedEnvironment": ".libraries.gym",
    "VerifiersEnv": ".libraries.verifiers",
    "env_from_rows": ".rows",
    "get_task_suite": "..generation.suites",
    "list_task_suites": "..generation.suites",
    "make_vectorized_env": ".libraries.gym",
    "parse_calls": ".tools",
    "read_rows": ".rows",
    "reasoning_gym_env": ".libraries.reasoning_gym",
    "register_task_suite": "..generation.suites",
    "verifiers_env": ".libraries.verifiers",
}

__all__ = [*_HOME]
__getattr__ = lazy_names(__name__, _HOME)
