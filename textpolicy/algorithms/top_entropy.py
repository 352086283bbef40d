"""Keep the credit of the most uncertain tokens only, the forking tokens (arXiv:2506.01939)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..errors import UserError
from ..types import Floats
from .credit import Credit


@dataclass(frozen=True, slots=True)
class KeepTopEntropy:
    """Keep A_t where H_t is among the share ``top_entropy`` of highest entropies in the batch, else 0.

    The loss is divided by the same number as without this stage: tokens without credit still count.
    """

    top_entropy: float = 0.2

    def __post_init__(self) -> None:
        _refuse_no_share("top_entropy", self.top_entropy)

    def __call__(self, credit: Credit) -> Credit:
        entropy = exact_entropy(credit, "keeping the tokens of highest entropy").astype(np.float32)  # as in TRL
        kept = entropy >= entropy_threshold(entropy, self.top_entropy)
        return replace(credit, advantage=np.where(kept, credit.advantage, 0.0))


def entropy_threshold(entropy: Floats, share: float) -> float:
    """Return the (1 - share)-quantile of (N,) entropies in nats, in their precision; -inf without tokens.

    Where it falls on a token, as with a third of 16 tokens, the error of 1 - share in float64 would drop that token
    about every other time; in float32, TRL's precision, it is kept. Raises UserError.
    """
    _refuse_no_share("share", share)
    return float(np.quantile(entropy, entropy.dtype.type(1 - share))) if len(entropy) else -np.inf


def exact_entropy(credit: Credit, purpose: str, instead: str = "leave it out") -> Floats:
    """Return the (N,) exact entropies of a step; raise UserError, naming the ``purpose``, if there are none."""
    if credit.entropy is None:
        raise UserError(
            f"{purpose} needs exact entropy and the engine reported none; use an engine that does, or {instead}"
        )
    return credit.entropy


def _refuse_no_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise UserError(f"{name} is {value}; set it above 0 and at most to 1, the share of tokens")
