"""The rules about what was sampled: its length, its variety, and how it was rewarded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from .._system.terminal import latest
from .facts import Completions, Facts, at_limit, mean, rises, values
from .finding import Finding

CUT_OFF = 0.30  # of the completions; what lies behind the cut is never seen by the reward
NEVER_STOPS = 0.95  # of the completions: fewer than one in twenty shows the policy what stopping earns
EMPTY = 0.10  # of the completions; an empty one is no answer to anything
SAME = 0.5  # of the completions are one text, and wrong
SAME_UNJUDGED = 0.9  # the same where the reward does not say what is right: a yes-or-no task has 0.5 by nature
LOOPING = 0.2  # of the completions repeat half of their text
GRAM, LOOP = 12, 0.5  # characters of a piece; share of pieces that occurred before
SHORTEST = 4 * GRAM  # characters of a completion that can be said to loop
SURE = 0.1  # nats of a whole completion: 98% are one text, and 85% of groups of eight contain no other
FALLEN = 0.1  # of the entropy at the start
LEFT = 0.75  # accuracy from which being sure is mostly being right
IDLE_GROUPS = 0.5  # of the groups have no signal
PAID = 0.75  # of the completions earn something and are wrong
FAINT = 0.05  # of the strongest reward's spread, by which advantages are divided: a twentieth of its influence
UNDECIDED = 0.5  # of the groups differ in a reward, so there is much to learn from it


def truncation(facts: Facts) -> Finding | None:
    """Find many completions that are cut off."""
    share, found = mean(facts.ending, "truncated"), facts.completions
    if not CUT_OFF < share <= NEVER_STOPS:
        return None
    what = f"{share:.0%} of the completions of {latest(facts.third, 'step')} were cut off{at_limit(facts)}."
    change = "raise rollout.max_tokens, ask for shorter answers in the prompt, or set algorithm.overlong_cache"
    examples = found.examples(found.truncated) if found else ()
    return Finding("truncation", what, change, {"truncated": share}, examples)


def stop_never_learned(facts: Facts) -> Finding | None:
    """Find runs in which almost no completion ends by itself, to the end of the run."""
    share, found = mean(facts.ending, "truncated"), facts.completions
    if not share > NEVER_STOPS:
        return None
    before = mean(facts.beginning, "truncated")
    what = (
        f"{share:.0%} of the completions of {latest(facts.third, 'step')} ran into the limit{at_limit(facts)} "
        f"({before:.0%} at the start): stop tokens are hardly ever sampled, so stopping cannot be learned."
    )
    change = (
        "pay for completions that stop, raise rollout.max_tokens, "
        "or take a model whose chat template and stop tokens fit it"
    )
    evidence = {"truncated": share, "truncated_at_start": before, "length_mean": mean(facts.ending, "length_mean")}
    examples = found.examples(found.truncated) if found else ()
    return Finding("stop_never_learned", what, change, evidence, examples)


def entropy_collapse(facts: Facts) -> Finding | None:
    """Find a policy that has become sure of its answers before they are right."""
    entropy, length = mean(facts.ending, "entropy"), mean(facts.ending, "length_mean")
    start, no_signal = mean(facts.rows[:1], "entropy"), mean(facts.ending, "frac_reward_zero_std")
    sure = entropy * length < SURE or entropy < FALLEN * start
    right = mean(facts.ending, "accuracy")
    if not sure or no_signal < IDLE_GROUPS or right >= LEFT:
        return None
    score = "" if np.isnan(right) else f", with {right:.0%} of the completions right"
    what = (
        f"The entropy of {latest(facts.third, 'step')} is {entropy:.2g} nats per token ({start:.2g} in the first step) "
        f"and {no_signal:.0%} of the groups have no signal{score}: there are no other answers left to try."
    )
    change = (
        "lower optimizer.learning_rate, raise rollout.temperature or algorithm.clip_high, "
        "or add a penalty (algorithm.kl.coefficient)"
    )
    evidence = {"entropy": entropy, "entropy_at_start": start, "agreeing_groups": no_signal, "length_mean": length}
    examples = facts.completions.examples() if facts.completions else ()
    return Finding("entropy_collapse", what, change, evidence, examples)


def empty_completions(facts: Facts) -> Finding | None:
    """Find completions without text."""
    found = _recorded(facts)
    empty = np.array([not text.strip() for text in found.text], bool)
    share = float(empty.mean())
    if share <= EMPTY:
        return None
    reward = _mean(found.reward[empty])
    others = "" if empty.all() else f" (the others {_mean(found.reward[~empty]):.2g})"
    what = (
        f"{share:.0%} of the completions of {latest(facts.third, 'step')} are empty, "
        f"and earn a mean reward of {reward:.2g}{others}."
    )
    change = "let the reward give nothing for an empty completion, and make the prompt end where an answer begins"
    return Finding("empty_completions", what, change, {"empty": share, "reward_mean": reward}, found.examples(empty))


def repeated_completions(facts: Facts) -> Finding | None:
    """Find one text that answers most prompts and is not right."""
    found = _recorded(facts)
    [(text, count)] = Counter(found.text).most_common(1)
    which = np.array([other == text for other in found.text], bool)
    prompts = len({p for p, same in zip(found.prompt, which, strict=True) if same})
    share, right = count / len(found), _mean(found.correct[which])
    limit = SAME_UNJUDGED if np.isnan(right) else SAME
    if not text.strip() or prompts < 2 or share <= limit or right > 0.5:
        return None
    what = (
        f"{share:.0%} of the completions of {latest(facts.third, 'step')} are the same text, "
        f"given to {prompts} different prompts{'' if np.isnan(right) else f' and right for {right:.0%} of them'}."
    )
    change = "check what the reward gives this text, and lower optimizer.learning_rate"
    evidence = {"same_text": share, "prompts": prompts, "reward_mean": _mean(found.reward[which])}
    return Finding("repeated_completions", what, change, evidence, found.examples(which))


def looping_completions(facts: Facts) -> Finding | None:
    """Find completions that repeat themselves."""
    found = _recorded(facts)
    repeats: list[float] = []  # share of the pieces of a text that occurred in it before; 0 for a short text
    for text in found.text:
        pieces = [text[i : i + GRAM] for i in range(len(text) - GRAM + 1)] if len(text) >= SHORTEST else []
        repeats.append(1 - len(set(pieces)) / len(pieces) if pieces else 0.0)
    loops = np.array(repeats) > LOOP
    share = float(loops.mean())
    if share <= LOOPING:
        return None
    what = (
        f"{share:.0%} of the completions of {latest(facts.third, 'step')} repeat themselves: "
        "most of their text occurred in them before."
    )
    change = "check what the reward pays for length, lower rollout.max_tokens, or penalise repetition in the reward"
    evidence = {"looping": share, "reward_mean": _mean(found.reward[loops]), "length_mean": _mean(found.length[loops])}
    return Finding("looping_completions", what, change, evidence, found.examples(loops))


def format_without_answers(facts: Facts) -> Finding | None:
    """Find completions that are wrong and still earn something for their form, to the end of the run."""
    found = _recorded(facts)
    judged = ~np.isnan(found.correct) & ~np.isnan(found.reward)
    accuracy = [values(rows, "accuracy") for rows in (facts.beginning, facts.ending)]
    held_out = facts.held_out("validation")
    # Held-out accuracy improved if the 95% intervals of the first and the last evaluation do not overlap.
    improved = len(held_out) > 1 and held_out[-1].rate.interval[0] > held_out[0].rate.interval[1]
    if not judged.any() or rises(*accuracy) or improved:
        return None
    least = min(found.reward[judged].min(), values(facts.rows, "reward_mean").min())
    paid = judged & (found.correct == 0) & (found.reward > least + 1e-9)
    share = float(paid[judged].mean())
    if share < PAID:
        return None
    what = (
        f"{share:.0%} of the completions of {latest(facts.third, 'step')} are wrong and still earn "
        f"{_mean(found.reward[paid]):.2g}, and the share that is right does not rise "
        f"({accuracy[0].mean():.0%} to {accuracy[1].mean():.0%})."
    )
    change = "pay less for form and more for right answers, or take easier problems"
    evidence = {"wrong_and_paid": share, "reward_mean": _mean(found.reward[paid]), "accuracy": accuracy[1].mean()}
    return Finding("format_without_answers", what, change, evidence, found.examples(paid))


def one_part_dominates(facts: Facts) -> Finding | None:
    """Find one of several rewards that decides alone, though completions of a prompt differ in another."""
    found = facts.early or _recorded(facts)  # by the end, the dominant reward has won
    spread = _spreads(found)
    if len(spread) < 2:
        return None
    strongest = max(spread, key=lambda name: spread[name])
    ids, names = found.groups, found.scores
    groups = range(int(ids.max()) + 1)
    # Of each reward the share of groups in which it is not one number.
    differ = {n: float(np.mean([np.ptp(np.nan_to_num(names[n][ids == g])) > 1e-9 for g in groups])) for n in names}
    faint = [n for n in spread if spread[n] < FAINT * spread[strongest] and differ[n] >= UNDECIDED]
    if not faint:
        return None
    shares = {n: spread[n] / spread[strongest] for n in faint}
    listed = ", ".join(f"{name} ({share:.1%} of its spread)" for name, share in shares.items())
    what = (
        f"Among the rewards {strongest} decides alone: {listed} hardly counts beside it, "
        f"though completions differ in it in {max(differ[n] for n in faint):.0%} of the groups."
    )
    change = f"bring the rewards to one scale, or give {' and '.join(faint)} more weight"
    evidence = {f"spread/{name}": size for name, size in spread.items()}
    return Finding("one_part_dominates", what, change, evidence, found.examples())


def _spreads(found: Completions) -> dict[str, float]:
    """Return the standard deviation that each reward adds within groups, |w_k| sd(s_k).

    The weights w are not recorded; they follow from reward = sum_k w_k s_k. The result is {} where the reward is not
    such a sum, and leaves out rewards of weight 0, which are only watched.
    """
    names = list(found.scores)
    if not names:
        return {}
    columns = np.stack([*found.scores.values(), found.reward], axis=1)
    known = ~np.isnan(columns).any(axis=1)
    if known.sum() <= len(names):
        return {}
    columns = columns[known]
    # Subtract the mean of each group.
    _, ids = np.unique(found.groups[known], return_inverse=True)
    count = np.bincount(ids)[:, None]
    sums = np.zeros((len(count), columns.shape[1]))
    np.add.at(sums, ids, columns)
    within = columns - (sums / count)[ids]
    scores, reward = within[:, :-1], within[:, -1]
    weights = np.linalg.lstsq(scores, reward, rcond=None)[0]
    with np.errstate(all="ignore"):  # Accelerate, on a Mac, raises flags over finite products (numpy 28687)
        missed = reward - scores @ weights
    if (missed**2).sum() > 0.01 * (reward**2).sum():
        return {}
    counted = np.abs(weights) > 1e-6 * np.abs(weights).max()
    return {n: float(abs(w) * s.std()) for n, w, s, c in zip(names, weights, scores.T, counted, strict=True) if c}


def _recorded(facts: Facts) -> Completions:
    assert facts.completions is not None, "the table of rules requires them"
    return facts.completions


def _mean(found: Sequence[float] | np.ndarray) -> float:
    """Return the mean of the known values; NaN if there are none."""
    known = np.asarray(found, float)
    known = known[~np.isnan(known)]
    return float(known.mean()) if len(known) else float("nan")
