"""Apply the settings of a run to its algorithm's recipe."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from ..algorithms import Algorithm, algorithm
from ..algorithms.distillation import Distillation
from ..algorithms.grams import load_strategic_grams
from ..algorithms.planning import PlanningGrams
from ..algorithms.rft import RejectionSampling
from ..algorithms.top_entropy import KeepTopEntropy
from ..errors import UserError
from ..losses import KL, Correction
from .settings import Config

_REFUSED_BY_RECIPE = ("overlong_cache", "reward_kl")  # the recipe's own error says why
_APART = ("name", "kl", "correction", "sepa", "grams", "top_entropy")  # settings that are not a field of a part


def configure(config: Config) -> Algorithm:
    """Return the recipe of the run, with its settings. Raises UserError for a setting that does not apply to it."""
    if config.stage and config.stage[0].kind == "rft":  # the settings are those of one stage
        return RejectionSampling(unique=config.stage[0].unique, cap=config.stage[0].cap)
    settings, kl, c = config.algorithm, config.algorithm.kl, config.algorithm.correction
    given = {k: v for k in type(settings).model_fields if k not in _APART and (v := getattr(settings, k)) is not None}
    given |= {f"sepa_{k}": v for k, v in settings.sepa.model_dump().items() if v is not None}
    if kl.place == "reward" and kl.coefficient:
        given["reward_kl"] = kl.coefficient
    recipe = with_settings(algorithm(settings.name), settings.name, given)
    if settings.grams is not None:
        if recipe.grams is None:
            raise UserError(
                f"the recipe {settings.name} does not use grams; leave them out, or choose hicra, sepa or full"
            )
        recipe = replace(recipe, grams=PlanningGrams(load_strategic_grams(settings.grams)))
    if settings.top_entropy is not None:
        recipe = replace(recipe, stages=(*recipe.stages, KeepTopEntropy(settings.top_entropy)))
    in_loss = kl.coefficient and kl.place == "loss"
    surrogate = replace(
        recipe.surrogate,
        kl=KL(kl.coefficient, kl.estimator, kl.importance_weighted) if in_loss else None,
        correction=None if c.level == "none" else Correction(c.level, c.how, c.low, c.high),
    )
    recipe = replace(recipe, surrogate=surrogate, length=float(config.rollout.max_tokens))
    if not config.stage or config.stage[0].kind != "distill" or config.stage[0].beta is not None:
        return recipe
    if recipe.surrogate.ratio not in ("token", "sequence-token"):
        raise UserError(
            f"algorithm.ratio is {recipe.surrogate.ratio} and a teacher judges tokens one by one; set it to token, or "
            "choose a recipe with a ratio per token"
        )
    stage = config.stage[0]
    return replace(recipe, distillation=Distillation(stage.coefficient, stage.discount, stage.reward_weight))


def with_settings(recipe: Algorithm, name: str, settings: dict[str, Any]) -> Algorithm:
    """Return ``recipe`` with each setting in the one part that has a field of its name. Raises UserError."""
    left = {k: v for k, v in settings.items() if k not in recipe.idle_settings or k in _REFUSED_BY_RECIPE}
    idle = [k for k in settings if k not in left]

    def fit(part: Any) -> Any:
        if not is_dataclass(part):
            return part
        mine = {f.name: left.pop(f.name) for f in fields(part) if f.name in left}
        return replace(part, **mine)  # type: ignore[type-var]

    fitted = replace(
        fit(recipe),
        baseline=fit(recipe.baseline),
        stages=tuple(fit(stage) for stage in recipe.stages),
        surrogate=replace(fit(recipe.surrogate), objective=fit(recipe.surrogate.objective)),
        pooling=fit(recipe.pooling),
    )
    if left or idle:
        names = ", ".join(sorted(k.replace("sepa_", "sepa.") for k in (*left, *idle)))
        raise UserError(
            f"the recipe {name} does not use {names}; leave it out, or choose a recipe that does "
            "('textpolicy algorithms')"
        )
    return fitted
