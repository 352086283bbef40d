"""Rules for runs in which there was little or nothing to learn from: groups that agree, rewards that are missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..loop.metrics import Row
from .facts import Facts, at_limit, mean, values
from .finding import Finding

IDLE = 1 / 3  # of the steps without any gradient; a run that has learned its task agrees now and then
AGREEING = 0.8  # of all groups: four fifths of the sampling taught nothing
ALWAYS = 0.95  # nineteen in twenty is as good as all
RARELY = 0.05
UNSCORED = 0.01  # of the completions: one in a hundred is no longer an accident
SHORT = 0.5  # of the steps

Cause = Literal["truncated", "constant", "pass", "fail", "mixed", "unscored"]


def no_gradient(facts: Facts) -> Finding | None:
    """No step moved the adapter."""
    moved = values(facts.rows, "updated") > 0
    if moved.any():
        return None
    steps, agreed = len(facts.rows), values(facts.rows, "frac_reward_zero_std")
    evidence = {"steps": steps, "steps_moved": 0, "agreeing_groups": float(agreed.mean())}
    if (agreed == 1).all():
        what = (
            f"in {steps} of {steps} steps every group's rewards agreed{_rewards(facts.rows)}, so there was no gradient"
        )
        change = (
            "use a reward that tells completions of one prompt apart, an easier or harder task, "
            "or a larger rollout.group_size"
        )
        return Finding("no_gradient", f"The adapter did not move: {what}.", change, evidence)
    share = mean(facts.rows, "truncated")
    what = f"in {steps} of {steps} steps no completion had weight, though groups disagreed ({share:.0%} were truncated)"
    change = "set algorithm.mask_truncated = false or raise rollout.max_tokens; otherwise look at the advantages"
    return Finding("no_gradient", f"The adapter did not move: {what}.", change, evidence | {"truncated": share})


def all_fail(facts: Facts) -> Finding | None:
    """Groups agree because every completion fails."""
    return _agreement(
        facts,
        "fail",
        "all_fail",
        "because nearly every completion fails",
        "take easier problems (rollout.curriculum = 'pass_rate'), pay for partial success in the reward, "
        "or raise rollout.group_size to find the rare success",
    )


def all_pass(facts: Facts) -> Finding | None:
    """Groups agree because every completion passes."""
    return _agreement(
        facts,
        "pass",
        "all_pass",
        "because nearly every completion is right already",
        "take harder problems, or end the run here",
    )


def all_truncated(facts: Facts) -> Finding | None:
    """Groups agree because every completion was cut off."""
    return _agreement(
        facts,
        "truncated",
        "all_truncated",
        f"and nearly every completion was cut off{at_limit(facts)}",
        "raise rollout.max_tokens, or ask for shorter answers in the prompt",
    )


def reward_constant(facts: Facts) -> Finding | None:
    """Groups agree because the reward is one number."""
    return _agreement(
        facts,
        "constant",
        "reward_constant",
        "because the reward is the same number for every completion",
        "look at the reward function: print it for a good and a bad completion of one prompt",
    )


def groups_agree(facts: Facts) -> Finding | None:
    """Groups agree though completions are neither all right nor all wrong."""
    return _agreement(
        facts,
        "mixed",
        "groups_agree",
        "though completions are neither all right nor all wrong: a prompt is always solved or never, "
        "or the reward does not tell its completions apart",
        "draw prompts that are solved now and then (rollout.curriculum = 'pass_rate', or algorithm.resample), "
        "raise rollout.group_size, or compare the rewards of a right and a wrong completion",
    )


def unscorable(facts: Facts) -> Finding | None:
    """Completions that could not be scored."""
    share = mean(facts.rows, "unscorable")
    if not share > UNSCORED:
        return None
    what = f"{share:.1%} of the completions could not be scored (reward None or NaN) and taught nothing."
    return Finding("unscorable", what, "make the reward return a number for them", {"unscorable": share})


def not_finite(facts: Facts) -> Finding | None:
    """Updates that were skipped because their loss or gradient was not finite."""
    skipped = int((values(facts.rows, "skipped") > 0).sum())
    if not skipped:
        return None
    what = f"In {skipped} of {len(facts.rows)} steps a loss or gradient was not finite, and an update was skipped."
    change = "lower optimizer.learning_rate, load the model in float32, or look for huge rewards"
    return Finding("not_finite", what, change, {"skipped_steps": skipped})


def short_batches(facts: Facts) -> Finding | None:
    """Dynamic sampling did not find enough groups that disagree."""
    short = float((values(facts.rows, "batch_full") == 0).mean())
    if short <= SHORT:
        return None
    draws = float(values(facts.rows, "prompt_draws").max())
    steps = round(short * len(facts.rows))
    what = (
        f"In {steps} of {len(facts.rows)} steps too few groups disagreed even after {draws:.0f} draws of prompts, "
        "and the step trained on fewer."
    )
    change = "take problems that are solved now and then, or raise algorithm.resample"
    return Finding("short_batches", what, change, {"short_steps": short, "prompt_draws": draws})


# ---- how groups agree, and why


def _agreement(facts: Facts, cause: Cause, name: str, because: str, change: str) -> Finding | None:
    """The finding ``name``, if groups agree too often and ``cause`` is why."""
    agreed = _agreeing(facts.rows)
    if not agreed or _cause(facts, agreed) != cause:
        return None
    idle = sum(row["updated"] == 0 for row in facts.rows)
    share = mean(facts.rows, "frac_reward_zero_std")
    what = (
        f"{share:.0%} of the groups agreed on one reward{_rewards(agreed)}, {because}; "
        f"{idle} of {len(facts.rows)} steps had no gradient at all."
    )
    known = {key: mean(agreed, key) for key in ("accuracy", "truncated", "reward_mean", "reward_std")}
    evidence = {"agreeing_groups": share, "idle_steps": idle, "steps": len(facts.rows)}
    examples = facts.completions.examples(np.ones(len(facts.completions), bool)) if facts.completions else ()
    return Finding(name, what, change, evidence | {k: v for k, v in known.items() if not np.isnan(v)}, examples)


def _agreeing(rows: Sequence[Row]) -> Sequence[Row]:
    """The steps in which groups agree too often: those without a gradient, or all; none where it does not matter."""
    idle = [row for row in rows if row["updated"] == 0 and row["frac_reward_zero_std"] == 1]
    if len(idle) > IDLE * len(rows):
        return idle
    return rows if mean(rows, "frac_reward_zero_std") > AGREEING else ()


def _cause(facts: Facts, agreed: Sequence[Row]) -> Cause:
    right = mean(agreed, "accuracy")  # NaN where the reward does not say
    if not len(values(agreed, "reward_mean")):
        return "unscored"  # which has a rule of its own
    if mean(agreed, "truncated") >= ALWAYS:
        return "truncated"
    if _one_number(facts.rows) and not _plainly_failed_or_passed(facts.rows):
        return "constant"
    if right >= ALWAYS:
        return "pass"
    return "fail" if right <= RARELY else "mixed"


def _one_number(rows: Sequence[Row]) -> bool:
    """The reward never varied, within a step or between steps."""
    within, between = values(rows, "reward_std"), values(rows, "reward_mean")
    return bool((within < 1e-9).all() and np.ptp(between) < 1e-9)


def _plainly_failed_or_passed(rows: Sequence[Row]) -> bool:
    """One number is what a sound reward gives if all are right, or all wrong and worth nothing."""
    right, reward = mean(rows, "accuracy"), mean(rows, "reward_mean")
    return right == 1 or (right == 0 and reward <= 0)


def _rewards(rows: Sequence[Row]) -> str:
    """Which rewards these were, as an aside."""
    found = values(rows, "reward_mean")
    if not len(found):
        return " (none could be scored)"
    low, high = found.min(), found.max()
    return f" (mean {f'always {low:g}' if high - low < 1e-9 else f'{low:.3g} to {high:.3g} by step'})"
