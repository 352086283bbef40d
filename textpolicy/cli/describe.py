"""Describe a recipe for ``textpolicy algorithms``, from its own values and docstrings."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import BaseModel

from ..algorithms.pipeline import Algorithm
from ..algorithms.planning import PlanningGrams
from ..algorithms.top_entropy import KeepTopEntropy
from ..config.settings import AlgorithmSettings


def describe(name: str, recipe: Algorithm) -> str:
    """Return the source of ``recipe``, the formula and values of each part, the settings that change it, an example.

    The parts are the baseline, the stages in their order (SEPA's pooling is the first) and the objective.
    """
    lines = [f"{name}: {recipe.summary}", "", f"{'source':<11}{recipe.paper}"]
    stages = [stage for stage in (recipe.pooling, *recipe.stages) if stage is not None]
    roles = ["baseline", *(f"stage {i}" for i, _ in enumerate(stages, 1)), "objective"]
    parts: list[Any] = [recipe.baseline, *stages, recipe.surrogate.objective]
    for role, part in zip(roles, parts, strict=True):
        kind: Any = type(part) if is_dataclass(part) else part  # a stage may be a plain function
        words = re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", kind.__name__).lower()  # GroupRelative -> group relative
        formula = (inspect.getdoc(kind) or "").partition("\n")[0].replace("``", "")
        lines.append(f"{role:<11}{words}{': ' if formula else ''}{formula}")
        if values := ", ".join(f"{field} {_shown(value)}" for field, value in _values(part).items()):
            lines.append(f"{'':<11}{values}")
    lines += ["", "Settings that change it; a TOML file has the same names under [algorithm], with _ for -:", ""]
    settings = settings_of(recipe, parts)
    flags = {setting: "--algorithm." + setting.replace("_", "-") for setting in settings}
    widths = max(map(len, flags.values())), max(len(_shown(value)) for value, _ in settings.values())
    for setting, (value, meaning) in settings.items():
        lines.append(f"{flags[setting]:<{widths[0]}}  {_shown(value):<{widths[1]}}  {meaning}")
    # The example spells out a setting of the last part that has one, or the aggregation.
    last_first = (*reversed(stages), recipe.surrogate.objective, recipe.baseline)
    order = [*(field for part in last_first for field in _values(part)), "aggregation"]
    given = {setting.replace(".", "_"): setting for setting, (value, _) in settings.items() if value is not None}
    chosen = next(given[field] for field in order if field in given)
    example = f"{flags[chosen]} {_shown(settings[chosen][0])}"
    return "\n".join([*lines, "", f"example: textpolicy train --algorithm.name {name} {example}"])


def settings_of(recipe: Algorithm, parts: list[Any]) -> dict[str, tuple[Any, str]]:
    """Return the settings that change ``recipe``, named as under [algorithm]: name -> (its own value, meaning)."""
    known: dict[str, tuple[Any, str]] = {}
    for name, field in AlgorithmSettings.model_fields.items():
        if isinstance(field.default, BaseModel):
            section = type(field.default).model_fields
            known |= {f"{name}.{inner}": (f.default, f.description or "") for inner, f in section.items()}
        elif name != "name":
            known[name] = (field.default, field.description or "")
    own = {name: value for part in (recipe, recipe.surrogate, *parts) for name, value in _values(part).items()}
    if recipe.grams is None:
        del own["grams"]  # a recipe without grams does not use any
    own = {name: value for name, value in own.items() if name not in recipe.idle_settings}
    used = {*own, *_values(KeepTopEntropy())}  # which a run may add to any recipe
    return {
        name: (own.get(name.replace(".", "_"), value), meaning)
        for name, (value, meaning) in known.items()
        if name.replace(".", "_") in used or name.partition(".")[0] in own
    }


def _values(part: Any) -> dict[str, Any]:
    """Return the fields of a dataclass by name; {} for a function."""
    return {f.name: getattr(part, f.name) for f in fields(part)} if is_dataclass(part) else {}


def _shown(value: Any) -> str:
    """Return a value in a few characters: 0.2, group, none."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case PlanningGrams():
            return f"{len(value.phrases)} phrases"
    return str(value)
