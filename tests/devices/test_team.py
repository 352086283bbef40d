"""A team of ranks, each in a thread of its own, linked by pipes: exchange, queue of work, faults."""

import os
import threading
import time
from multiprocessing import Pipe

import numpy as np
import pytest

from textpolicy.devices import team as module
from textpolicy.devices.team import ALONE, SAMPLING, Member, Team
from textpolicy.errors import RankError


@pytest.fixture(autouse=True)
def in_haste(monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.1)
    monkeypatch.setattr(module, "TICK", 0.05)


def together(work, size=2, devices=None, deadline=20.0):
    """Return what ``work(team)`` returns on each rank, or the error that it raises."""
    members = [Member(f"host{n}", os.getpid(), f"machine{n}", (devices or ["gpu"] * size)[n]) for n in range(size)]
    pairs = {n: Pipe() for n in range(1, size)}
    found = [None] * size

    def run(rank):
        links = {n: pair[0] for n, pair in pairs.items()} if rank == 0 else {0: pairs[rank][1]}
        try:
            with Team(rank, members, links, deadline, voice=os.open(os.devnull, os.O_WRONLY)) as team:
                found[rank] = work(team)
        except Exception as error:  # noqa: BLE001 - which it may be is the test
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return found


@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_rank_gets_the_values_of_all_in_order(size):
    def work(team):
        return [team.exchange(np.full(3, team.rank))[-1].tolist(), team.first("a" if team.rank == 0 else "b")]

    assert together(work, size) == [[[size - 1] * 3, "a"]] * size


def test_alone_a_value_comes_back_and_nothing_is_measured():
    assert (ALONE.exchange(3), ALONE.first(4), ALONE.figures(1), ALONE.share([1.0, 2.0])) == ([3], 4, {}, [[0, 1]])


def slowly(seconds):
    def work(team):
        def square(places):
            time.sleep(seconds[team.rank] * len(places))
            return [place**2 for place in places], 10.0 * len(places)

        asked = []

        def counted(places):
            asked.extend(places)
            return square(places)

        results = [team.share_out([1.0] * 24, counted) for _ in range(3)]
        return results, len(asked)

    return work


def test_equal_devices_get_equal_shares_however_fast_they_are():
    (first, most), (second, least) = together(slowly([0.0, 0.002]))
    assert first == second == [[n**2 for n in range(24)]] * 3
    assert most == least == 36


def test_of_unequal_devices_the_faster_gets_more_and_the_results_are_the_same():
    (first, fast), (second, slow) = together(slowly([0.001, 0.01]), devices=["large", "small"])
    assert first == second == [[n**2 for n in range(24)]] * 3
    assert fast + slow == 72
    assert fast > 2 * slow


def test_a_queue_gives_each_piece_to_one_rank():
    def work(team):
        return team.share_out([float(n + 1) for n in range(31)], lambda places: ([team.rank] * len(places), 1.0))

    found = together(work, 3, devices=["a", "b", "b"])
    assert found[0] == found[1] == found[2]
    assert set(found[0]) == {0, 1, 2}


def test_an_error_ends_the_others_with_a_sentence_that_says_where_and_why():
    def work(team):
        team.remedy = "resume it"
        with team.doing(SAMPLING):
            if team.rank == 1:
                raise ValueError("no such word")
            team.exchange(1)

    first, second, third = together(work, 3)
    assert str(first) == "rank 1 on host1 failed while sampling (no such word); resume it"
    assert (str(second), type(third), str(third)) == ("no such word", RankError, "")  # rank 0 says it


def test_a_rank_that_does_not_come_ends_the_others_after_the_deadline():
    def work(team):
        with team.doing("scoring"):
            if team.rank:
                time.sleep(2.5)
            team.exchange(0)

    first, second = together(work, deadline=0.8)
    assert "rank 1 on host1 has been scoring for longer than the others can wait (0.8 s)" in str(first)
    assert isinstance(second, RankError)


def test_a_rank_that_ends_early_is_no_riddle():
    first, second = together(lambda team: None if team.rank else team.exchange(0))
    assert "rank 1 on host1 has ended before the others" in str(first)
    assert second is None


def test_a_rank_whose_link_breaks_has_died():
    def work(team):
        with team.doing(SAMPLING):
            if team.rank:
                time.sleep(0.3)
                team._closed.set()  # so that this thread does not take part in what follows
                team.links[0].close()
                return "dead"
            return team.exchange(0)

    first, second = together(work)
    assert str(first) == "rank 1 on host1 died while sampling; start it again"
    assert second == "dead"


def test_after_parting_nobody_minds_who_goes():
    def work(team):
        team.part()
        if team.rank == 0:
            time.sleep(0.4)
        return "whole"

    assert together(work, 3) == ["whole"] * 3


def test_figures_tell_who_worked_and_who_waited():
    def work(team):
        with team.doing(SAMPLING):
            team.share_out([1.0, 1.0], lambda places: (time.sleep(0.3 * team.rank), ([0], 30.0))[1])
        return team.figures(7)

    first, second = together(work)
    assert first == second
    assert first["rank_0_waited_sampling"] > 0.2 > first["rank_1_waited_sampling"]
    assert first["rank_1_tokens_per_second"] == pytest.approx(100, rel=0.2)
    assert 0.4 < first["scaling"] < 0.8


def test_weights_that_part_ways_end_the_run():
    first, second = together(lambda team: team.figures(team.rank))
    assert "rank 1 on host1 has not the weights of rank 0 any more" in str(first)
    assert isinstance(second, RankError)
