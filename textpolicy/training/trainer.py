"""Take optimiser steps on collected episodes, with an advantage and a loss of your own: ``Trainer``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..algorithms.grams import DEFAULT_STRATEGIC_GRAMS
from ..algorithms.gtpo import Normalisation, ShapeByEntropy
from ..algorithms.hicra import AmplifyPlanning
from ..algorithms.pipeline import Stage, Uncertainty
from ..algorithms.planning import PlanningGrams, planning_masks
from ..algorithms.selection import as_episodes, select_all_data
from ..algorithms.sepa import Pooling
from ..algorithms.weighting import WeightByUncertainty
from ..buffer import Buffer
from ..environment.text.pieces import Pieces, text_decode
from ..errors import UserError, gone, refuse_outside, unknown_name
from ..rewards.registry import accepted_keywords
from ..rollout.clock import Clock
from ..rollout.coordinator import RolloutCoordinator
from ..types import Episode
from .transforms import CreditTransform, MarkPlanning, PostprocessesBatch, PreparesBatch, Transform

logger = logging.getLogger(__name__)

Selector = Callable[[Buffer], Mapping[str, Any]]


class Trainer:
    """The trainer of ``model`` on collected episodes, one step per call of ``train``.

    ``advantage_fn(rewards)`` is called once for each group of episodes, with their scored rewards (G,)
    float32, and returns (G,) advantages; an unscorable episode gets 0. ``loss_fn(old_logprobs,
    new_logprobs, advantages)`` gets every sampled token, episode after episode in three flat arrays (N,)
    float32, and returns the scalar to minimise; ``metrics_fn``, of the same arguments, returns a dict of
    numbers. If its signature names ``sequence_lengths``, either also gets the number of tokens (B,) int32 of each
    episode that has any. All arrays are MLX arrays; ``optimizer`` is one of ``mlx.optimizers``.
    """

    def __init__(
        self,
        model: Any,
        advantage_fn: Callable[[Any], Any],
        loss_fn: Callable[..., Any],
        optimizer: Any,
        get_logprobs_fn: None = None,
        metrics_fn: Callable[..., Mapping[str, float]] | None = None,
        max_grad_norm: float = 0.5,
        compile_training: bool | Literal["auto"] = "auto",
        gradient_checkpointing: bool | int = False,
        micro_batch_size: int | None = None,
        buffer: Buffer | None = None,
        data_selector_fn: Selector | None = None,
        auto_save_lora: bool | str | Path | None = None,
        metrics_interval: int = 10,
        advantage_transform_fn: Transform | None = None,
        advantage_reward_key: str = "rewards",
        profile: bool = False,
        on_policy: bool = True,
    ) -> None:
        """Link ``buffer``, if there is one.

        Gradients longer than ``max_grad_norm`` are scaled down to it; ``float("inf")`` leaves them alone.
        Three settings change memory and speed only. ``micro_batch_size`` episodes at a time are read and
        differentiated, for one more forward pass; without it all are, in one. ``gradient_checkpointing`` recomputes
        the activations of every block (True), or of every k-th block (k), instead of storing them.
        ``compile_training`` compiles the optimiser's step, and micro-batches of recurring shapes; "auto"
        does so on a GPU only. ``profile`` adds the seconds and the share of each part of a step to its result.
        ``metrics_fn`` is called in every ``metrics_interval``-th step, the first included.
        ``data_selector_fn(buffer)`` chooses what of a buffer is trained on; without it everything is.
        ``advantage_reward_key`` names the selected rewards that ``advantage_fn`` gets: "rewards", or
        "binary_rewards". ``advantage_transform_fn(advantages, batch)`` turns the advantages (N,) of the
        tokens into others (N,). Its ``batch`` holds the selected data (``algorithms.selection`` lists it) and the
        step; ``prepare_batch(batch)`` before it and ``postprocess_batch(batch)`` after the update are called
        on a transform that has them. ``auto_save_lora`` is the path to which the adapter is written after every
        step, a folder or a .safetensors file; True is the path of ``create_lora_setup``, and without it nothing is
        written. ``on_policy`` empties the buffer after a step. ``get_logprobs_fn`` of version 0.1.11 is refused: the
        log-probs are those that episodes were sampled with. Raises UserError.
        """
        from ..generation.reload import auto_save_path
        from ..mlx.engine import MLXEngine
        from ..mlx.memory import limit_memory
        from ..mlx.score.micro_batches import Gradients
        from .flat import FlatPasses

        if get_logprobs_fn is not None:
            raise UserError("get_logprobs_fn is given and the Trainer computes log-probs itself; leave it out")
        _check(model, max_grad_norm, compile_training, gradient_checkpointing, micro_batch_size, metrics_interval)
        self.model, self.advantage_fn, self.metrics_interval = model, advantage_fn, metrics_interval
        self.advantage_transform_fn, self.advantage_reward_key = advantage_transform_fn, advantage_reward_key
        self.buffer, self.data_selector_fn, self.on_policy = buffer, data_selector_fn, on_policy
        self._adapter_path = auto_save_path(model, auto_save_lora)
        self._loss = _with_lengths(loss_fn)
        self._metrics = None if metrics_fn is None else _with_lengths(metrics_fn)
        limit_memory()
        self._engine = MLXEngine(
            model, stop=(), optimizer=optimizer, max_grad_norm=max_grad_norm, compile=compile_training
        )
        every = int(gradient_checkpointing)
        gradients = Gradients(model, checkpoint_every=every, compiled=self._engine.compiled)
        self._passes = FlatPasses(model, gradients, micro_batch_size, every)
        self._steps, self.profile = 0, profile

    @property
    def step_count(self) -> int:
        """The number of steps done."""
        return self._steps

    def link_buffer(self, buffer: Buffer, data_selector_fn: Selector | None = None) -> None:
        """Let ``train()`` read ``buffer``; ``data_selector_fn``, if given, replaces the one before."""
        self.buffer, self.data_selector_fn = buffer, data_selector_fn or self.data_selector_fn

    def unlink_buffer(self) -> None:
        """Forget the linked buffer."""
        self.buffer = None

    def train(self, rollout_data: Buffer | Mapping[str, Any] | None = None) -> dict[str, float]:
        """Take one step on the episodes of ``rollout_data``, or of the linked buffer.

        A dict is one that a selector returns, such as ``select_recent_data``. Returns loss, step (from 0),
        grad_norm (before scaling down), every ``metrics_interval`` steps the metrics of the updated model, and with
        ``profile`` timing/PART_s, timing/PART_pct and timing/total_s (PART: select, advantages, gradients,
        optimizer, metrics). When every advantage is 0, or nothing was selected, no parameter changes and grad_norm
        is 0. Raises UserError when there is no buffer, or episodes that cannot be trained on; then no parameter has
        changed and the buffer is as it was.
        """
        clock = Clock()
        with clock("select"):
            source = self.buffer if rollout_data is None else rollout_data
            if source is None:
                raise UserError("the Trainer has no buffer; pass one to train(), or link it with link_buffer()")
            if not isinstance(source, Buffer | Mapping):
                raise UserError(
                    f"train() got a {type(source).__name__}; pass the Buffer that RolloutRunner.collect returns, "
                    "or the dict that select_recent_data returns for it"
                )
            select = self.data_selector_fn or select_all_data
            data = select(source) if isinstance(source, Buffer) else source
            episodes = as_episodes(data)
        result = self._step(episodes, data, clock) if episodes else {"loss": 0.0, "grad_norm": 0.0}
        if self.on_policy and isinstance(source, Buffer):
            source.clear()
        self._steps += 1
        if self._adapter_path is not None:
            self._engine.save(self._adapter_path)
        result["step"] = self._steps - 1
        if self.profile:
            total = time.perf_counter() - clock.started
            result |= {f"timing/{part}_s": s for part, s in clock.seconds.items()}
            result |= {f"timing/{part}_pct": 100 * s / total for part, s in clock.seconds.items()}
            result["timing/total_s"] = total
        return result

    def train_epoch(self, coordinator: RolloutCoordinator, num_steps: int = 1) -> list[dict[str, float]]:
        """Collect with ``coordinator`` and ``train`` on that, ``num_steps`` times; return what each step returned."""
        refuse_outside("num_steps", num_steps, 1, whole=True)
        return [self.train(coordinator.collect()) for _ in range(num_steps)]

    get_metrics = gone("Trainer.get_metrics", "train() returns the metrics of its step")
    reset_metrics = gone("Trainer.reset_metrics", "train() returns the metrics of its step alone")
    reset_timer = gone("Trainer.reset_timer", "with profile=True train() returns the times of its step alone")

    def _step(self, episodes: Sequence[Episode], data: Mapping[str, Any], clock: Clock) -> dict[str, float]:
        """Update the model on at least one episode and return the metrics."""
        from .flat import FlatTokens, advantages_per_group, mlx_arrays, transformed

        with clock("advantages"):
            batch = mlx_arrays({**data, "step": self._steps})
            key, transform = self.advantage_reward_key, self.advantage_transform_fn
            if key not in data:
                raise unknown_name("entry of the selected data called", key, data)
            rewards = np.asarray(data[key]).astype(np.float32)
            if rewards.shape != (len(episodes),):
                raise UserError(
                    f"advantage_reward_key is {key!r}, of shape {rewards.shape} for {len(episodes)} episodes; "
                    "name an entry with one reward for each"
                )
            groups = np.array([e.group for e in episodes])
            advantages = advantages_per_group(self.advantage_fn, rewards, groups)
            advantages = np.repeat(advantages, [int(e.mask.sum()) for e in episodes])  # (N,), of the sampled tokens
            if isinstance(transform, PreparesBatch):
                transform.prepare_batch(batch)
            if transform is not None:
                advantages = transformed(transform, advantages, batch)
            tokens = FlatTokens.of(episodes, advantages)
            self._engine.bounds.check(tokens.batch)
        if advantages.any():
            with clock("gradients"):
                loss, grads = self._passes.gradients(tokens, self._loss)
            with clock("optimizer"):
                grad_norm = self._engine.apply(grads)
        else:
            with clock("gradients"):
                loss, grad_norm = float(self._passes.apply(tokens, self._loss).item()), 0.0
            if len({*groups.tolist()}) == len(episodes):
                logger.warning(
                    "no parameter changed: every episode is a group of its own and every advantage 0; "
                    "give TextGenerationEnv a group_size of 2 or more, so that completions of a prompt can be compared"
                )
        if isinstance(transform, PostprocessesBatch):
            transform.postprocess_batch(batch)
        result = {**batch.get("transform_metrics", {}), "loss": loss, "grad_norm": grad_norm}
        if self._metrics is not None and self._steps % self.metrics_interval == 0:
            with clock("metrics"):
                result = {**self._passes.apply(tokens, self._metrics), **result}
        return result


def _check(
    model: Any,
    max_grad_norm: float,
    compile_training: Any,
    gradient_checkpointing: Any,
    micro_batch_size: Any,
    metrics_interval: int,
) -> None:
    """Raise UserError for a setting of ``Trainer`` that is out of range, or a model with nothing to train."""
    from ..mlx.adapters.merging import trainable
    from ..mlx.kernels.plain import refuse_kernels_alone

    refuse_kernels_alone(model)
    if compile_training not in (True, False, "auto"):
        raise UserError(f"compile_training is {compile_training!r}; set it to True, False or 'auto'")
    if type(gradient_checkpointing) is not bool and (
        type(gradient_checkpointing) is not int or gradient_checkpointing < 1
    ):
        raise UserError(
            f"gradient_checkpointing is {gradient_checkpointing!r}; set it to True (every block), False, or k for "
            "every k-th block"
        )
    if micro_batch_size is not None and (type(micro_batch_size) is not int or micro_batch_size < 1):
        raise UserError(f"micro_batch_size is {micro_batch_size!r}; set it to a number of episodes, 1 or more")
    if not trainable(model):
        raise UserError("the model has no trainable parameters; attach a LoRA adapter, or call model.unfreeze()")
    if not max_grad_norm > 0:
        raise UserError(f"max_grad_norm is {max_grad_norm}; set it above 0 (float('inf') leaves gradients alone)")
    if metrics_interval < 1:
        raise UserError(f"metrics_interval is {metrics_interval}; set it to 1 or more")


def _with_lengths(fn: Callable[..., Any]) -> Callable[[Any, Any, Any, Any], Any]:
    """Return ``fn`` as a function of four arguments, the last of which reaches it if it names sequence_lengths."""
    if "sequence_lengths" in (accepted_keywords(fn) or ()):
        return lambda old, new, advantages, lengths: fn(old, new, advantages, sequence_lengths=lengths)
    return lambda old, new, advantages, lengths: fn(old, new, advantages)


# ---- transforms for ``advantage_transform_fn``


def build_gtpo_transform(
    *,
    alpha_1: float = 1.0,
    alpha_2: float = 0.1,
    reward_threshold: float = 0.5,
    tokenizer: Any = None,
    strategic_grams: Sequence[str] | None = None,
    hicra_gamma: float = 0.0,
    sepa_steps: int = 0,
    sepa_schedule: str = "linear",
    sepa_delay_steps: int = 0,
    sepa_correct_rate_gate: float = 0.0,
    use_maxrl_base: bool = False,
    normalisation: Normalisation = "joint",
) -> CreditTransform:
    """Return a transform to GTPO's advantages (``ShapeByEntropy``), computed from exact entropies.

    They replace those of ``advantage_fn``. First SEPA pools the entropies (``Pooling`` explains its settings), or
    ``hicra_gamma`` raises those of planning tokens (``BoostPlanning``); both need a ``tokenizer``, to find the
    ``strategic_grams``. With ``use_maxrl_base`` the advantages of ``advantage_fn``, MaxRL's or others, are multiplied
    by a weight of 0 or more for each token (``uncertainty_weights``, with ``alpha_2`` as beta), and ``alpha_1``,
    ``reward_threshold`` and ``normalisation`` have no effect. Raises UserError.
    """
    pooling = Pooling(sepa_steps, sepa_schedule, sepa_delay_steps, sepa_correct_rate_gate)
    pools = pooling.controller().enabled
    if (pools or hicra_gamma) and tokenizer is None:
        raise UserError("SEPA and hicra_gamma search for strategic grams and got no tokenizer; pass one")
    if pools and hicra_gamma:
        logger.warning(
            "hicra_gamma is %s and has no effect, because SEPA pools the entropies; leave one of them out", hicra_gamma
        )
    shape = ShapeByEntropy(alpha_1, alpha_2, reward_threshold, normalisation)
    stage: Stage = WeightByUncertainty(alpha_2) if use_maxrl_base else shape
    return CreditTransform(
        [stage],
        mark=_marker(tokenizer, strategic_grams) if pools or hicra_gamma else None,
        pooling=pooling if pools else None,
        hicra_gamma=hicra_gamma,
    )


def build_gtpo_hicra_transform(
    tokenizer: Any,
    *,
    strategic_grams: Sequence[str] | None = None,
    hicra_alpha: float = 0.2,
    entropy_weight: float = 0.1,
    uncertainty: Uncertainty = "entropy",
) -> CreditTransform:
    """Return a transform: weights by uncertainty (``WeightByUncertainty``), then HICRA (``AmplifyPlanning``).

    ``uncertainty`` is the exact "entropy" of the rollouts, or their "surprisal". Raises UserError.
    """
    stages = (WeightByUncertainty(entropy_weight), AmplifyPlanning(hicra_alpha))
    return CreditTransform(stages, uncertainty=uncertainty, mark=_marker(tokenizer, strategic_grams))


def _marker(tokenizer: Any, strategic_grams: Sequence[str] | None) -> MarkPlanning:
    """Return a function that finds the planning tokens of completions by their text."""
    pieces = Pieces(text_decode(tokenizer))
    grams = PlanningGrams(DEFAULT_STRATEGIC_GRAMS if strategic_grams is None else strategic_grams)
    return lambda completions: planning_masks([pieces(ids) for ids in completions], grams)
