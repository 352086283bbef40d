"""Sum configured rewards over a batch, as an MLX array."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import UserError
from .contract import Request
from .registry import RewardConfig
from .scoring import Scorer


def create_mlx_optimized_batch_processor(
    configs: Sequence[RewardConfig],
) -> Callable[[Sequence[str], Sequence[str], Sequence[Mapping[str, Any]]], Any]:
    """Return a function of (prompts, completions, examples) that returns the rewards, mx.float32 (B,).

    The rewards are those of ``Scorer(configs)``: params are keyword arguments, names are looked up in the
    registry, verifiers and weights apply, and a reward that raises is a RewardError. Raises UserError for
    unknown names or params, and lists of different lengths.
    """
    scorer = Scorer(list(configs))

    def process(prompts: Sequence[str], completions: Sequence[str], examples: Sequence[Mapping[str, Any]]) -> Any:
        import mlx.core as mx

        sizes = len(prompts), len(completions), len(examples)
        if len(set(sizes)) > 1:
            raise UserError(
                f"{sizes[0]} prompts, {sizes[1]} completions and {sizes[2]} examples; give the same number of each"
            )
        requests = [Request(*row) for row in zip(prompts, completions, examples, strict=True)]
        return mx.array([scored.reward for scored in scorer.score(requests)], dtype=mx.float32)

    return process
