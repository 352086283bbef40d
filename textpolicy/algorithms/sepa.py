"""SEPA: the uncertainty of execution tokens is pooled step by step, so that planning tokens stand out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from ..errors import UserError, unknown_name
from .credit import row_sum

SCHEDULES = ("linear", "auto")


def pool_execution(uncertainty: np.ndarray, planning: np.ndarray, row: np.ndarray, strength: float) -> np.ndarray:
    """S_t <- lam mean(S_exec) + (1 - lam) S_t off the planning tokens, the mean per completion; (N,) -> (N,).

    ``uncertainty`` (N,) is S in nats, ``planning`` (N,) bool, ``row`` (N,) the completion of each token;
    lam is ``strength`` clipped to [0, 1]. The sum over a completion's execution tokens stays, their
    variance shrinks by (1 - lam)^2; planning tokens, and all of them at lam = 0, keep their very bits.
    Raises UserError when lam is not a number.
    """
    if np.isnan(strength):
        raise UserError(f"the strength of pooling is {strength}; give a number from 0 to 1")
    lam = min(max(strength, 0.0), 1.0)
    if lam == 0:
        return uncertainty
    rows = row.max(initial=-1) + 1
    count = np.maximum(row_sum(~planning, row, rows), 1)
    mean = row_sum(np.where(planning, 0.0, uncertainty), row, rows) / count
    return np.where(planning, uncertainty, lam * mean[row] + (1 - lam) * uncertainty)


def normalize_sepa_schedule(schedule: str) -> str:
    """The schedule's name in lower case without blanks; a UserError unless it is linear or auto."""
    name = schedule.strip().lower()
    if name not in SCHEDULES:
        raise unknown_name("SEPA schedule", name, SCHEDULES)
    return name


@dataclass(frozen=True, slots=True)
class Pooling:
    """S_t <- lam mean(S_exec) + (1 - lam) S_t off the planning tokens; lam is a ``SEPAController``'s."""

    sepa_steps: int = 500  # of the ramp from 0 to 1; 0 is no ramp
    sepa_schedule: str = "linear"  # or "auto": at least the ramp, more as the execution variance falls
    sepa_delay_steps: int = 50  # before the ramp
    sepa_correct_rate_gate: float = 0.1  # nothing is pooled until this share of a step's completions was correct
    sepa_ema_decay: float = 0.99  # of the execution variance
    sepa_var_threshold: float = 0.2  # share of the first variance at which "auto" starts to pool
    sepa_warmup: int = 50  # steps whose variance makes the first one

    def __post_init__(self) -> None:
        object.__setattr__(self, "sepa_schedule", normalize_sepa_schedule(self.sepa_schedule))
        _refuse_outside("sepa_steps", self.sepa_steps, 0)
        _refuse_outside("sepa_delay_steps", self.sepa_delay_steps, 0)
        _refuse_outside("sepa_correct_rate_gate", self.sepa_correct_rate_gate, 0, 1)
        _refuse_outside("sepa_ema_decay", self.sepa_ema_decay, 0, 1)
        _refuse_not_positive("sepa_var_threshold", self.sepa_var_threshold)
        _refuse_outside("sepa_warmup", self.sepa_warmup, 1)

    def controller(self) -> SEPAController:
        """A fresh controller with these settings."""
        return SEPAController(**asdict(self))


@dataclass(frozen=True, slots=True)
class _Progress:
    """What a controller has seen."""

    var_ema: float | None = None  # nats^2; None before the first observation
    var_0: float | None = None  # nats^2; None until the warm-up is over
    warmup_seen: int = 0  # observations, counted up to the end of the warm-up
    gate_open: bool = False
    steps_open: int = 0  # calls of ``advance`` since the gate opened
    strength: float = 0.0  # lam of the last of them

    def __post_init__(self) -> None:
        if self.var_ema is not None:
            _refuse_outside("var_ema", self.var_ema, 0)
        if self.var_0 is not None:
            _refuse_not_positive("var_0", self.var_0)
        _refuse_outside("warmup_seen", self.warmup_seen, 0)
        _refuse_outside("steps_open", self.steps_open, 0)
        _refuse_outside("strength", self.strength, 0, 1)
        if self.gate_open not in (True, False):
            raise UserError(f"gate_open is {self.gate_open!r}; set it to true or false")


class SEPAController:
    """The strength lam of pooling, step by step.

    lam = clip((step - delay) / steps, 0, 1), 0 with no steps. "auto" takes the larger of this and
    1 - min(v / v_0 / threshold, 1), v being a running mean of the execution variance and v_0 its value
    after the warm-up. lam is 0 until a correct rate reached the gate, which then stays open.
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
        """The settings are explained at ``Pooling``; ``eps`` is the smallest v_0. Raises UserError."""
        self._how = Pooling(
            sepa_steps, sepa_schedule, sepa_delay_steps, sepa_correct_rate_gate,
            sepa_ema_decay, sepa_var_threshold, sepa_warmup,
        )  # fmt: skip
        _refuse_not_positive("eps", eps)
        self._eps = eps
        self._now = _Progress(gate_open=self._how.sepa_correct_rate_gate == 0)

    @property
    def enabled(self) -> bool:
        """Whether lam can ever leave 0."""
        return self._how.sepa_steps > 0 or self._how.sepa_schedule == "auto"

    @property
    def gate_open(self) -> bool:
        """Whether a correct rate has reached the gate."""
        return self._now.gate_open

    @property
    def strength(self) -> float:
        """lam of the last step that ``advance`` was told of; 0 before the first."""
        return self._now.strength

    def advance(self, correct_rate: float | None, execution: np.ndarray) -> float:
        """One training step: observe it, return its lam.

        ``correct_rate`` is the share of correct completions, None if unknown, ``execution`` the
        uncertainties of all its execution tokens, in nats: one observation, however many completions.
        The ramp counts steps since the gate opened, so lam does not jump when that happens late.
        """
        self.observe_correct_rate(correct_rate)
        self.update_auto_state(execution)
        now, strength = self._now, self.resolve_lambda(self._now.steps_open)
        self._now = replace(now, steps_open=now.steps_open + now.gate_open, strength=strength)
        return strength

    def resolve_lambda(self, step: float) -> float:
        """lam at ``step``, from 0 to 1; 0 while the gate is closed."""
        if not self._now.gate_open:
            return 0.0
        return max(self._ramp(step), self._from_variance())

    def observe_correct_rate(self, rate: float | None) -> None:
        """Open the gate if ``rate`` reaches it; None and what is not finite say nothing."""
        if rate is not None and np.isfinite(rate) and rate >= self._how.sepa_correct_rate_gate:
            self._now = replace(self._now, gate_open=True)

    def update_auto_state(self, execution: Sequence[float] | np.ndarray) -> None:
        """One observation of execution uncertainties, nats, for "auto"; an empty or non-finite one is ignored."""
        values = np.asarray(execution, np.float64)
        if self._how.sepa_schedule != "auto" or not values.size or not np.isfinite(values).all():
            return
        v, decay, now = float(values.var()), self._how.sepa_ema_decay, self._now
        ema = v if now.var_ema is None else decay * now.var_ema + (1 - decay) * v
        seen = min(now.warmup_seen + 1, self._how.sepa_warmup)
        ends = now.var_0 is None and seen == self._how.sepa_warmup
        self._now = replace(now, var_ema=ema, warmup_seen=seen, var_0=max(ema, self._eps) if ends else now.var_0)

    def state_dict(self) -> dict[str, Any]:
        """Settings and progress as plain JSON values."""
        return {**asdict(self._how), "eps": self._eps, **asdict(self._now)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the controller that gave ``state``, its settings included. Raises UserError, changing nothing."""
        if set(state) != set(self.state_dict()):
            odd = ", ".join(sorted(set(state) ^ set(self.state_dict())))
            raise UserError(f"the state of SEPA lacks or does not know {odd}; give what state_dict returned")
        progress = _Progress(**{f.name: state[f.name] for f in fields(_Progress)})
        saved = SEPAController(eps=state["eps"], **{f.name: state[f.name] for f in fields(Pooling)})
        self._how, self._eps, self._now = saved._how, saved._eps, progress

    def _ramp(self, step: float) -> float:
        if self._how.sepa_steps == 0:
            return 0.0
        return float(min(max((step - self._how.sepa_delay_steps) / self._how.sepa_steps, 0.0), 1.0))

    def _from_variance(self) -> float:
        if self._now.var_ema is None or self._now.var_0 is None:
            return 0.0
        return 1 - min(self._now.var_ema / self._now.var_0 / self._how.sepa_var_threshold, 1.0)


def _refuse_outside(name: str, value: float, low: float, high: float = np.inf) -> None:
    if not (low <= value <= high and np.isfinite(value)):
        bounds = f"{low} or more" if high == np.inf else f"a number from {low} to {high}"
        raise UserError(f"{name} is {value}; set it to {bounds}")


def _refuse_not_positive(name: str, value: float) -> None:
    if not 0 < value < np.inf:
        raise UserError(f"{name} is {value}; set it above 0")
