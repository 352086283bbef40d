"""The rule about ranks that wait for each other."""

from __future__ import annotations

from .facts import Facts
from .finding import Finding

HELD_UP = 0.25  # of the time, evaluation included: without it two ranks would be a seventh faster


def held_up(facts: Facts) -> Finding | None:
    """Find a rank that the others wait for, where a run has several."""
    rows = [row for row in facts.rows if "scaling" in row]
    seconds = sum(row.get("wall_seconds", 0.0) for row in rows)
    ranks = sum(name.endswith("_tokens_per_second") and name.startswith("rank_") for name in (rows or [{}])[0])
    if not seconds or ranks < 2:
        return None
    waited = {
        rank: {
            name: sum(row.get(f"rank_{rank}_waited_{name}", 0.0) for row in rows) for name in ("sampling", "updating")
        }
        for rank in range(ranks)
    }
    total = {rank: sum(parts.values()) for rank, parts in waited.items()}
    slow, held = min(total, key=total.__getitem__), max(total, key=total.__getitem__)
    share = total[held] / seconds
    if not share > HELD_UP:
        return None
    phase = max(waited[held], key=waited[held].__getitem__)
    what = (
        f"Rank {held} waits {share:.0%} of the time, most of it while others are {phase}, and rank {slow} "
        f"for {total[slow] / seconds:.0%}: rank {slow} holds the others up."
    )
    change = (
        "make rollout.prompts_per_step a multiple of the ranks, end what else runs on that machine, or leave it out "
        "(docs/16_devices.md)"
    )
    speeds = {f"rank_{r}_tokens_per_second": rows[-1][f"rank_{r}_tokens_per_second"] for r in (slow, held)}
    return Finding("held_up", what, change, {"waited": share, "scaling": rows[-1]["scaling"], **speeds})
