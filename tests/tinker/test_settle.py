"""The SDK's thread is at rest before Python ends: the process of a run that is done used to abort now and then."""

import asyncio
import threading
import time

from textpolicy.tinker.service import settle


def test_a_loop_that_would_never_end_is_ended_with_its_tasks_and_once_is_enough():
    loop, ended = asyncio.new_event_loop(), []

    async def flush():
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.05)
            ended.append("flush")

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    pending = asyncio.run_coroutine_threadsafe(flush(), loop)
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(5)
    began = time.monotonic()
    settle(loop)
    thread.join(5)
    assert not thread.is_alive()
    assert (ended, pending.cancelled()) == (["flush"], True)
    settle(loop)
    assert time.monotonic() - began < 5
    loop.close()
