"""SEPA: pool the uncertainty of execution tokens step by step, so that planning tokens stand out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
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


def normalize_sepa_schedule(schedule: str) -> str:
    """Return the schedule's name in lower case without blanks. Raises UserError unless it is linear or auto."""
    name = schedule.strip().lower()
    if name not in SCHEDULES:
        raise unknown_name("SEPA schedule", name, SCHEDULES)
    return name


@dataclass(frozen=True, slots=True)
class Pooling:
    """The pooling S_t <- lam mean(S_exec) + (1 - lam) S_t off planning tokens, lam from a ``SEPAController``."""

    sepa_steps: int = 500  # steps of the ramp from 0 to 1; 0 means no ramp
    sepa_schedule: str = "linear"  # or "auto": at least the ramp, more as the execution variance falls
    sepa_delay_steps: int = 50  # steps before the ramp
    sepa_correct_rate_gate: float = 0.1  # nothing is pooled before this share of a step's completions is correct
    sepa_ema_decay: float = 0.99  # decay of the mean execution variance
    sepa_var_threshold: float = 0.2  # share of the first variance at which "auto" starts to pool
    sepa_warmup: int = 50  # steps before the variance is taken as the first one

    def __post_init__(self) -> None:
        object.__setattr__(self, "sepa_schedule", normalize_sepa_schedule(self.sepa_schedule))
        refuse_outside("sepa_steps", self.sepa_steps, 0)
        refuse_outside("sepa_delay_steps", self.sepa_delay_steps, 0)
        refuse_outside("sepa_correct_rate_gate", self.sepa_correct_rate_gate, 0, 1)
        refuse_outside("sepa_ema_decay", self.sepa_ema_decay, 0, 1)
        refuse_not_positive("sepa_var_threshold", self.sepa_var_threshold)
        refuse_outside("sepa_warmup", self.sepa_warmup, 1)

    def controller(self) -> SEPAController:
        """Return a new controller with these settings."""
        return SEPAController(**asdict(self))


@dataclass(frozen=True, slots=True)
class _Progress:
    """The observations that a controller has made."""

    var_ema: float | None = None  # nats^2; None before the first observation
    var_0: float | None = None  # nats^2; None until the warm-up is over
    warmup_seen: int = 0  # observations, counted up to the end of the warm-up
    gate_open: bool = False
    steps_open: int = 0  # calls of ``advance`` since the gate opened
    strength: float = 0.0  # lam of the last call

    def __post_init__(self) -> None:
        if self.var_ema is not None:
            refuse_outside("var_ema", self.var_ema, 0)
        if self.var_0 is not None:
            refuse_not_positive("var_0", self.var_0)
        refuse_outside("warmup_seen", self.warmup_seen, 0)
        refuse_outside("steps_open", self.steps_open, 0)
        refuse_outside("strength", self.strength, 0, 1)
        if self.gate_open not in (True, False):
            raise UserError(f"gate_open is {self.gate_open!r}; set it to true or false")


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
        self._progress = _Progress(gate_open=self._settings.sepa_correct_rate_gate == 0)

    @property
    def enabled(self) -> bool:
        """Return whether lam can ever leave 0."""
        return self._settings.sepa_steps > 0 or self._settings.sepa_schedule == "auto"

    @property
    def gate_open(self) -> bool:
        """Return whether a correct rate has reached the gate."""
        return self._progress.gate_open

    @property
    def strength(self) -> float:
        """Return lam of the last step given to ``advance``; 0 before the first."""
        return self._progress.strength

    def advance(self, correct_rate: float | None, execution: Floats) -> float:
        """Observe one training step and return its lam.

        ``correct_rate`` is the share of correct completions, None if unknown, ``execution`` the
        uncertainties of all its execution tokens in nats, which make one observation.
        The ramp counts steps since the gate opened, so lam does not jump when that happens late.
        """
        self.observe_correct_rate(correct_rate)
        self.update_auto_state(execution)
        now, strength = self._progress, self.resolve_lambda(self._progress.steps_open)
        self._progress = replace(now, steps_open=now.steps_open + now.gate_open, strength=strength)
        return strength

    def resolve_lambda(self, step: float) -> float:
        """Return lam at ``step``, from 0 to 1; 0 while the gate is closed."""
        settings, seen = self._settings, self._progress
        if not seen.gate_open:
            return 0.0
        ramp = from_variance = 0.0
        if settings.sepa_steps > 0:
            ramp = float(min(max((step - settings.sepa_delay_steps) / settings.sepa_steps, 0.0), 1.0))
        if seen.var_ema is not None and seen.var_0 is not None:
            from_variance = 1 - min(seen.var_ema / seen.var_0 / settings.sepa_var_threshold, 1.0)
        return max(ramp, from_variance)

    def observe_correct_rate(self, rate: float | None) -> None:
        """Open the gate if ``rate`` reaches it; None and a rate that is not finite are ignored."""
        if rate is not None and np.isfinite(rate) and rate >= self._settings.sepa_correct_rate_gate:
            self._progress = replace(self._progress, gate_open=True)

    def update_auto_state(self, execution: Sequence[float] | Floats) -> None:
        """Observe execution uncertainties, nats, for "auto"; an empty or non-finite observation is ignored."""
        values = np.asarray(execution, np.float64)
        if self._settings.sepa_schedule != "auto" or not values.size or not np.isfinite(values).all():
            return
        v, decay, now = float(values.var()), self._settings.sepa_ema_decay, self._progress
        ema = v if now.var_ema is None else decay * now.var_ema + (1 - decay) * v
        seen = min(now.warmup_seen + 1, self._settings.sepa_warmup)
        ends = now.var_0 is None and seen == self._settings.sepa_warmup
        self._progress = replace(now, var_ema=ema, warmup_seen=seen, var_0=max(ema, self._eps) if ends else now.var_0)

    def state_dict(self) -> dict[str, Any]:
        """Return settings and progress as plain JSON values."""
        return {**asdict(self._settings), "eps": self._eps, **asdict(self._progress)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a ``state_dict``, including its settings. Raises UserError, changing nothing."""
        if set(state) != set(self.state_dict()):
            odd = ", ".join(sorted(set(state) ^ set(self.state_dict())))
            raise UserError(f"the state of SEPA has missing or unknown entries, {odd}; give what state_dict returned")
        progress = _Progress(**{f.name: state[f.name] for f in fields(_Progress)})
        saved = SEPAController(eps=state["eps"], **{f.name: state[f.name] for f in fields(Pooling)})
        self._settings, self._eps, self._progress = saved._settings, saved._eps, progress
