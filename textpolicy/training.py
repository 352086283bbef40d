"""``Trainer``: one optimiser step from the episodes of a buffer, under an advantage and a loss of your own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .buffer import Buffer
from .errors import UserError
from .types import Batch, Episode

logger = logging.getLogger(__name__)


class Trainer:
    """Trains ``model`` on buffered episodes, a step per call of ``train``.

    ``advantage_fn(rewards)`` is called once for each group of episodes, with their rewards (G,)
    float32, and returns (G,) advantages. ``loss_fn(old_logprobs, new_logprobs, advantages)`` gets
    every sampled token of the buffer, episode after episode in three flat arrays (N,) float32, and
    returns the scalar to minimise; ``metrics_fn``, of the same arguments, returns a dict of numbers.
    All arrays are MLX arrays; ``optimizer`` is one of ``mlx.optimizers``.
    """

    def __init__(
        self,
        model: Any,
        advantage_fn: Callable[[Any], Any],
        loss_fn: Callable[[Any, Any, Any], Any],
        optimizer: Any,
        *,
        max_grad_norm: float = 0.5,
        metrics_fn: Callable[[Any, Any, Any], Mapping[str, float]] | None = None,
        metrics_interval: int = 10,
        buffer: Buffer | None = None,
        on_policy: bool = True,
    ) -> None:
        """Link ``buffer``, if there is one.

        Longer gradients are scaled down to ``max_grad_norm``; ``float("inf")`` leaves them alone.
        ``metrics_fn`` is called in every ``metrics_interval``-th step, the first included.
        ``on_policy`` empties the buffer after a step. Raises UserError.
        """
        from .mlx.engine import MLXEngine
        from .mlx.lora import trainable

        if not trainable(model):
            raise UserError("the model has no trainable parameters; attach a LoRA adapter, or call model.unfreeze()")
        if not max_grad_norm > 0:
            raise UserError(f"max_grad_norm is {max_grad_norm}; set it above 0 (float('inf') leaves gradients alone)")
        if metrics_interval < 1:
            raise UserError(f"metrics_interval is {metrics_interval}; set it to 1 or more")
        self.model, self.advantage_fn, self.loss_fn = model, advantage_fn, loss_fn
        self.metrics_fn, self.metrics_interval = metrics_fn, metrics_interval
        self.buffer, self.on_policy = buffer, on_policy
        self._engine = MLXEngine(model, stop=(), optimizer=optimizer, max_grad_norm=max_grad_norm)
        self._steps = 0

    @property
    def step_count(self) -> int:
        """The number of steps done."""
        return self._steps

    def link_buffer(self, buffer: Buffer) -> None:
        """Let ``train()`` read ``buffer``."""
        self.buffer = buffer

    def unlink_buffer(self) -> None:
        """Forget the linked buffer."""
        self.buffer = None

    def train(self, rollout_data: Buffer | None = None) -> dict[str, float]:
        """One step on the complete episodes of ``rollout_data``, or of the linked buffer.

        Returns loss, step (from 0), grad_norm (before scaling down) and, in its turn, what
        ``metrics_fn`` says of the updated model. When every advantage is 0 nothing moves, and
        grad_norm is 0. Raises UserError when there is no buffer, or episodes that cannot be
        trained on; then nothing has moved and the buffer is as it was.
        """
        from .mlx.flat import FlatTokens, advantages_per_group

        buffer = self._buffer_to_read(rollout_data)
        episodes = [episode.as_training() for episode in buffer.episodes]
        advantages = advantages_per_group(self.advantage_fn, episodes)
        tokens = FlatTokens.of(Batch.pack(episodes, _over_sampled_tokens(episodes, advantages)))
        if advantages.any():
            loss, grads = tokens.gradients(self.model, self.loss_fn)
            grad_norm = self._engine.apply(grads)
        else:
            loss, grad_norm = float(tokens.apply(self.model, self.loss_fn).item()), 0.0
            _say_why(episodes)
        result = {"loss": loss, "step": self._steps, "grad_norm": grad_norm}
        if self.metrics_fn is not None and self._steps % self.metrics_interval == 0:
            result = {**tokens.apply(self.model, self.metrics_fn), **result}
        if self.on_policy:
            buffer.clear()
        self._steps += 1
        return result

    def _buffer_to_read(self, given: Buffer | None) -> Buffer:
        buffer = self.buffer if given is None else given
        if buffer is None:
            raise UserError("the Trainer has no buffer; pass one to train(), or link it with link_buffer()")
        if not isinstance(buffer, Buffer):
            raise UserError(
                f"train() got a {type(buffer).__name__}; pass the Buffer that RolloutRunner.collect returns"
            )
        return buffer


def _over_sampled_tokens(episodes: Sequence[Episode], advantages: np.ndarray) -> list[np.ndarray]:
    """(L,) per episode: its advantage on each sampled token, 0 on the prompt."""
    return [np.where(e.mask, a, 0).astype(np.float32) for e, a in zip(episodes, advantages, strict=True)]


def _say_why(episodes: Sequence[Episode]) -> None:
    if len({e.group for e in episodes}) == len(episodes):
        logger.warning(
            "nothing moved: every episode is a group of its own and every advantage 0; "
            "give TextGenerationEnv a group_size of 2 or more, so that completions of a prompt can be compared"
        )
