"""The Tinker engine of a run's settings, and a refusal of settings that the service cannot honour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._system.files import read_object
from ..algorithms import Algorithm
from ..algorithms.gtpo import ShapeByEntropy
from ..algorithms.top_entropy import KeepTopEntropy
from ..config.settings import Config, changed
from ..errors import UserError
from .engine import Adam, TinkerEngine
from .loss import tinker_loss
from .spending import MeteredRun

ALPHA = 32.0  # of every LoRA on the service; its output is scaled by alpha / rank
_OF_THE_SERVICE = ("kind", "rank", "alpha")  # adapter settings that it takes, or that must match the service's


def build(config: Config, recipe: Algorithm, adam: Adam | None = None) -> tuple[MeteredRun, Any]:
    """Return the engine with a fresh LoRA, or the one that is resumed, and the tokenizer. Raises UserError.

    ``adam`` None is the local engine's: the same beta2 and eps, so that one config is one optimiser.
    """
    refuse_unhonoured(config, recipe)
    tinker, optimizer = config.tinker, config.optimizer
    clipping = 0.0 if tinker.reduction == "mean" else optimizer.max_grad_norm
    engine = TinkerEngine.connect(
        config.model,
        rank=config.adapter.rank or 16,
        seed=config.seed,
        base_url=tinker.base_url,
        resume=tinker.resume,
        adam=adam or Adam(0.9, 0.999, 1e-8, optimizer.weight_decay, clipping),
        reduction=tinker.reduction,
        untempered=tinker.untempered,
        patience=tinker.patience,
    )
    return MeteredRun(engine), engine.tokenizer


def kept(config: Config, adapter: Path) -> TinkerEngine:
    """Return the engine as the run left it, from the folder that ``save`` wrote. Raises UserError, ServiceError."""
    path = adapter / "tinker.json"
    advice = "give the folder of a run"
    if not isinstance(state := (read_object(path, advice) or {}).get("state"), str):
        raise UserError(f"{path} has no path of the adapter on the server; {advice}")
    return TinkerEngine.connect(
        config.model, base_url=config.tinker.base_url, resume=state, patience=config.tinker.patience
    )


def refuse_unhonoured(config: Config, recipe: Algorithm) -> None:
    """Raise UserError for a setting that the Tinker service cannot honour, before anything is spent."""
    tinker_loss(recipe.surrogate)
    adapter, kinds = config.adapter, {type(stage) for stage in recipe.stages}
    if adapter.kind != "lora":
        raise UserError(f"adapter.kind is {adapter.kind} and the Tinker service trains LoRAs; set it to lora")
    for name in changed(adapter):
        if name not in _OF_THE_SERVICE:
            raise UserError(
                f"adapter.{name} is set and the Tinker service adapts all linear layers in its own way; leave it out, "
                "or use --engine mlx"
            )
    if adapter.alpha not in (None, ALPHA):
        raise UserError(f"adapter.alpha is {adapter.alpha:g} and is {ALPHA:g} on the Tinker service; leave it out")
    # the service returns the log-prob of the sampled token, whose negative is the surprisal, and no entropy
    if ShapeByEntropy in kinds:
        raise UserError(
            f"the recipe {config.algorithm.name} needs exact entropies, which the Tinker service does not report; "
            "choose another (gtpo weighs by surprisal), or use --engine mlx"
        )
    if recipe.echo:
        raise UserError(
            f"algorithm.echo is {recipe.echo:g}, a second loss on other tokens, which the Tinker engine does not send; "
            "set it to 0, or use --engine mlx"
        )
    if recipe.entropy_control() is not None:
        raise UserError(
            "algorithm.entropy_bonus or entropy_target is set, and the Tinker service does not report the entropy; "
            "leave them out, or use --engine mlx"
        )
    if KeepTopEntropy in kinds:
        raise UserError(
            "algorithm.top_entropy needs exact entropies, which the Tinker service does not report; leave it out, or "
            "use --engine mlx"
        )
    if recipe.uncertainty == "entropy":
        raise UserError(
            "algorithm.uncertainty is entropy, which the Tinker service does not report; set it to surprisal, or use "
            "--engine mlx"
        )
    for name in changed(config.machine):
        raise UserError(
            f"machine.{name} applies to this machine and the engine is tinker; leave it out, or use --engine mlx"
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
