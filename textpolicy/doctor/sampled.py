"""Rules about what was sampled: its length, its variety, and what the rewards made of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from .facts import Completions, Facts, at_limit, improves, mean, rises, values
from .finding import Example, Finding

CUT_OFF = 0.30  # of the completions; what lies behind the cut is never seen by the reward
NEVER_STOPS = 0.95  # of the completions: fewer than one in twenty shows the policy what stopping earns
EMPTY = 0.10  # of the completions; an empty one is no answer to anything
SAME = 0.5  # of the completions are one text, and wrong
SAME_UNJUDGED = 0.9  # the same where nobody says what is right: a yes-or-no task has 0.5 by nature
LOOPING = 0.2  # of the completions say half of what they say again
GRAM, LOOP = 12, 0.5  # characters of a piece; share of pieces that stood before
SHORTEST = 4 * GRAM  # characters of a completion that can be said to loop
SURE = 0.1  # nats of a whole completion: 98% are one text, and 85% of groups of eight hold no other
FALLEN = 0.1  # of the entropy at the start
LEFT = 0.75  # accuracy from which being sure is mostly being right
IDLE_GROUPS = 0.5  # of the groups agree
PAID = 0.75  # of the completions earn something and are wrong
FAINT = 0.05  # of the strongest reward's spread: what that is divided by leaves it a twentieth of a voice
UNDECIDED = 0.5  # of the groups disagree in a reward, so there is much to learn from it


def truncation(facts: Facts) -> Finding | None:
    """Many completions are cut off."""
    share = mean(facts.ending, "truncated")
    if not CUT_OFF < share <= NEVER_STOPS:
        return None
    what = f"{share:.0%} of the completions of the last {facts.third} steps were cut off{at_limit(facts)}."
    change = "raise rollout.max_tokens, ask for shorter answers in the prompt, or set algorithm.overlong_cache"
    return Finding("truncation", what, change, {"truncated": share}, _cut_off(facts))


def stop_never_learned(facts: Facts) -> Finding | None:
    """Almost nothing ends by itself, to the end of the run."""
    share = mean(facts.ending, "truncated")
    if not share > NEVER_STOPS:
        return None
    before = mean(facts.beginning, "truncated")
    what = (
        f"{share:.0%} of the completions of the last {facts.third} steps ran into the limit{at_limit(facts)} "
        f"({before:.0%} at the start): stop tokens are hardly ever sampled, so stopping cannot be learnt."
    )
    change = (
        "pay for completions that stop, raise rollout.max_tokens, "
        "or take a model whose chat template and stop tokens fit it"
    )
    evidence = {"truncated": share, "truncated_at_start": before, "length_mean": mean(facts.ending, "length_mean")}
    return Finding("stop_never_learned", what, change, evidence, _cut_off(facts))


def entropy_collapse(facts: Facts) -> Finding | None:
    """The policy has become sure of its answers before they are right."""
    entropy, length = mean(facts.ending, "entropy"), mean(facts.ending, "length_mean")
    start, agreed = mean(facts.rows[:1], "entropy"), mean(facts.ending, "frac_reward_zero_std")
    sure = entropy * length < SURE or entropy < FALLEN * start
    right = mean(facts.ending, "accuracy")
    if not sure or agreed < IDLE_GROUPS or right >= LEFT:
        return None
    score = "" if np.isnan(right) else f", with {right:.0%} of the completions right"
    what = (
        f"The entropy of the last {facts.third} steps is {entropy:.2g} nats per token ({start:.2g} in the first step) "
        f"and {agreed:.0%} of the groups agree{score}: there are no other answers left to try."
    )
    change = (
        "lower optimizer.learning_rate, raise rollout.temperature or algorithm.clip_high, "
        "or add a penalty (algorithm.kl.coefficient)"
    )
    evidence = {"entropy": entropy, "entropy_at_start": start, "agreeing_groups": agreed, "length_mean": length}
    return Finding("entropy_collapse", what, change, evidence, _all(facts))


def empty_completions(facts: Facts) -> Finding | None:
    """Completions without text."""
    found = _recorded(facts)
    empty = np.array([not text.strip() for text in found.text], bool)
    share = float(empty.mean())
    if share <= EMPTY:
        return None
    reward = _mean(found.reward[empty])
    others = "" if empty.all() else f" (the others {_mean(found.reward[~empty]):.2g})"
    what = (
        f"{share:.0%} of the completions of the last {facts.third} steps are empty, "
        f"and earn a mean reward of {reward:.2g}{others}."
    )
    change = "let the reward give nothing for an empty completion, and see that the prompt ends where an answer begins"
    return Finding("empty_completions", what, change, {"empty": share, "reward_mean": reward}, found.examples(empty))


def repeated_completions(facts: Facts) -> Finding | None:
    """One text answers most prompts, and is not right."""
    found = _recorded(facts)
    [(text, count)] = Counter(found.text).most_common(1)
    which = np.array([other == text for other in found.text], bool)
    prompts = len({p for p, same in zip(found.prompt, which, strict=True) if same})
    share, right = count / len(found), _mean(found.correct[which])
    limit = SAME_UNJUDGED if np.isnan(right) else SAME
    if not text.strip() or prompts < 2 or share <= limit or right > 0.5:
        return None
    what = (
        f"{share:.0%} of the completions of the last {facts.third} steps are the same text, "
        f"given to {prompts} different prompts{'' if np.isnan(right) else f' and right for {right:.0%} of them'}."
    )
    change = "look at what the reward gives this text, and lower optimizer.learning_rate"
    evidence = {"same_text": share, "prompts": prompts, "reward_mean": _mean(found.reward[which])}
    return Finding("repeated_completions", what, change, evidence, found.examples(which))


def looping_completions(facts: Facts) -> Finding | None:
    """Completions that say the same again and again."""
    found = _recorded(facts)
    loops = np.array([_repeats(text) > LOOP for text in found.text], bool)
    share = float(loops.mean())
    if share <= LOOPING:
        return None
    what = (
        f"{share:.0%} of the completions of the last {facts.third} steps repeat themselves: "
        "most of their text stood in them before."
    )
    change = "see what the reward pays for length, lower rollout.max_tokens, or penalise repetition in the reward"
    evidence = {"looping": share, "reward_mean": _mean(found.reward[loops]), "length_mean": _mean(found.length[loops])}
    return Finding("looping_completions", what, change, evidence, found.examples(loops))


def format_without_answers(facts: Facts) -> Finding | None:
    """Completions earn something, for their form, and are wrong, to the end."""
    found = _recorded(facts)
    judged = ~np.isnan(found.correct) & ~np.isnan(found.reward)
    accuracy = [values(rows, "accuracy") for rows in (facts.beginning, facts.ending)]
    if not judged.any() or rises(*accuracy) or improves(facts.held_out()):
        return None
    least = min(found.reward[judged].min(), values(facts.rows, "reward_mean").min())
    paid = judged & (found.correct == 0) & (found.reward > least + 1e-9)
    share = float(paid[judged].mean())
    if share < PAID:
        return None
    what = (
        f"{share:.0%} of the completions of the last {facts.third} steps are wrong and earn "
        f"{_mean(found.reward[paid]):.2g} all the same, and the share that is right does not rise "
        f"({accuracy[0].mean():.0%} to {accuracy[1].mean():.0%})."
    )
    change = "pay less for form and more for right answers, or take easier problems"
    evidence = {"wrong_and_paid": share, "reward_mean": _mean(found.reward[paid]), "accuracy": accuracy[1].mean()}
    return Finding("format_without_answers", what, change, evidence, found.examples(paid))


def one_part_dominates(facts: Facts) -> Finding | None:
    """Of several rewards one decides, though groups disagree in another."""
    found = facts.early or _recorded(facts)  # by the end, what decides alone has decided
    spread = _spreads(found)
    if len(spread) < 2:
        return None
    strongest = max(spread, key=lambda name: spread[name])
    open_ = _disagreement(found)
    faint = [n for n in spread if spread[n] < FAINT * spread[strongest] and open_[n] >= UNDECIDED]
    if not faint:
        return None
    shares = {n: spread[n] / spread[strongest] for n in faint}
    listed = ", ".join(f"{name} ({share:.1%} of its spread)" for name, share in shares.items())
    what = (
        f"Of the rewards {strongest} decides alone: {listed} hardly counts beside it, "
        f"though {max(open_[n] for n in faint):.0%} of the groups disagree in it."
    )
    change = f"bring the rewards to one scale, or give {' and '.join(faint)} more weight"
    evidence = {f"spread/{name}": size for name, size in spread.items()}
    return Finding("one_part_dominates", what, change, evidence, found.examples(np.ones(len(found), bool)))


# ---- what they count


def _spreads(found: Completions) -> dict[str, float]:
    """Standard deviation that each reward gives the sum within groups, |w_k| sd(s_k); {} where it is no sum of them.

    The weights w are not recorded; they follow from reward = sum_k w_k s_k.
    """
    names = list(found.scores)
    if not names:
        return {}
    columns = np.stack([*found.scores.values(), found.reward], axis=1)
    whole = ~np.isnan(columns).any(axis=1)
    if whole.sum() <= len(names):
        return {}
    within = _centered(columns[whole], found.groups[whole])
    scores, reward = within[:, :-1], within[:, -1]
    weights = np.linalg.lstsq(scores, reward, rcond=None)[0]
    if ((reward - scores @ weights) ** 2).sum() > 0.01 * (reward**2).sum():
        return {}
    counted = np.abs(weights) > 1e-6 * np.abs(weights).max()  # one of weight 0 is only watched
    return {n: float(abs(w) * s.std()) for n, w, s, c in zip(names, weights, scores.T, counted, strict=True) if c}


def _centered(columns: np.ndarray, group: np.ndarray) -> np.ndarray:
    """(N, K) minus the mean of its group."""
    _, ids = np.unique(group, return_inverse=True)
    count = np.bincount(ids)[:, None]
    sums = np.zeros((len(count), columns.shape[1]))
    np.add.at(sums, ids, columns)
    return columns - (sums / count)[ids]


def _disagreement(found: Completions) -> dict[str, float]:
    """Of each reward the share of groups in which it is not one number."""
    ids, names = found.groups, found.scores
    groups = range(int(ids.max()) + 1)
    return {n: float(np.mean([np.ptp(np.nan_to_num(names[n][ids == g])) > 1e-9 for g in groups])) for n in names}


def _repeats(text: str) -> float:
    """Share of the pieces of ``GRAM`` characters in ``text`` that stood in it before; 0 for a short one."""
    if len(text) < SHORTEST:
        return 0.0
    pieces = [text[i : i + GRAM] for i in range(len(text) - GRAM + 1)]
    return 1 - len(set(pieces)) / len(pieces)


def _recorded(facts: Facts) -> Completions:
    assert facts.completions is not None, "the table of rules asks for them"
    return facts.completions


def _mean(found: Sequence[float] | np.ndarray) -> float:
    known = np.asarray(found, float)
    known = known[~np.isnan(known)]
    return float(known.mean()) if len(known) else float("nan")


def _all(facts: Facts) -> tuple[Example, ...]:
    found = facts.completions
    return () if found is None else found.examples(np.ones(len(found), bool))


def _cut_off(facts: Facts) -> tuple[Example, ...]:
    found = facts.completions
    return () if found is None else found.examples(found.truncated)
