"""The rules about how the policy moves: too far or not at all in a step, off the sampled policy, the wrong way."""

from __future__ import annotations

import math

import numpy as np

from .._system.terminal import counted
from .facts import Evaluation, Facts, largest, mean, rises, values
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
    """Find a learner that does not see the distribution that was sampled."""
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
    evidence = {"on_policy_gap_mean": float(gap.max()), "on_policy_kl": largest(facts.rows, "on_policy_kl")}
    return Finding("on_policy_gap", what, change, evidence)


def clips_most(facts: Facts) -> Finding | None:
    """Find clipping that removes the gradient of many tokens."""
    clipped = mean(facts.rows, "clip_fraction_low") + mean(facts.rows, "clip_fraction_high")
    if not clipped > MOST:
        return None
    what = (
        f"Clipping removed the gradient of {clipped:.0%} of the tokens: "
        "the updates of a step move too far from its rollouts."
    )
    change = "lower optimizer.learning_rate or optimizer.updates_per_step, or widen algorithm.clip_low and clip_high"
    return Finding("clips_most", what, change, {"clip_fraction": clipped, "sampler_kl": mean(facts.rows, "sampler_kl")})


def clips_nothing(facts: Facts) -> Finding | None:
    """Find several updates per step after the first of which the policy has hardly moved."""
    clipped = mean(facts.rows, "clip_fraction_low") + mean(facts.rows, "clip_fraction_high")
    kl, updates = mean(facts.rows, "sampler_kl"), facts.settings.updates_per_step or 1
    if updates == 1 or not (clipped < HARDLY and kl < NEAR):
        return None
    what = (
        f"Of {updates} updates per step the later ones found the policy where it was: "
        f"{clipped:.2%} of the tokens were clipped, and the KL to the sampler was {kl:.1g} nats."
    )
    change = "raise optimizer.learning_rate, or set optimizer.updates_per_step = 1, which is the same for less"
    return Finding("clips_nothing", what, change, {"clip_fraction": clipped, "sampler_kl": kl})


def held_out_falls(facts: Facts) -> Finding | None:
    """Find a training reward that rises while held-out accuracy falls."""
    fall, found = _fall(facts), facts.completions
    before, after = values(facts.beginning, "reward_mean"), values(facts.ending, "reward_mean")
    if fall is None or not rises(before, after):
        return None
    best, last = fall
    what = (
        f"The training reward rose from {before.mean():.2f} to {after.mean():.2f} while held-out accuracy fell from "
        f"{best.rate} after {counted(best.step, 'step')} to {last.rate} after {last.step}: "
        "the reward pays for something other than right answers."
    )
    change = "read the best-paid completions and fix the reward, or end the run earlier"
    evidence = {"reward_before": float(before.mean()), "reward_after": float(after.mean())}
    evidence |= {"held_out_best": best.rate.value, "held_out_last": last.rate.value}
    best_paid = () if found is None else found.examples(found.reward == np.nanmax(found.reward))
    return Finding("held_out_falls", what, change, evidence, best_paid)


def learning_rate_high(facts: Facts) -> Finding | None:
    """Find single steps that change the policy beyond recognition."""
    rows = facts.rows
    signs: list[str] = []
    figures: dict[str, float] = {}
    gap = values(rows, "on_policy_gap_mean")
    mismatched = bool(len(gap)) and float(gap.max()) > GAP  # before any update, which the rate is not to blame for
    several_updates = (facts.settings.updates_per_step or 1) > 1
    # A jump: the change itself is within the gap before the update of what is measured.
    jump = max((row[MEASURED] - row.get("on_policy_gap_mean", 0.0) for row in rows if MEASURED in row), default=0.0)
    if not jump <= DOUBLED:  # NaN is a sign too
        signs.append(f"one step changed the log-probs of what was sampled by {jump:.2g} nats per token")
        figures[MEASURED] = jump
    # A drift within a step.
    kl = values(rows, "sampler_kl")
    if several_updates and len(kl) and not kl.max() <= DOUBLED_KL and not mismatched:
        signs.append(f"within a step the KL to the sampler reached {kl.max():.2g} nats")
        figures["sampler_kl"] = float(kl.max())
    # A spike: a large loss under large ratios; without those a loss is no larger than the advantages.
    moved = [row for row in rows if row.get("updated") and "loss" in row and "sampler_kl" in row]
    loss = np.abs(values(moved, "loss"))
    if several_updates and len(loss) and not mismatched:
        spikes = (loss > SPIKE * np.median(loss)) & (values(moved, "sampler_kl") > CLIPPED_KL)
        if spikes.any():
            figures["loss_spike"] = float((loss[spikes] / np.median(loss)).max())
            signs.append(f"the loss spiked to {figures['loss_spike']:.0f} times its median")
    # A collapse of held-out accuracy and training reward together.
    fall = _fall(facts)
    before, after = values(facts.beginning, "reward_mean"), values(facts.ending, "reward_mean")
    if fall is not None and rises(-before, -after) and not mismatched:
        best, last = fall
        signs.append(f"held-out accuracy fell from {best.rate} to {last.rate} and the training reward with it")
        figures |= {"held_out_best": best.rate.value, "held_out_last": last.rate.value}
    if not signs:
        return None
    rate = largest(rows, "learning_rate")
    what = f"The learning rate of {rate:g} is too high: {'; '.join(signs)}."
    change = "divide optimizer.learning_rate by 3 to 10, or lengthen optimizer.warmup_steps"
    return Finding("learning_rate_high", what, change, {"learning_rate": rate, **figures})


def learning_rate_low(facts: Facts) -> Finding | None:
    """Find runs whose steps together can hardly have changed the policy."""
    rate = values(facts.rows, "learning_rate")
    moved = [row for row in facts.rows if row.get("updated") and MEASURED in row and row.get("learning_rate")]
    if not moved:
        return None
    # The change itself is within the gap before the update of what is measured.
    per_rate = max((row[MEASURED] + row.get("on_policy_gap_mean", 0.0)) / row["learning_rate"] for row in moved)
    at_most = float(per_rate) * float(rate.sum())  # a step's change is proportional to its rate
    if not at_most <= STILL:
        return None
    what = (
        f"The learning rate of {rate.max():g} is too low: a step changed log-probs by {mean(moved, MEASURED):.1g} nats "
        f"per token, which over {counted(len(facts.rows), 'step')} is {at_most:.2g} at most."
    )
    change = "multiply optimizer.learning_rate by 3 to 10, or train for more steps"
    return Finding("learning_rate_low", what, change, {"learning_rate": float(rate.max()), "change_at_most": at_most})


def _fall(facts: Facts) -> tuple[Evaluation, Evaluation] | None:
    """Return the best and the last evaluation on validation problems if their 95% intervals do not overlap."""
    evaluations = facts.held_out("validation")
    if len(evaluations) < 2:
        return None
    best, last = max(evaluations, key=lambda evaluation: evaluation.rate.value), evaluations[-1]
    return (best, last) if last.rate.interval[1] < best.rate.interval[0] else None
