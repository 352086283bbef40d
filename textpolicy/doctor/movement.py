"""Rules about how the policy moves: too far or not at all in a step, away from what was sampled, or the wrong way."""

from __future__ import annotations

import math

import numpy as np

from ..loop.metrics import Row
from .facts import Facts, Look, mean, rises, values
from .finding import Finding

GAP = 0.05  # nats: 5% per token, a factor of e over 20 tokens; also the default of on_policy.max_gap
MOST = 0.25  # of the tokens; clipping counts those that moved with their advantage, so twice as many left the range
HARDLY = 0.001  # of the tokens
NEAR = 1e-4  # nats of KL between updates: ratios within 1.4% of 1, where no clip range ends
DOUBLED = math.log(2)  # nats: in one step a token's probability doubled or halved, on average
DOUBLED_KL = DOUBLED**2 / 2  # nats, the KL of that, to second order
CLIPPED_KL = math.log(1.2) ** 2 / 2  # nats: ratios as far as the end of a clip range of 0.2
SPIKE = 10.0  # times the run's median loss
STILL = 0.1  # nats: over the whole run a probability changed by a tenth, had every step pushed the same way
MEASURED = "update_logprob_change"  # mean of |change of a token's log-prob| by a step, nats


def on_policy_gap(facts: Facts) -> Finding | None:
    """The learner does not see the distribution that was sampled."""
    gap = values(facts.rows, "on_policy_gap_mean")
    if not gap.max() > GAP:
        return None
    limit = facts.settings.max_gap
    raised = f"; on_policy.max_gap is {limit:g}" if limit is not None and limit > GAP else ""
    what = (
        f"Before an update the learner's log-probs differ from the sampler's by up to {gap.max():.2g} nats per token "
        f"on average{raised}: the gradient is that of another policy."
    )
    change = "sample and train in the same precision and temperature, or set algorithm.correction.level = 'token'"
    evidence = {"on_policy_gap_mean": float(gap.max()), "on_policy_kl": float(values(facts.rows, "on_policy_kl").max())}
    return Finding("on_policy_gap", what, change, evidence)


def clips_most(facts: Facts) -> Finding | None:
    """Clipping takes the gradient of many tokens."""
    clipped = mean(facts.rows, "clip_fraction_low") + mean(facts.rows, "clip_fraction_high")
    if not clipped > MOST:
        return None
    what = (
        f"Clipping took the gradient of {clipped:.0%} of the tokens: the updates of a step run away from its rollouts."
    )
    change = "lower optimizer.learning_rate or optimizer.updates_per_step, or widen algorithm.clip_low and clip_high"
    return Finding("clips_most", what, change, {"clip_fraction": clipped, "sampler_kl": mean(facts.rows, "sampler_kl")})


def clips_nothing(facts: Facts) -> Finding | None:
    """Several updates per step of which the later ones find the policy where it was."""
    clipped = mean(facts.rows, "clip_fraction_low") + mean(facts.rows, "clip_fraction_high")
    kl = mean(facts.rows, "sampler_kl")
    if not _several_updates(facts) or not (clipped < HARDLY and kl < NEAR):
        return None
    what = (
        f"Of {facts.settings.updates_per_step} updates per step the later ones found the policy where it was: "
        f"{clipped:.2%} of the tokens were clipped, and the KL to the sampler was {kl:.1g} nats."
    )
    change = "raise optimizer.learning_rate, or set optimizer.updates_per_step = 1, which is the same for less"
    return Finding("clips_nothing", what, change, {"clip_fraction": clipped, "sampler_kl": kl})


def held_out_falls(facts: Facts) -> Finding | None:
    """The training reward rises while held-out accuracy falls."""
    fall = _fall(facts)
    before, after = values(facts.beginning, "reward_mean"), values(facts.ending, "reward_mean")
    if fall is None or not rises(before, after):
        return None
    best, last = fall
    what = (
        f"The training reward rose from {before.mean():.2f} to {after.mean():.2f} while held-out accuracy fell from "
        f"{best.rate} after {best.step} steps to {last.rate} after {last.step}: "
        "the reward pays for something else than right answers."
    )
    change = "read the best-paid completions and mend the reward, or end the run earlier"
    evidence = {"reward_before": float(before.mean()), "reward_after": float(after.mean())}
    evidence |= {"held_out_best": best.rate.value, "held_out_last": last.rate.value}
    best_paid = () if facts.completions is None else facts.completions.examples(_best_paid(facts.completions.reward))
    return Finding("held_out_falls", what, change, evidence, best_paid)


def learning_rate_high(facts: Facts) -> Finding | None:
    """Single steps change the policy beyond recognition."""
    signs = _jumps(facts) | _drifts(facts) | _spikes(facts) | _collapse(facts)
    if not signs:
        return None
    rate = float(values(facts.rows, "learning_rate").max())
    what = f"The learning rate of {rate:g} is too high: {'; '.join(signs)}."
    change = "divide optimizer.learning_rate by 3 to 10, or lengthen optimizer.warmup_steps"
    figures = {name: value for sign in signs.values() for name, value in sign.items()}
    return Finding("learning_rate_high", what, change, {"learning_rate": rate, **figures})


def learning_rate_low(facts: Facts) -> Finding | None:
    """All steps together can hardly have changed the policy."""
    rate = values(facts.rows, "learning_rate")
    moved = [row for row in facts.rows if row["updated"] and MEASURED in row and row["learning_rate"]]
    if not moved:
        return None
    per_rate = max((row[MEASURED] + _gap(row)) / row["learning_rate"] for row in moved)
    at_most = float(per_rate * rate.sum())  # a step's change is in proportion to its rate
    if at_most > STILL:
        return None
    what = (
        f"The learning rate of {rate.max():g} is too low: a step changed log-probs by {mean(moved, MEASURED):.1g} nats "
        f"per token, which over {len(facts.rows)} steps is {at_most:.2g} at most."
    )
    change = "multiply optimizer.learning_rate by 3 to 10, or train for more steps"
    return Finding("learning_rate_low", what, change, {"learning_rate": float(rate.max()), "change_at_most": at_most})


# ---- signs of steps that are too long: sentence -> figures


def _jumps(facts: Facts) -> dict[str, dict[str, float]]:
    change = max((row[MEASURED] - _gap(row) for row in facts.rows if MEASURED in row), default=0.0)
    if change <= DOUBLED:
        return {}
    return {f"one step changed the log-probs of what was sampled by {change:.2g} nats per token": {MEASURED: change}}


def _drifts(facts: Facts) -> dict[str, dict[str, float]]:
    kl = values(facts.rows, "sampler_kl")
    if not _several_updates(facts) or not len(kl) or kl.max() <= DOUBLED_KL or _mismatched(facts):
        return {}
    return {f"within a step the KL to the sampler reached {kl.max():.2g} nats": {"sampler_kl": float(kl.max())}}


def _spikes(facts: Facts) -> dict[str, dict[str, float]]:
    """Large losses of large ratios; without those a loss is no larger than the advantages."""
    moved = [row for row in facts.rows if row["updated"]]
    loss = np.abs(values(moved, "loss"))
    if not _several_updates(facts) or not len(loss) or _mismatched(facts):
        return {}
    spikes = (loss > SPIKE * np.median(loss)) & (values(moved, "sampler_kl") > CLIPPED_KL)
    if not spikes.any():
        return {}
    times = float((loss[spikes] / np.median(loss)).max())
    return {f"the loss spiked to {times:.0f} times its median": {"loss_spike": times}}


def _collapse(facts: Facts) -> dict[str, dict[str, float]]:
    fall = _fall(facts)
    before, after = values(facts.beginning, "reward_mean"), values(facts.ending, "reward_mean")
    if fall is None or not rises(-before, -after) or _mismatched(facts):
        return {}
    best, last = fall
    said = f"held-out accuracy fell from {best.rate} to {last.rate} and the training reward with it"
    return {said: {"held_out_best": best.rate.value, "held_out_last": last.rate.value}}


# ---- what they compare


def _gap(row: Row) -> float:
    """Nats between sampler and learner before the update: the change itself is within that of what is measured."""
    return row.get("on_policy_gap_mean", 0.0)


def _several_updates(facts: Facts) -> bool:
    return (facts.settings.updates_per_step or 1) > 1


def _mismatched(facts: Facts) -> bool:
    """The sampler differs from the learner before any update, which a learning rate is not to blame for."""
    gap = values(facts.rows, "on_policy_gap_mean")
    return bool(len(gap)) and float(gap.max()) > GAP


def _fall(facts: Facts) -> tuple[Look, Look] | None:
    """The best look at the validation problems and the last one, if they differ beyond their 95% intervals."""
    looks = facts.held_out()
    if len(looks) < 2:
        return None
    best, last = max(looks, key=lambda look: look.rate.value), looks[-1]
    return (best, last) if last.rate.interval[1] < best.rate.interval[0] else None


def _best_paid(reward: np.ndarray) -> np.ndarray:
    """(N,) bool."""
    return reward == np.nanmax(reward)
