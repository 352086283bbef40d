"""Reinforcement learning for text generation on MLX. Public names are imported when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._openblas import await_mlx

if TYPE_CHECKING:  # for type checkers and editors; the table below says the same to Python
    from .algorithms.grpo import compute_advantages as compute_advantages
    from .algorithms.grpo import compute_advantages_dr_grpo as compute_advantages_dr_grpo
    from .algorithms.grpo import compute_metrics as compute_metrics
    from .algorithms.grpo import policy_loss as policy_loss
    from .buffer import Buffer as Buffer
    from .environment import TextGenerationEnv as TextGenerationEnv
    from .mlx.models import load_model as load_model
    from .mlx.policy import create_policy as create_policy
    from .mlx.policy import decode as decode
    from .mlx.policy import encode as encode
    from .mlx.policy import generate_tokens as generate_tokens
    from .rewards import accuracy_reward as accuracy_reward
    from .rewards import keyword_reward as keyword_reward
    from .rewards import length_reward as length_reward
    from .rewards import perplexity_reward as perplexity_reward
    from .rewards import reward as reward
    from .rewards import verifier as verifier
    from .rollout import RolloutRunner as RolloutRunner
    from .rollout import create_strategy as create_strategy
    from .training import Trainer as Trainer
    from .validate import validate_installation as validate_installation

    __version__: str

_HOME = {  # public name -> the module it lives in
    "Buffer": "buffer",
    "RolloutRunner": "rollout",
    "TextGenerationEnv": "environment",
    "Trainer": "training",
    "accuracy_reward": "rewards",
    "compute_advantages": "algorithms.grpo",
    "compute_advantages_dr_grpo": "algorithms.grpo",
    "compute_metrics": "algorithms.grpo",
    "create_policy": "mlx.policy",
    "create_strategy": "rollout",
    "decode": "mlx.policy",
    "encode": "mlx.policy",
    "generate_tokens": "mlx.policy",
    "keyword_reward": "rewards",
    "length_reward": "rewards",
    "load_model": "mlx.models",
    "perplexity_reward": "rewards",
    "policy_loss": "algorithms.grpo",
    "reward": "rewards",
    "validate_installation": "validate",
    "verifier": "rewards",
}

__all__ = [*_HOME]

await_mlx()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("textpolicy")
    if name not in _HOME:
        raise AttributeError(f"module 'textpolicy' has no attribute {name!r}", name=name)
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, "__version__"})
