"""Advantages of ``Trainer``, token by token: its transform protocol, and the stages of the recipes in that form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..algorithms.arrays import like, values_of
from ..algorithms.credit import Credit
from ..algorithms.hicra import boost_entropy
from ..algorithms.pipeline import Stage, Uncertainty
from ..algorithms.rewards import Rewards
from ..algorithms.selection import row_and_position
from ..algorithms.sepa import Pooling, pool_execution
from ..errors import UserError
from ..losses import Array

Transform = Callable[[Array, dict[str, Any]], Array]  # (N,) advantages and the batch -> (N,) advantages
MarkPlanning = Callable[[Sequence[np.ndarray]], np.ndarray]  # ids of each completion -> (N,) bool


@runtime_checkable
class PreparesBatch(Protocol):
    """A transform that adds to the batch before it is called."""

    def prepare_batch(self, batch: dict[str, Any]) -> None:
        """Change ``batch`` in place."""


@runtime_checkable
class PostprocessesBatch(Protocol):
    """A transform that looks at the batch after the update."""

    def postprocess_batch(self, batch: dict[str, Any]) -> None:
        """Read ``batch``; numbers put into ``batch["transform_metrics"]`` are returned by ``Trainer.train``."""


class CreditTransform:
    """``stages`` applied to the advantages of a step, after planning tokens were made to stand out.

    For that the uncertainty of the others is pooled with SEPA's strength of this step, or that of
    planning tokens is raised by ``hicra_gamma`` times its mean. ``uncertainty`` is the exact entropy of the
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
        """``mark`` finds the planning tokens; without it there are none. Raises UserError."""
        if uncertainty not in ("entropy", "surprisal"):
            raise UserError(f"uncertainty is {uncertainty!r}; set it to entropy or surprisal")
        if not 0 <= hicra_gamma < np.inf:
            raise UserError(f"hicra_gamma is {hicra_gamma}; set it to 0 or more")
        self.stages, self.uncertainty, self.mark, self.hicra_gamma = tuple(stages), uncertainty, mark, hicra_gamma
        self.sepa = None if pooling is None else pooling.controller()

    def __call__(self, advantages: Array, batch: Mapping[str, Any]) -> Array:
        """(N,) -> (N,), of the same kind; ``batch`` is the dict of ``selection``. One call is one step of SEPA.

        Raises UserError when the batch lacks what the stages need.
        """
        credit = self._credit(values_of(advantages).astype(np.float64), batch)
        for stage in self.stages:
            credit = stage(credit)
        return like(advantages, credit.advantage)

    def postprocess_batch(self, batch: dict[str, Any]) -> None:
        """Report SEPA's strength and gate of this step."""
        if self.sepa is not None:
            metrics = {"sepa_lambda": self.sepa.strength, "sepa_gate_open": float(self.sepa.gate_open)}
            batch["transform_metrics"] = {**batch.get("transform_metrics", {}), **metrics}

    def state_dict(self) -> dict[str, Any]:
        """SEPA's progress as plain JSON values; empty without SEPA."""
        return {} if self.sepa is None else {"sepa": self.sepa.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``. Raises UserError for one of a transform that is made otherwise."""
        if set(state) != set(self.state_dict()):
            mine = sorted(self.state_dict())
            raise UserError(f"the state holds {sorted(state)} and this transform {mine}; build it as when saved")
        if self.sepa is not None:
            self.sepa.load_state_dict(state["sepa"])

    def _credit(self, advantage: np.ndarray, batch: Mapping[str, Any]) -> Credit:
        row, position = row_and_position(_entry(batch, "episode_lengths"), len(advantage))
        rewards = Rewards.of(values_of(_entry(batch, "rewards")), np.asarray(_entry(batch, "prompt_ids")))
        planning, uncertainty = self._planning(batch), self._uncertainty(batch)
        if not len(advantage) == len(uncertainty) == len(planning):
            raise UserError(
                f"there are {len(advantage)} advantages, {len(uncertainty)} uncertainties and {len(planning)} tokens; "
                "give one per token"
            )
        uncertainty = self._standing_out(uncertainty, planning, row, batch)
        return Credit(
            advantage=advantage,
            uncertainty=uncertainty,
            entropy=uncertainty if self.uncertainty == "entropy" else None,
            planning=planning,
            penalty=np.zeros_like(advantage),
            row=row,
            position=position,
            reward=rewards.value,
            group=rewards.group,
        )

    def _uncertainty(self, batch: Mapping[str, Any]) -> np.ndarray:
        if self.uncertainty == "surprisal":
            return -values_of(_entry(batch, "logprob")).astype(np.float64)
        if "token_entropies" not in batch:
            raise UserError(
                "the transform weighs by exact entropy and an episode carried none; let the policy return entropy "
                "for every token, as create_policy does"
            )
        return values_of(batch["token_entropies"]).astype(np.float64)

    def _planning(self, batch: Mapping[str, Any]) -> np.ndarray:
        lengths = np.asarray(_entry(batch, "episode_lengths"))
        if self.mark is None:
            return np.zeros(int(lengths.sum()), bool)
        tokens = np.asarray(_entry(batch, "act"))
        return self.mark([completion[:n] for completion, n in zip(tokens, lengths, strict=True)])

    def _standing_out(
        self, uncertainty: np.ndarray, planning: np.ndarray, row: np.ndarray, batch: Mapping[str, Any]
    ) -> np.ndarray:
        if self.sepa is None:
            return boost_entropy(uncertainty, planning, row, self.hicra_gamma)
        strength = self.sepa.advance(_correct_rate(batch), uncertainty[~planning])
        return pool_execution(uncertainty, planning, row, strength)


def _correct_rate(batch: Mapping[str, Any]) -> float | None:
    """Share of correct completions among those that could be judged."""
    judged = values_of(_entry(batch, "binary_rewards"))
    known = judged[~np.isnan(judged)]
    return float(known.mean()) if known.size else None


def _entry(batch: Mapping[str, Any], name: str) -> Any:
    if name not in batch:
        raise UserError(f"the batch has no {name}; select it with select_recent_data, or leave it to Trainer")
    return batch[name]
