"""The rules for runs with little or nothing to learn from: no-signal groups, and rewards that are missing.

A no-signal group is one whose completions all got the same reward, so none of them has an advantage.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..loop.metrics import Row
from .facts import Facts, at_limit, largest, mean, values
from .finding import Finding

IDLE = 1 / 3  # of the steps without any gradient; a run that has learned its task has some now and then
NO_SIGNAL = 0.8  # of all groups: four fifths of the sampling taught nothing
ALWAYS = 0.95  # nineteen in twenty is as good as all
RARELY = 0.05
UNSCORED = 0.01  # of the completions: one in a hundred is no longer an accident
SHORT = 0.5  # of the steps
CAUSES = {  # rule -> why groups have no signal, what to change
    "reward_constant": (
        "because the reward is the same number for every completion",
        "check the reward function: print it for a good and a bad completion of one prompt",
    ),
    "all_truncated": (
        "and nearly every completion was cut off{limit}",
        "raise rollout.max_tokens, or ask for shorter answers in the prompt",
    ),
    "all_fail": (
        "because nearly every completion fails",
        "teach first ([[stage]] kind = 'sft', or 'distill' with a teacher, before kind = 'rl'), take easier problems "
        "(rollout.curriculum = 'pass_rate'), pay for partial success in the reward, or raise rollout.group_size to "
        "find the rare success",
    ),
    "all_pass": (
        "because nearly every completion is right already",
        "take harder problems, or end the run here",
    ),
    "groups_agree": (
        "though completions are neither all right nor all wrong: a prompt is always solved or never, "
        "or the reward does not tell its completions apart",
        "draw prompts that are solved now and then (rollout.curriculum = 'pass_rate', or algorithm.resample), "
        "raise rollout.group_size, or compare the rewards of a right and a wrong completion",
    ),
}


def no_gradient(facts: Facts) -> Finding | None:
    """Find runs in which no step moved the adapter."""
    if (values(facts.rows, "updated") > 0).any():
        return None
    steps, equal = len(facts.rows), values(facts.rows, "frac_reward_zero_std")
    every = "the only step" if steps == 1 else f"{steps} of {steps} steps"
    evidence = {"steps": steps, "steps_moved": 0, "agreeing_groups": mean(facts.rows, "frac_reward_zero_std")}
    if len(equal) and (equal == 1).all():
        what = f"in {every} the rewards within every group were equal{_rewards(facts.rows)}, so there was no gradient"
        change = (
            "use a reward that tells completions of one prompt apart, an easier or harder task, "
            "or a larger rollout.group_size"
        )
        return Finding("no_gradient", f"The adapter did not move: {what}.", change, evidence)
    share = mean(facts.rows, "truncated")
    what = f"in {every} no completion had weight, though rewards differed ({share:.0%} were truncated)"
    change = "set algorithm.mask_truncated = false or raise rollout.max_tokens; otherwise check the advantages"
    return Finding("no_gradient", f"The adapter did not move: {what}.", change, evidence | {"truncated": share})


def no_signal(facts: Facts, rule: str) -> Finding | None:
    """Find too many no-signal groups, if ``rule``, a key of CAUSES, is what explains them."""
    rows = facts.rows
    # The steps that show it: those without a gradient, or all.
    idle = [row for row in rows if row.get("updated") == 0 and row.get("frac_reward_zero_std") == 1]
    share = mean(rows, "frac_reward_zero_std")
    shown = idle if len(idle) > IDLE * len(rows) else rows if share > NO_SIGNAL else ()
    if not len(values(shown, "reward_mean")):
        return None  # too few, or nothing could be scored, which has a rule of its own
    # One number is what a sound reward gives if all are right, or all wrong and worth nothing.
    means = values(rows, "reward_mean")
    never_varied = largest(rows, "reward_std") < 1e-9 and means.max() - 1e-9 < means.min()
    right, reward = mean(rows, "accuracy"), mean(rows, "reward_mean")
    sound = right == 1 or (right == 0 and reward <= 0)
    right, cut = mean(shown, "accuracy"), mean(shown, "truncated") >= ALWAYS  # NaN where the reward does not say
    if never_varied and not sound and not (cut and reward <= 0):  # nothing is what cut-off completions should get
        cause = "reward_constant"
    elif right >= ALWAYS:
        cause = "all_pass"
    else:
        cause = "all_truncated" if cut else "all_fail" if right <= RARELY else "groups_agree"
    if cause != rule:
        return None
    because, change = CAUSES[rule]
    steps_idle = sum(row.get("updated") == 0 for row in rows)
    what = (
        f"{share:.0%} of the groups had no signal, one reward for all their completions{_rewards(shown)}, "
        f"{because.format(limit=at_limit(facts))}; {steps_idle} of {len(rows)} steps had no gradient at all."
    )
    known = {key: mean(shown, key) for key in ("accuracy", "truncated", "reward_mean", "reward_std")}
    evidence = {"agreeing_groups": share, "idle_steps": steps_idle, "steps": len(rows)}
    examples = facts.completions.examples() if facts.completions else ()
    return Finding(rule, what, change, evidence | {k: v for k, v in known.items() if not np.isnan(v)}, examples)


def unscorable(facts: Facts) -> Finding | None:
    """Find completions that could not be scored."""
    share = mean(facts.rows, "unscorable")
    if not share > UNSCORED:
        return None
    what = f"{share:.1%} of the completions could not be scored (reward None or NaN) and taught nothing."
    return Finding("unscorable", what, "make the reward return a number for them", {"unscorable": share})


def not_finite(facts: Facts) -> Finding | None:
    """Find updates that were skipped because their loss or gradient was not finite."""
    skipped = int((values(facts.rows, "skipped") > 0).sum())
    if not skipped:
        return None
    what = f"In {skipped} of {len(facts.rows)} steps a loss or gradient was not finite, and an update was skipped."
    change = "lower optimizer.learning_rate, load the model in float32, or check for huge rewards"
    return Finding("not_finite", what, change, {"skipped_steps": skipped})


def short_batches(facts: Facts) -> Finding | None:
    """Find dynamic sampling that draws too few groups with a signal."""
    short = float((values(facts.rows, "batch_full") == 0).mean())
    if short <= SHORT:
        return None
    draws = largest(facts.rows, "prompt_draws")
    steps = round(short * len(facts.rows))
    what = (
        f"In {steps} of {len(facts.rows)} steps too few groups had a signal even after {draws:.0f} draws of prompts, "
        "and the step trained on fewer."
    )
    change = "take problems that are solved now and then, or raise algorithm.resample"
    return Finding("short_batches", what, change, {"short_steps": short, "prompt_draws": draws})


def _rewards(rows: Sequence[Row]) -> str:
    """Return the mean rewards of ``rows`` in parentheses."""
    found = values(rows, "reward_mean")
    if not len(found):
        return " (none could be scored)"
    low, high = found.min(), found.max()
    return f" (mean {f'always {low:g}' if high - 1e-9 < low else f'{low:.3g} to {high:.3g} by step'})"
