"""The settings of a campaign: a typed tree, read from a TOML file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from ..config.mistakes import explain
from ..config.settings import Config, NonNegative, Section, check_config, merged, read_values
from ..errors import UserError, unknown_name

Summary = Literal["last", "auc", "kept"]
SUMMARIES = {
    "last": "accuracy on the held-out validation problems at the last step",
    "auc": "area under the curve of accuracy on the held-out validation problems, as its mean height",
    "kept": "accuracy on the held-out test problems of the adapter that the run keeps",
}
_SHARED = (
    "seed",
    "output",
    "engine",
    "task",
    "evaluation",
)  # an arm may not change these, or its runs would not be pairs
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
Share = Annotated[float, Field(gt=0, lt=1)]


class Prices(Section):
    """The price of a token or an hour, in any one currency; 0 leaves it out."""

    sampled_per_million: NonNegative = 0.0
    trained_per_million: NonNegative = 0.0
    hour: NonNegative = 0.0


class CampaignSettings(Section):
    """The settings of a campaign: arms x seeds over one base, and their question; fixed before the first run."""

    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    """The seeds of every arm."""
    baseline: str | None = None
    """The arm that the others are compared with; the first if not given."""
    summary: Summary = "last"
    """The one number of a run that is tested."""
    alpha: Share = 0.05
    power: Share = 0.8
    smallest_effect: Share | None = None
    """The least difference of the summary that matters, as a share of 1."""
    stopping: Literal["fixed", "anytime"] = "fixed"
    """All seeds, or stop at the first pair after which the evidence is enough; then seeds may be added."""
    engine: Literal["mlx", "tinker"] | None = None
    """The engine of every run; the base's if not given."""
    prices: Prices = Prices()
    base: dict[str, Any] = Field(default_factory=dict)
    """Settings of `textpolicy train` that all arms share."""
    arms: dict[str, dict[str, Any]]
    """Settings of each arm over the base."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        """Check that there are arms to compare, and that runs of one seed are pairs."""
        if len(self.arms) < 2:
            raise ValueError(f"there is {len(self.arms)} arm; give at least two, each a table under [arms]")
        if not self.seeds:
            raise ValueError("there is no seed; give at least one, six for a p below 0.05")
        if self.power <= self.alpha:
            raise ValueError(f"power is {self.power} and alpha {self.alpha}; set power above alpha")
        twice = sorted({s for s in self.seeds if self.seeds.count(s) > 1})
        if twice:
            raise ValueError(f"seed {twice[0]} is given twice; give every seed once, because a copy adds no evidence")
        for name in self.arms:
            if alike := [other for other in self.arms if other != name and other.lower() == name.lower()]:
                raise ValueError(
                    f"the arms {name} and {alike[0]} differ only in the case of their letters, and a Mac would give "
                    "them one folder; rename one"
                )
        for name, overrides in self.arms.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"an arm is called {name!r}; use letters, digits, '-', '_' and '.'")
            if changed := sorted(set(overrides) & set(_SHARED)):
                raise ValueError(
                    f"the arm {name} sets {changed[0]}, which all arms share so that runs of one seed are pairs; "
                    "set it under [base]"
                )
        for key in ("seed", "output"):
            if key in self.base:
                raise ValueError(f"[base] sets {key}, which the campaign sets; leave it out")
        return self

    @property
    def reference(self) -> str:
        """The baseline's name. Raises UserError where there is no such arm."""
        name = self.baseline or next(iter(self.arms))
        if name not in self.arms:
            raise unknown_name("arm", name, self.arms)
        return name

    def overrides(self, arm: str, seed: int) -> dict[str, Any]:
        """Return the settings of `textpolicy train` that the run of ``arm`` and ``seed`` changes, as a nested dict."""
        engine = {} if self.engine is None else {"engine": self.engine}
        return {**merged(self.base, self.arms[arm]), **engine, "seed": seed}

    def config(self, arm: str, seed: int) -> Config:
        """Return the settings of one run. Raises UserError, also for a setting that the recipe does not use."""
        from ..config.recipe import configure
        from ..run.assembly import refuse_long_warmup

        config = check_config(self.overrides(arm, seed), f"arm {arm}, seed {seed}")
        for stage in config.stages:
            configure(stage)
        refuse_long_warmup(config)
        return config


def read_campaign(path: Path, changes: dict[str, Any] | None = None) -> CampaignSettings:
    """Read a campaign from a TOML file, with ``changes``, and check every run's settings. Raises UserError."""
    return check_campaign({**read_values(path), **(changes or {})}, str(path))


def check_campaign(values: dict[str, Any], source: str) -> CampaignSettings:
    """Return ``values`` as a campaign, with the settings of every run checked. Raises UserError."""
    try:
        settings = CampaignSettings.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(explain(error, CampaignSettings))) from error
    _ = settings.reference
    for arm in settings.arms:
        settings.config(arm, max(settings.seeds))  # the others are numbers as small
    return settings
