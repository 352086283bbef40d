"""What a run's settings mean for a Tinker server, and which of them it cannot honour."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..algorithms import Algorithm
from ..algorithms.gtpo import ShapeByEntropy
from ..algorithms.top_entropy import KeepTopEntropy
from ..config.settings import Config, changed
from ..errors import UserError
from .engine import Adam, TinkerEngine
from .loss import tinker_loss
from .spending import MeteredRun

ALPHA = 32.0  # of every LoRA on the service; its output is scaled by alpha / rank
_OF_THE_SERVICE = ("kind", "rank", "alpha")  # settings of the adapter that it takes, or that must be as they are there


def build(config: Config, recipe: Algorithm) -> tuple[MeteredRun, Any]:
    """The engine with a fresh LoRA, or the one that is resumed, and the model's tokenizer. Raises UserError."""
    refuse_unhonoured(config, recipe)
    asked, optimizer = config.tinker, config.optimizer
    engine = TinkerEngine.connect(
        config.model,
        rank=config.adapter.rank or 16,
        seed=config.seed,
        base_url=asked.base_url,
        resume=asked.resume,
        # beta2 and eps as on the local engine, so that one config is one optimiser
        adam=Adam(0.9, 0.999, 1e-8, optimizer.weight_decay, _clipping(config)),
        reduction=asked.reduction,
        untempered=asked.untempered,
        patience=asked.patience,
    )
    return MeteredRun(engine), engine.tokenizer


def kept(config: Config, adapter: Path) -> TinkerEngine:
    """The engine as the run left it, from the adapter folder that ``save`` wrote. Raises UserError, ServiceError."""
    path = adapter / "tinker.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))["state"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not say where the server keeps the adapter; give the folder of a run") from error
    return TinkerEngine.connect(
        config.model, base_url=config.tinker.base_url, resume=state, patience=config.tinker.patience
    )


def refuse_unhonoured(config: Config, recipe: Algorithm) -> None:
    """Raise UserError for a setting that means nothing on a Tinker server, before anything is spent."""
    tinker_loss(recipe.surrogate)
    _refuse_adapter(config)
    _refuse_exact_entropy(config, recipe)
    for name in changed(config.machine):
        raise UserError(
            f"machine.{name} is of this machine and the engine is tinker; leave it out, or take --engine mlx"
        )
    if config.rollout.temperature != 1 and not config.tinker.untempered:
        raise UserError(
            f"rollout.temperature is {config.rollout.temperature:g} and the Tinker service scores at 1; set it to 1, "
            "or set tinker.untempered to train on the ratio of the untempered policies"
        )
    if config.tinker.reduction == "mean" and "max_grad_norm" in changed(config.optimizer):
        raise UserError(
            f"optimizer.max_grad_norm is {config.optimizer.max_grad_norm:g} and a server that averages "
            "(tinker.reduction) does not clip gradients; leave it out"
        )


def _clipping(config: Config) -> float:
    return 0.0 if config.tinker.reduction == "mean" else config.optimizer.max_grad_norm


def _refuse_adapter(config: Config) -> None:
    adapter = config.adapter
    if adapter.kind != "lora":
        raise UserError(f"adapter.kind is {adapter.kind} and the Tinker service trains LoRAs; set it to lora")
    for name in changed(adapter):
        if name in _OF_THE_SERVICE:
            continue
        raise UserError(
            f"adapter.{name} is set and the Tinker service adapts all linear layers in its own way; leave it out, "
            "or take --engine mlx"
        )
    if adapter.alpha not in (None, ALPHA):
        raise UserError(f"adapter.alpha is {adapter.alpha:g} and is {ALPHA:g} on the Tinker service; leave it out")


def _refuse_exact_entropy(config: Config, recipe: Algorithm) -> None:
    """The service says the log-prob of the sampled token, whose negative is the surprisal, and no entropy."""
    if recipe.uncertainty == "entropy" and not set(map(type, recipe.stages)) & {ShapeByEntropy, KeepTopEntropy}:
        raise UserError(
            "algorithm.uncertainty is entropy and the Tinker service reports none; set it to surprisal, or take "
            "--engine mlx"
        )
    if ShapeByEntropy in map(type, recipe.stages):
        raise UserError(
            f"the recipe {config.algorithm.name} reads exact entropies and the Tinker service reports none; choose "
            "another (gtpo weighs by surprisal), or take --engine mlx"
        )
    if KeepTopEntropy in map(type, recipe.stages):
        raise UserError(
            "algorithm.top_entropy reads exact entropies and the Tinker service reports none; leave it out, or take "
            "--engine mlx"
        )
