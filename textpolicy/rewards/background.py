"""Run reward calls off the calling thread: on a shared event loop or in threads, under a time limit."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from ..errors import UserError
from .workers import TooSlowError

T = TypeVar("T")


def wait_for(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run ``coroutine`` on the event loop of this package and wait; an interrupt cancels it.

    The loop has a thread of its own, so this works in notebooks, whose loop already runs, and clients
    that are bound to a loop can be used again. Raises UserError when called from that thread.
    """
    loop, thread = _loop(os.getpid())
    if threading.current_thread() is thread:
        coroutine.close()
        raise UserError("a Scorer was called inside an async reward; await that reward's own work instead")
    future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


@functools.cache
def _loop(pid: int) -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
    """Return the event loop of the process ``pid`` and its thread: a fork does not have its parent's threads."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="textpolicy-rewards", daemon=True)
    thread.start()
    return loop, thread


async def in_time(awaitable: Awaitable[T], limit: float | None) -> T:
    """Return what ``awaitable`` gives. Raises TooSlowError after ``limit`` seconds, even if it ignores cancellation."""

    async def guarded() -> T:
        try:
            return await awaitable
        except (SystemExit, KeyboardInterrupt) as error:  # must not end the event loop
            raise RuntimeError(f"it raised {type(error).__name__}") from error

    task = asyncio.ensure_future(guarded())
    try:
        done, _ = await asyncio.wait({task}, timeout=limit)
    except asyncio.CancelledError:
        task.cancel()
        raise
    if not done:
        task.cancel()
        raise TooSlowError
    if task.cancelled():
        raise RuntimeError("it cancelled itself")
    return task.result()


async def in_thread(call: Callable[[], T]) -> T:
    """Return what ``call`` returns in a daemon thread: it cannot be stopped, so the program does not wait for it."""
    future: concurrent.futures.Future[tuple[T | None, BaseException | None]] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()  # from here on it takes a result, whether or not it is awaited

    def run() -> None:
        outcome: tuple[T | None, BaseException | None]
        try:
            outcome = call(), None
        except BaseException as error:  # noqa: BLE001 (raised again where it is awaited)
            outcome = None, error  # as a value: a future refuses StopIteration
        future.set_result(outcome)

    threading.Thread(target=run, daemon=True).start()
    result, error = await asyncio.wrap_future(future)
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
