"""The transforms of ``Trainer``'s advantages, token by token: their protocol, and the stages of recipes as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..algorithms.arrays import like, values_of
from ..algorithms.credit import Credit, Rewards
from ..algorithms.hicra import boost_entropy
from ..algorithms.pipeline import Stage, Uncertainty
from ..algorithms.selection import row_and_position
from ..algorithms.sepa import Pooling, pool_execution
from ..errors import UserError
from ..losses import Array
from ..types import Floats

Transform = Callable[[Array, dict[str, Any]], Array]  # (N,) advantages and the batch -> (N,) advantages
MarkPlanning = Callable[[Sequence[np.ndarray]], np.ndarray]  # ids of each completion -> (N,) bool


@runtime_checkable
class PreparesBatch(Protocol):
    """The protocol of a transform that adds to the batch before it is called."""

    def prepare_batch(self, batch: dict[str, Any]) -> None:
        """Change ``batch`` in place."""


@runtime_checkable
class PostprocessesBatch(Protocol):
    """The protocol of a transform that reads the batch after the update."""

    def postprocess_batch(self, batch: dict[str, Any]) -> None:
        """Read ``batch``; numbers put into ``batch["transform_metrics"]`` are returned by ``Trainer.train``."""


class CreditTransform:
    """The ``stages`` applied to the advantages of a step, after planning tokens are made to stand out.

    Planning tokens stand out because SEPA pools the uncertainty of the other tokens with its strength of this step,
    or because theirs is raised by ``hicra_gamma`` times its mean. ``uncertainty`` is the exact entropy of the
    rollouts, or their surprisal.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        uncertainty: Uncertainty = "entropy",
        mark: MarkPlanning | None = None,
        pooling: Pooling | None = None,
        hicra_gamma: float = 0.0,
    ) -> None:
        """Check the settings; ``mark`` finds the planning tokens (None: there are none). Raises UserError."""
        if uncertainty not in ("entropy", "surprisal"):
            raise UserError(f"uncertainty is {uncertainty!r}; set it to entropy or surprisal")
        if not 0 <= hicra_gamma < np.inf:
            raise UserError(f"hicra_gamma is {hicra_gamma}; set it to 0 or more")
        self.stages, self.uncertainty, self.mark, self.hicra_gamma = tuple(stages), uncertainty, mark, hicra_gamma
        self.sepa = None if pooling is None else pooling.controller()

    def __call__(self, advantages: Array, batch: Mapping[str, Any]) -> Array:
        """Return (N,) advantages of the same kind of array; ``batch`` is the dict of ``selection``.

        Every call is one step of SEPA. Raises UserError when the batch lacks what the stages need.
        """
        values = values_of(advantages).astype(np.float64)
        lengths = np.asarray(_entry(batch, "episode_lengths"))
        row, position = row_and_position(lengths, len(values))
        rewards = Rewards.of(values_of(_entry(batch, "rewards")), np.asarray(_entry(batch, "prompt_ids")))
        planning = np.zeros(int(lengths.sum()), bool)
        if self.mark is not None:
            tokens = np.asarray(_entry(batch, "act"))
            planning = self.mark([completion[:n] for completion, n in zip(tokens, lengths, strict=True)])
        if self.uncertainty == "entropy" and "token_entropies" not in batch:
            raise UserError(
                "the transform weighs by exact entropy and an episode has none; let the policy return entropy "
                "for every token, as create_policy does"
            )
        uncertainty: Floats  # (N,) float64, nats
        if self.uncertainty == "entropy":
            uncertainty = values_of(batch["token_entropies"]).astype(np.float64)
        else:
            uncertainty = -values_of(_entry(batch, "logprob")).astype(np.float64)
        if not len(values) == len(uncertainty) == len(planning):
            raise UserError(
                f"there are {len(values)} advantages, {len(uncertainty)} uncertainties and {len(planning)} tokens; "
                "give one per token"
            )
        if self.sepa is None:
            uncertainty = boost_entropy(uncertainty, planning, row, self.hicra_gamma)
        else:
            judged = values_of(_entry(batch, "binary_rewards"))
            known = judged[~np.isnan(judged)]
            correct_rate = float(known.mean()) if known.size else None
            strength = self.sepa.advance(correct_rate, uncertainty[~planning])
            uncertainty = pool_execution(uncertainty, planning, row, strength)
        credit = Credit(
            advantage=values,
            uncertainty=uncertainty,
            entropy=uncertainty if self.uncertainty == "entropy" else None,
            planning=planning,
            penalty=np.zeros_like(values),
            row=row,
            position=position,
            reward=rewards.value,
            group=rewards.group,
        )
        for stage in self.stages:
            credit = stage(credit)
        return like(advantages, credit.advantage)

    def postprocess_batch(self, batch: dict[str, Any]) -> None:
        """Report SEPA's strength and gate of this step."""
        if self.sepa is not None:
            metrics = {"sepa_lambda": self.sepa.strength, "sepa_gate_open": float(self.sepa.gate_open)}
            batch["transform_metrics"] = {**batch.get("transform_metrics", {}), **metrics}

    def state_dict(self) -> dict[str, Any]:
        """Return SEPA's progress as plain JSON values; an empty dict without SEPA."""
        return {} if self.sepa is None else {"sepa": self.sepa.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a ``state_dict``. Raises UserError for the state of a transform with other settings."""
        if set(state) != set(self.state_dict()):
            mine = sorted(self.state_dict())
            raise UserError(f"the state has {sorted(state)} and this transform {mine}; build it as when saved")
        if self.sepa is not None:
            self.sepa.load_state_dict(state["sepa"])


def _entry(batch: Mapping[str, Any], name: str) -> Any:
    """Return an entry of the batch. Raises UserError if it is missing."""
    if name not in batch:
        raise UserError(f"the batch has no {name}; select it with select_recent_data, or leave it to Trainer")
    return batch[name]
