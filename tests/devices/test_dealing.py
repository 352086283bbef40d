"""Work dealt to ranks: everything once, the ends close together, the same on every rank."""

import itertools

import numpy as np
import pytest

from textpolicy.devices.dealing import deal


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(4))
def test_every_place_is_dealt_once_and_ranks_end_within_the_largest_piece(ranks, seed):
    draw = np.random.default_rng(seed)
    costs, speeds = draw.uniform(1, 100, 40).tolist(), draw.uniform(0.5, 2, ranks).tolist()
    dealt = deal(costs, speeds)
    assert sorted(itertools.chain.from_iterable(dealt)) == list(range(40))
    assert all(places == sorted(places) for places in dealt)
    ends = [sum(costs[place] for place in places) / speed for places, speed in zip(dealt, speeds, strict=True)]
    assert max(ends) - min(ends) <= max(costs) / min(speeds)
    assert deal(costs, speeds) == dealt


def test_equal_work_on_equal_ranks_is_dealt_evenly():
    assert deal([5.0] * 6, [1.0, 1.0]) == [[0, 2, 4], [1, 3, 5]]


def test_a_rank_of_twice_the_speed_gets_twice_the_work():
    slow, fast = deal([1.0] * 30, [1.0, 2.0])
    assert (len(slow), len(fast)) == (10, 20)


def test_fewer_pieces_than_ranks_leave_ranks_without_work():
    assert sorted(map(len, deal([3.0, 2.0], [1.0] * 4))) == [0, 0, 1, 1]
    assert deal([], [1.0, 1.0]) == [[], []]
