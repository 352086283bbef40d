"""Train language models by reinforcement learning on MLX. Public names are imported at their first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._system.lazy import lazy_names
from ._system.openblas import await_mlx

if TYPE_CHECKING:  # for type checkers and editors; the table below is the same for Python
    from .algorithms.grpo import apply_entropy_weighting as apply_entropy_weighting
    from .algorithms.grpo import compute_advantages as compute_advantages
    from .algorithms.grpo import compute_advantages_dr_grpo as compute_advantages_dr_grpo
    from .algorithms.grpo import compute_advantages_gtpo as compute_advantages_gtpo
    from .algorithms.grpo import compute_gtpo_shaped_rewards as compute_gtpo_shaped_rewards
    from .algorithms.grpo import compute_metrics as compute_metrics
    from .algorithms.grpo import compute_token_entropy as compute_token_entropy
    from .algorithms.grpo import gtpo_loss as gtpo_loss
    from .algorithms.grpo import normalize_gtpo_advantages as normalize_gtpo_advantages
    from .algorithms.grpo import policy_loss as policy_loss
    from .algorithms.gspo import create_gspo_policy_loss as create_gspo_policy_loss
    from .algorithms.gspo import policy_loss_sequence as policy_loss_sequence
    from .algorithms.gspo import policy_loss_token as policy_loss_token
    from .algorithms.hicra import apply_hicra_amplification as apply_hicra_amplification
    from .algorithms.hicra import boost_entropy_with_planning as boost_entropy_with_planning
    from .algorithms.length import apply_length_shaping as apply_length_shaping
    from .algorithms.length import compute_length_penalty as compute_length_penalty
    from .algorithms.length import compute_length_shaping_stats as compute_length_shaping_stats
    from .algorithms.maxrl import compute_advantages_maxrl as compute_advantages_maxrl
    from .algorithms.selection import compute_prompt_group_stats as compute_prompt_group_stats
    from .algorithms.selection import filter_informative_prompts as filter_informative_prompts
    from .algorithms.selection import select_all_data as select_all_data
    from .algorithms.selection import select_informative_data as select_informative_data
    from .algorithms.selection import select_recent_data as select_recent_data
    from .algorithms.sepa import SEPAController as SEPAController
    from .buffer import Buffer as Buffer
    from .environment import TextGenerationEnv as TextGenerationEnv
    from .environment import TextGenerationEnvironment as TextGenerationEnvironment
    from .environment.text.pieces import identify_planning_tokens as identify_planning_tokens
    from .generation.lora import apply_lora as apply_lora
    from .generation.lora import create_lora_setup as create_lora_setup
    from .generation.lora import create_qlora_setup as create_qlora_setup
    from .generation.lora import extract_params as extract_params
    from .generation.lora import freeze_base as freeze_base
    from .generation.lora import merge_weights as merge_weights
    from .generation.mlx_generation import create_policy as create_policy
    from .generation.mlx_generation import decode as decode
    from .generation.mlx_generation import encode as encode
    from .generation.mlx_generation import generate_tokens as generate_tokens
    from .generation.reload import create_auto_reload_setup as create_auto_reload_setup
    from .generation.reload import create_reloadable_policy as create_reloadable_policy
    from .generation.reload import reload_model as reload_model
    from .generation.reload import save_adapters as save_adapters
    from .mlx.models import load_model as load_model
    from .rewards import accuracy_reward as accuracy_reward
    from .rewards import keyword_reward as keyword_reward
    from .rewards import length_reward as length_reward
    from .rewards import perplexity_reward as perplexity_reward
    from .rewards import reward as reward
    from .rewards import verifier as verifier
    from .rollout import RolloutCoordinator as RolloutCoordinator
    from .rollout import RolloutRunner as RolloutRunner
    from .rollout import create_strategy as create_strategy
    from .training import Trainer as Trainer
    from .training import build_gtpo_hicra_transform as build_gtpo_hicra_transform
    from .training import build_gtpo_transform as build_gtpo_transform
    from .validate import validate_installation as validate_installation

    __version__: str

_HOME = {  # public name -> the module it lives in
    "Buffer": "buffer",
    "RolloutCoordinator": "rollout",
    "RolloutRunner": "rollout",
    "SEPAController": "algorithms.sepa",
    "TextGenerationEnv": "environment",
    "TextGenerationEnvironment": "environment",
    "Trainer": "training",
    "accuracy_reward": "rewards",
    "apply_entropy_weighting": "algorithms.grpo",
    "apply_hicra_amplification": "algorithms.hicra",
    "apply_length_shaping": "algorithms.length",
    "apply_lora": "generation.lora",
    "boost_entropy_with_planning": "algorithms.hicra",
    "build_gtpo_hicra_transform": "training",
    "build_gtpo_transform": "training",
    "compute_advantages": "algorithms.grpo",
    "compute_advantages_dr_grpo": "algorithms.grpo",
    "compute_advantages_gtpo": "algorithms.grpo",
    "compute_advantages_maxrl": "algorithms.maxrl",
    "compute_gtpo_shaped_rewards": "algorithms.grpo",
    "compute_length_penalty": "algorithms.length",
    "compute_length_shaping_stats": "algorithms.length",
    "compute_metrics": "algorithms.grpo",
    "compute_prompt_group_stats": "algorithms.selection",
    "compute_token_entropy": "algorithms.grpo",
    "create_auto_reload_setup": "generation.reload",
    "create_gspo_policy_loss": "algorithms.gspo",
    "create_lora_setup": "generation.lora",
    "create_policy": "generation.mlx_generation",
    "create_qlora_setup": "generation.lora",
    "create_reloadable_policy": "generation.reload",
    "create_strategy": "rollout",
    "decode": "generation.mlx_generation",
    "encode": "generation.mlx_generation",
    "extract_params": "generation.lora",
    "filter_informative_prompts": "algorithms.selection",
    "freeze_base": "generation.lora",
    "generate_tokens": "generation.mlx_generation",
    "gtpo_loss": "algorithms.grpo",
    "identify_planning_tokens": "environment.text.pieces",
    "keyword_reward": "rewards",
    "length_reward": "rewards",
    "load_model": "mlx.models",
    "merge_weights": "generation.lora",
    "normalize_gtpo_advantages": "algorithms.grpo",
    "perplexity_reward": "rewards",
    "policy_loss": "algorithms.grpo",
    "policy_loss_sequence": "algorithms.gspo",
    "policy_loss_token": "algorithms.gspo",
    "reload_model": "generation.reload",
    "reward": "rewards",
    "save_adapters": "generation.reload",
    "select_all_data": "algorithms.selection",
    "select_informative_data": "algorithms.selection",
    "select_recent_data": "algorithms.selection",
    "validate_installation": "validate",
    "verifier": "rewards",
}

__all__ = [*_HOME]

_public = lazy_names(__name__, {name: f".{module}" for name, module in _HOME.items()})

await_mlx()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("textpolicy")
    return _public(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, "__version__"})
