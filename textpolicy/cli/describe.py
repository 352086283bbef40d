"""What ``textpolicy algorithms`` says of a recipe, read from the recipe's own values and docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from ..algorithms.pipeline import Algorithm
from ..algorithms.planning import PlanningGrams
from ..algorithms.top_entropy import KeepTopEntropy


@dataclass(frozen=True, slots=True)
class Overview:
    """A recipe in one line; the names of the fields are the headings."""

    recipe: str
    baseline: str
    stages: str
    ratio: str
    objective: str
    aggregation: str
    paper: str


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a recipe: what it is for, what it is called, what it computes and with which values."""

    role: str
    name: str
    formula: str
    values: str


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting of a run, named as under [algorithm]: "clip_low", "sepa.steps"."""

    name: str
    value: Any
    meaning: str

    @property
    def flag(self) -> str:
        """Of ``textpolicy train``."""
        return "--algorithm." + self.name.replace("_", "-")


def overview(name: str, recipe: Algorithm) -> Overview:
    """The line of ``recipe``; of the baseline's values those that are not its defaults."""
    changed = [f"{field} {shown(value)}" for field, value in _changed(recipe.baseline).items()]
    return Overview(
        recipe=name,
        baseline=", ".join([_words(recipe.baseline), *changed]),
        stages=" -> ".join(_words(stage) for stage in _stages(recipe)),
        ratio=recipe.surrogate.ratio,
        objective=f"{_words(recipe.surrogate.objective)} {_bounds(recipe.surrogate.objective)}".rstrip(),
        aggregation=recipe.aggregation,
        paper=recipe.paper.removeprefix("arXiv:"),
    )


def parts(recipe: Algorithm) -> list[Part]:
    """Baseline, stages in their order (SEPA's pooling is the first), and what the update maximises."""
    roles = ["baseline", *(f"stage {i}" for i, _ in enumerate(_stages(recipe), 1)), "objective"]
    return [_part(role, part) for role, part in zip(roles, _pipeline(recipe), strict=True)]


def settings_of(recipe: Algorithm, known: Sequence[Setting]) -> list[Setting]:
    """Those of the ``known`` settings that change ``recipe``, with its own values where it has any."""
    own = {
        name: value for part in (recipe, recipe.surrogate, *_pipeline(recipe)) for name, value in _values(part).items()
    }
    if recipe.grams is None:
        del own["grams"]  # a recipe without grams has no use for others
    own = {name: value for name, value in own.items() if name not in recipe.idle_settings}
    added = {*own, *_values(KeepTopEntropy())}  # which a run may put behind the stages of any recipe
    taken = [s for s in known if _field(s) in added or s.name.partition(".")[0] in own]
    return [replace(s, value=own.get(_field(s), s.value)) for s in taken]


def example(name: str, recipe: Algorithm, known: Sequence[Setting]) -> str:
    """A command that trains with ``recipe`` and spells out one of its settings: of the last part that has one."""
    by_field = {_field(s): s for s in settings_of(recipe, known) if s.value is not None}
    baseline, *stages, objective = _pipeline(recipe)
    order = [field for part in (*reversed(stages), objective, baseline) for field in _values(part)]
    chosen = next(by_field[field] for field in order if field in by_field)
    return f"textpolicy train --algorithm.name {name} {chosen.flag} {shown(chosen.value)}"


def shown(value: Any) -> str:
    """A value in a few characters: 0.2, group, none."""
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


def _pipeline(recipe: Algorithm) -> list[Any]:
    return [recipe.baseline, *_stages(recipe), recipe.surrogate.objective]


def _stages(recipe: Algorithm) -> list[Any]:
    return [stage for stage in (recipe.pooling, *recipe.stages) if stage is not None]


def _part(role: str, part: Any) -> Part:
    lines = (inspect.getdoc(_kind(part)) or "").splitlines() or [""]
    values = ", ".join(f"{name} {shown(value)}" for name, value in _values(part).items())
    return Part(role, _words(part), lines[0].replace("``", ""), values)


def _kind(part: Any) -> Any:
    """What carries the name and the docstring: a dataclass for its values, a function for itself."""
    return type(part) if is_dataclass(part) else part


def _words(part: Any) -> str:
    """GroupRelative -> group relative."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", _kind(part).__name__).lower()


def _values(part: Any) -> dict[str, Any]:
    return {f.name: getattr(part, f.name) for f in fields(part)} if is_dataclass(part) else {}


def _changed(part: Any) -> dict[str, Any]:
    defaults = {f.name: f.default for f in fields(part)} if is_dataclass(part) else {}
    return {name: value for name, value in _values(part).items() if value != defaults[name]}


def _bounds(part: Any) -> str:
    """The values up to the last that is set: "0.2/0.28", "none/5"."""
    values = [shown(value) for value in _values(part).values()]
    while values and values[-1] == "none":
        values.pop()
    return "/".join(values)


def _field(setting: Setting) -> str:
    """sepa.steps -> sepa_steps, the field it sets."""
    return setting.name.replace(".", "_")
