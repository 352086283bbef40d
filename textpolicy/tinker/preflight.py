"""Before a run on a service begins: a few tokens there and back."""

from __future__ import annotations

from ..engine import Engine, Sampling
from ..environment.single_turn import TextGenerationEnv
from ..errors import ServiceError
from ..loop.collect import collect
from ..loop.on_policy import measure

MAX_GAP = 1.0  # nats, mean, between sampler and learner: 0.1 is half precision, more a misalignment
TOKENS = 16  # of the completion, at most


def preflight(engine: Engine, env: TextGenerationEnv, temperature: float) -> None:
    """The server samples, says when it stopped, and its learner sees what was sampled.

    Raises UserError and ServiceError.
    """
    [episode] = collect(engine, env, [0], 1, Sampling(min(TOKENS, env.max_tokens), temperature), pieces=False)
    gap = measure(engine, [episode])
    if not gap.mean <= MAX_GAP:
        raise ServiceError(
            f"the server's learner and sampler differ by {gap.mean:.3g} nats on average over {gap.tokens} tokens: no "
            "run on it would be on-policy; check that both serve the same weights"
        )
