"""Reward calls off the calling thread: an event loop that async functions share, threads, a time limit."""

from __future__ import annotations

import asyncio
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
    """One for each process id: a fork does not have its parent's threads."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="textpolicy-rewards", daemon=True)
    thread.start()
    return loop, thread


async def in_time(awaitable: Awaitable[T], limit: float | None) -> T:
    """What ``awaitable`` gives. Raises TooSlowError after ``limit`` seconds, even if it refuses to be cancelled."""
    task = asyncio.ensure_future(_guarded(awaitable))
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


async def _guarded(awaitable: Awaitable[T]) -> T:
    """``awaitable``, whose exit() must not end the event loop."""
    try:
        return await awaitable
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(f"it raised {type(error).__name__}") from error


async def in_thread(call: Callable[[], T]) -> T:
    """What ``call`` returns in a thread of its own. Nothing can stop it, so the program does not wait for it."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[tuple[T | None, BaseException | None]] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if not answer.done():
            answer.set_result((result, error))

    def run() -> None:
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001 (raised again where it is awaited)
            loop.call_soon_threadsafe(settle, None, error)
        else:
            loop.call_soon_threadsafe(settle, result, None)

    threading.Thread(target=run, daemon=True).start()
    result, error = await answer
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
