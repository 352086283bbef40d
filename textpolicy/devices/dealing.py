"""Give each rank a share of the work, so that they end together."""

from __future__ import annotations

from collections.abc import Sequence


def deal(costs: Sequence[float], speeds: Sequence[float]) -> list[list[int]]:
    """Return the places of ``costs`` that each rank of ``speeds`` gets, in order.

    The costliest are dealt first, each to the rank that would end first with it (LPT: Graham, 1969, whose last rank
    ends at most a third later than need be, where speeds are equal).
    """
    ends, dealt = [0.0] * len(speeds), [list[int]() for _ in speeds]
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        rank = min(range(len(speeds)), key=lambda r: ends[r] + costs[place] / speeds[r])
        ends[rank] += costs[place] / speeds[rank]
        dealt[rank].append(place)
    return [sorted(places) for places in dealt]
