"""The rewards: functions that score completions. Importing this package registers the built-in ones."""

from .basic import accuracy_reward, keyword_reward, length_reward, perplexity_reward
from .batch import create_mlx_optimized_batch_processor
from .contract import Request, RewardFunction, Scored, VerifierFunction
from .correctness import f1_score_reward, math_accuracy_reward
from .countdown import countdown_reward_with_info
from .judging import judge
from .registry import (
    REWARD_REGISTRY,
    VERIFIER_REGISTRY,
    RewardConfig,
    apply_verifiers_to_reward,
    clear_registries,
    create_configured_reward_function,
    get_reward_function,
    get_verifier_function,
    list_registered_functions,
    reward,
    verifier,
)
from .sandbox import Limits, Ran, code_output_reward, run_python
from .scoring import Scorer, call_reward
from .verifiers import (
    coherence_verifier,
    contains_keywords,
    factual_verifier,
    has_greeting,
    length_verifier,
    no_empty_response,
    toxicity_verifier,
)

__all__ = [
    "REWARD_REGISTRY",
    "VERIFIER_REGISTRY",
    "Limits",
    "Ran",
    "Request",
    "RewardConfig",
    "RewardFunction",
    "Scored",
    "Scorer",
    "VerifierFunction",
    "accuracy_reward",
    "apply_verifiers_to_reward",
    "call_reward",
    "clear_registries",
    "code_output_reward",
    "coherence_verifier",
    "contains_keywords",
    "countdown_reward_with_info",
    "create_configured_reward_function",
    "create_mlx_optimized_batch_processor",
    "f1_score_reward",
    "factual_verifier",
    "get_reward_function",
    "get_verifier_function",
    "has_greeting",
    "judge",
    "keyword_reward",
    "length_reward",
    "length_verifier",
    "list_registered_functions",
    "math_accuracy_reward",
    "no_empty_response",
    "perplexity_reward",
    "reward",
    "run_python",
    "toxicity_verifier",
    "verifier",
]
