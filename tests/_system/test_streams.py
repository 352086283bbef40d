"""The random streams that everybody shares: saved, put back, and out of the reach of other threads."""

import random
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest

from textpolicy._system.random_state import restore_streams, seed_streams, streams, untouched


def draws():
    return [random.random(), random.gauss(0, 1), float(np.random.random()), float(np.random.standard_normal())]


@pytest.fixture(autouse=True)
def as_they_were():
    before = streams()
    yield
    restore_streams(before)


def test_streams_go_on_where_they_were_saved():
    seed_streams(5)
    draws()
    state = streams()
    first = draws()
    restore_streams(state)
    assert draws() == first
    seed_streams(5)
    assert draws() != first


def elsewhere(call):
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def test_what_other_threads_draw_leaves_no_trace():
    seed_streams(5)
    alone = [draws(), draws()]
    seed_streams(5)
    first = draws()
    with untouched():
        elsewhere(draws)
    assert [first, draws()] == alone


def test_a_thread_puts_nothing_back():
    seed_streams(5)

    def call():
        with untouched():
            draws()

    elsewhere(call)
    after = draws()
    seed_streams(5)
    assert draws() != after


def test_a_wait_for_the_server_hides_what_the_sdk_draws():
    pytest.importorskip("tinker", reason="no Tinker SDK here: pip install 'textpolicy[tinker]'")
    from textpolicy.tinker.service import Service

    class Retrying(Future):
        def result(self, timeout=None):
            elsewhere(draws)  # what spaces a retry
            return "answer"

    service = object.__new__(Service)  # without a server
    service.url, service.patience, service._key = None, 1.0, None
    before = streams()
    assert service.wait(SimpleNamespace(future=Retrying), "sampling") == "answer"
    assert streams() == before
