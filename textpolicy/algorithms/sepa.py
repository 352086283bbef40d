"""Pool the uncertainty of execution tokens step by step, so that planning tokens stand out: SEPA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import UserError, refuse_not_positive, refuse_outside, unknown_name
from ..types import Bools, Floats, Ints

SCHEDULES = ("linear", "auto")


def pool_execution(uncertainty: Floats, planning: Bools, row: Ints, strength: float) -> Floats:
    """Return lam mean(S_exec) + (1 - lam) S_t off the planning tokens, the mean per completion; (N,) -> (N,).

    ``uncertainty`` (N,) is S in nats, ``planning`` (N,) bool, ``row`` (N,) the completion of each token;
    lam is ``strength`` clipped to [0, 1]. The sum over a completion's execution tokens is unchanged, their
    variance shrinks by (1 - lam)^2; planning tokens, and all tokens at lam = 0, are unchanged bit for bit.
    Raises UserError when lam is not a number.
    """
    if np.isnan(strength):
        raise UserError(f"the strength of pooling is {strength}; give a number from 0 to 1")
    lam = min(max(strength, 0.0), 1.0)
    if lam == 0:
        return uncertainty
    rows = row.max(initial=-1) + 1
    count = np.maximum(np.bincount(row, ~planning, rows), 1)
    mean = np.bincount(row, np.where(planning, 0.0, uncertainty), rows) / count
    return np.where(planning, uncertainty, lam * mean[row] + (1 - lam) * uncertainty)


@dataclass(frozen=True, slots=True)
class Pooling:
    """Set S_t <- lam mean(S_exec) + (1 - lam) S_t off planning tokens, with lam from a ``SEPAController``."""

    sepa_steps: int = 500  # steps of the ramp from 0 to 1; 0 means no ramp
    sepa_schedule: str = "linear"  # or "auto": at least the ramp, more as the execution variance falls
    sepa_delay_steps: int = 50  # steps before the ramp
    sepa_correct_rate_gate: float = 0.1  # nothing is pooled before this share of a step's completions is correct
    sepa_ema_decay: float = 0.99  # decay of the mean execution variance
    sepa_var_threshold: float = 0.2  # share of the first variance at which "auto" starts to pool
    sepa_warmup: int = 50  # steps before the variance is taken as the first one

    def __post_init__(self) -> None:
        schedule = self.sepa_schedule.strip().lower()
        if schedule not in SCHEDULES:
            raise unknown_name("SEPA schedule", schedule, SCHEDULES)
        object.__setattr__(self, "sepa_schedule", schedule)
        refuse_outside("sepa_steps", self.sepa_steps, 0)
        refuse_outside("sepa_delay_steps", self.sepa_delay_steps, 0)
        refuse_outside("sepa_correct_rate_gate", self.sepa_correct_rate_gate, 0, 1)
        refuse_outside("sepa_ema_decay", self.sepa_ema_decay, 0, 1)
        refuse_not_positive("sepa_var_threshold", self.sepa_var_threshold)
        refuse_outside("sepa_warmup", self.sepa_warmup, 1)

    def controller(self) -> SEPAController:
        """Return a new controller with these settings."""
        return SEPAController(**asdict(self))


PROGRESS = ("var_ema", "var_0", "warmup_seen", "gate_open", "steps_open", "strength")  # attributes that change


class SEPAController:
    """The controller of lam, the strength of pooling, step by step.

    lam = clip((step - delay) / steps, 0, 1), 0 with no steps. "auto" takes the larger of this and
    1 - min(v / v_0 / threshold, 1), where v is a running mean of the execution variance and v_0 its value
    after the warm-up. lam is 0 until a correct rate reaches the gate, which then stays open.
    """

    def __init__(
        self,
        *,
        sepa_steps: int = 0,
        sepa_schedule: str = "linear",
        sepa_delay_steps: int = 0,
        sepa_correct_rate_gate: float = 0.0,
        sepa_ema_decay: float = 0.99,
        sepa_var_threshold: float = 0.2,
        sepa_warmup: int = 50,
        eps: float = 1e-8,
    ) -> None:
        """Start with the settings of ``Pooling``; ``eps`` is the smallest v_0. Raises UserError."""
        self._settings = Pooling(
            sepa_steps, sepa_schedule, sepa_delay_steps, sepa_correct_rate_gate,
            sepa_ema_decay, sepa_var_threshold, sepa_warmup,
        )  # fmt: skip
        refuse_not_positive("eps", eps)
        self._eps = eps
        self.var_ema: float | None = None  # nats^2; None before the first observation
        self.var_0: float | None = None  # nats^2; None until the warm-up is over
        self.warmup_seen = 0  # observations, counted up to the end of the warm-up
        self.gate_open = self._settings.sepa_correct_rate_gate == 0  # True once a correct rate has reached the gate
        self.steps_open = 0  # calls of ``advance`` since the gate opened
        self.strength = 0.0  # lam of the last call of ``advance``; 0 before the first

    @property
    def enabled(self) -> bool:
        """Return whether lam can ever leave 0."""
        return self._settings.sepa_steps > 0 or self._settings.sepa_schedule == "auto"

    def advance(self, correct_rate: float | None, execution: Floats) -> float:
        """Observe one training step and return its lam.

        ``correct_rate`` is the share of correct completions, None if unknown, ``execution`` the
        uncertainties of all its execution tokens in nats, which make one observation.
        The ramp counts steps since the gate opened, so lam does not jump when that happens late.
        """
        self.observe_correct_rate(correct_rate)
        self.update_auto_state(execution)
        self.strength = self.resolve_lambda(self.steps_open)
        self.steps_open += self.gate_open
        return self.strength

    def resolve_lambda(self, step: float) -> float:
        """Return lam at ``step``, from 0 to 1; 0 while the gate is closed."""
        settings = self._settings
        if not self.gate_open:
            return 0.0
        ramp = from_variance = 0.0
        if settings.sepa_steps > 0:
            ramp = float(min(max((step - settings.sepa_delay_steps) / settings.sepa_steps, 0.0), 1.0))
        if self.var_ema is not None and self.var_0 is not None:
            from_variance = 1 - min(self.var_ema / self.var_0 / settings.sepa_var_threshold, 1.0)
        return max(ramp, from_variance)

    def observe_correct_rate(self, rate: float | None) -> None:
        """Open the gate if ``rate`` reaches it; None and a rate that is not finite are ignored."""
        if rate is not None and np.isfinite(rate) and rate >= self._settings.sepa_correct_rate_gate:
            self.gate_open = True

    def update_auto_state(self, execution: Sequence[float] | Floats) -> None:
        """Observe execution uncertainties, nats, for "auto"; an empty or non-finite observation is ignored."""
        values = np.asarray(execution, np.float64)
        if self._settings.sepa_schedule != "auto" or not values.size or not np.isfinite(values).all():
            return
        v, decay = float(values.var()), self._settings.sepa_ema_decay
        self.var_ema = v if self.var_ema is None else decay * self.var_ema + (1 - decay) * v
        self.warmup_seen = min(self.warmup_seen + 1, self._settings.sepa_warmup)
        if self.var_0 is None and self.warmup_seen == self._settings.sepa_warmup:
            self.var_0 = max(self.var_ema, self._eps)

    def state_dict(self) -> dict[str, Any]:
        """Return settings and progress as plain JSON values."""
        return {**asdict(self._settings), "eps": self._eps, **{name: getattr(self, name) for name in PROGRESS}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a ``state_dict``, including its settings. Raises UserError, changing nothing."""
        if set(state) != set(self.state_dict()):
            odd = ", ".join(sorted(set(state) ^ set(self.state_dict())))
            raise UserError(f"the state of SEPA has missing or unknown entries, {odd}; give what state_dict returned")
        if state["var_ema"] is not None:
            refuse_outside("var_ema", state["var_ema"])
        if state["var_0"] is not None:
            refuse_not_positive("var_0", state["var_0"])
        refuse_outside("warmup_seen", state["warmup_seen"])
        refuse_outside("steps_open", state["steps_open"])
        refuse_outside("strength", state["strength"], 0, 1)
        if state["gate_open"] not in (True, False):
            raise UserError(f"gate_open is {state['gate_open']!r}; set it to true or false")
        saved = SEPAController(**{name: value for name, value in state.items() if name not in PROGRESS})
        self._settings, self._eps = saved._settings, saved._eps
        for name in PROGRESS:
            setattr(self, name, state[name])
