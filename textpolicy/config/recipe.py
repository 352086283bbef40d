"""A run's settings laid over an algorithm's own."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from ..algorithms import Algorithm, algorithm
from ..algorithms.grams import load_strategic_grams
from ..algorithms.pipeline import Stage
from ..algorithms.planning import PlanningGrams
from ..algorithms.top_entropy import KeepTopEntropy
from ..errors import UserError
from ..losses import KL, Correction
from .settings import AlgorithmSettings, Config

_REFUSED_BY_RECIPE = ("overlong_cache", "reward_kl")  # which says why
_APART = ("name", "kl", "correction", "sepa", "grams", "top_entropy")  # settings that are no field of a part


def configure(config: Config) -> Algorithm:
    """The recipe the run asks for, with its settings. Raises UserError for one that the recipe has no use for."""
    settings = config.algorithm
    given = {k: v for k in type(settings).model_fields if k not in _APART and (v := getattr(settings, k)) is not None}
    given |= {f"sepa_{k}": v for k, v in settings.sepa.model_dump().items() if v is not None}
    if settings.kl.place == "reward" and settings.kl.coefficient:
        given["reward_kl"] = settings.kl.coefficient
    recipe = with_settings(algorithm(settings.name), settings.name, given)
    recipe = _with_grams(recipe, settings)
    last: tuple[Stage, ...] = () if settings.top_entropy is None else (KeepTopEntropy(settings.top_entropy),)
    surrogate = replace(recipe.surrogate, kl=_kl(settings), correction=_correction(settings))
    return replace(recipe, surrogate=surrogate, stages=(*recipe.stages, *last), length=float(config.rollout.max_tokens))


def with_settings(recipe: Algorithm, name: str, settings: dict[str, Any]) -> Algorithm:
    """``recipe`` with every setting in the one part that has a field of its name. Raises UserError."""
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
            f"the recipe {name} has no use for {names}; leave it out, or choose a recipe that does "
            "('textpolicy algorithms')"
        )
    return fitted


def _with_grams(recipe: Algorithm, settings: AlgorithmSettings) -> Algorithm:
    if settings.grams is None:
        return recipe
    if recipe.grams is None:
        raise UserError(
            f"the recipe {settings.name} has no use for grams; leave them out, or choose hicra, sepa or full"
        )
    return replace(recipe, grams=PlanningGrams(load_strategic_grams(settings.grams)))


def _kl(settings: AlgorithmSettings) -> KL | None:
    kl = settings.kl
    return KL(kl.coefficient, kl.estimator, kl.importance_weighted) if kl.coefficient and kl.place == "loss" else None


def _correction(settings: AlgorithmSettings) -> Correction | None:
    c = settings.correction
    return None if c.level == "none" else Correction(c.level, c.how, c.low, c.high)
