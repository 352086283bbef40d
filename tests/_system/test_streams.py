"""The global random streams of Python and NumPy: saved, restored, and protected from other threads."""

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


def test_restored_streams_continue_from_the_saved_state():
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


def test_draws_of_other_threads_have_no_effect():
    seed_streams(5)
    alone = [draws(), draws()]
    seed_streams(5)
    first = draws()
    with untouched():
        elsewhere(draws)
    assert [first, draws()] == alone


def test_outside_the_main_thread_nothing_is_restored():
    seed_streams(5)

    def call():
        with untouched():
            draws()

    elsewhere(call)
    after = draws()
    seed_streams(5)
    assert draws() != after


def test_draws_of_the_sdk_have_no_effect_on_the_streams():
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
