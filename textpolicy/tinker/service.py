"""The connection to a Tinker server: its key, waiting for answers, and its errors as one sentence each."""

from __future__ import annotations

import asyncio
import atexit
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

from .._system.extras import extra
from .._system.random_state import untouched
from ..errors import ServiceError, TextPolicyError, UserError, unknown_name

LOCAL = ("127.0.0.1", "localhost", "::1")
_LOCAL_KEY = "tml-local"  # servers on this machine check only its form
_CHECK = 5.0  # seconds between checks that a silent server is still alive
_REMEDIES = {
    "TinkerError": "set TINKER_API_KEY to your key, which begins with tml-",  # the base class is raised without one
    "AuthenticationError": "check TINKER_API_KEY",
    "PermissionDeniedError": "check the permissions of the key",
    "BillingError": "check the balance of the account",
    "NotFoundError": "the server no longer has it; connect again, and resume from the last checkpoint",
    "RateLimitError": "send less at once, or try again later",
    "InternalServerError": "check the server's log, and resume from the last checkpoint",
    "APIConnectionError": "check the network and the address of the server, and resume from the last checkpoint",
    "APITimeoutError": "check the network and the address of the server, and resume from the last checkpoint",
}
_RESUME = "resume from the last checkpoint once that is fixed"


def sdk() -> Any:
    """Return the Tinker SDK. Raises MissingDependencyError."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # its tokenizers warn that PyTorch is missing
    return extra("tinker", "textpolicy[tinker]")


class Service:
    """The session with the server at ``base_url``; None means TINKER_BASE_URL, or else the hosted service.

    A call waits as long as the server is alive; one whose address is known and that has not answered for
    ``patience`` seconds counts as gone. The key is TINKER_API_KEY, or what the SDK finds by itself.
    """

    def __init__(self, base_url: str | None = None, *, patience: float = 120.0):
        """Raise UserError for a malformed key, ServiceError if no server answers."""
        self.url = (base_url or os.environ.get("TINKER_BASE_URL") or "").rstrip("/") or None
        self.patience = patience
        self._key = os.environ.get("TINKER_API_KEY") or None  # None leaves it to the SDK, which knows other places
        if self._key is not None and not self._key.startswith("tml-") and self._key.count(".") != 2:
            raise UserError("TINKER_API_KEY is not a Tinker key (they start with tml-); set it to yours")
        if self._key is None and self.url is not None:
            try:
                self._key = _LOCAL_KEY if urlsplit(self.url).hostname in LOCAL else None
            except ValueError:  # not an address; the next error says so
                self._key = None
        if self.url is not None and not answers(self.url) and not answers(self.url, seconds=min(30.0, patience)):
            raise ServiceError(
                f"no Tinker server answers at {self.url}; start one with 'textpolicy serve' (formerly "
                "tinker-server), or correct the address"
            )
        with self.telling("connecting to the Tinker server"):
            self.client = sdk().ServiceClient(base_url=self.url, api_key=self._key)
            self._rest = sdk().RestClient(base_url=self.url, api_key=self._key)
            atexit.register(settle, self._rest.holder.get_loop())

    def call(self, doing: str, method: Callable[..., Any], *args: Any, **settings: Any) -> Any:
        """Call a ``method`` of the SDK and wait for its result; ``doing`` names it in an error. Raises ServiceError."""
        with self.telling(doing):
            pending = method(*args, **settings)
        return self.wait(pending, doing)

    def wait(self, pending: Any, doing: str) -> Any:
        """Return the result of ``pending``, a future of the SDK. Raises ServiceError."""
        future, gone_since = pending.future(), None
        while True:
            with self.telling(doing), untouched():
                try:
                    return future.result(timeout=_CHECK if self.patience >= _CHECK else self.patience)
                except TimeoutError:
                    if future.done():  # the server's own time-out
                        raise
            gone_since = None if self.url is None or answers(self.url) else gone_since or time.monotonic()
            if gone_since is not None and time.monotonic() - gone_since >= self.patience:
                raise ServiceError(
                    f"{doing} failed: the Tinker server at {self.url} has not answered for {self.patience:g} s; "
                    "restart it, and resume from the last checkpoint"
                )

    @contextmanager
    def telling(self, doing: str) -> Iterator[None]:
        """Turn what the SDK raises inside into a ServiceError of one sentence, without the key."""
        try:
            yield
        except TextPolicyError:
            raise
        except (sdk().TinkerError, ValueError, RuntimeError, TimeoutError) as error:
            # ValueError: the server answered 400 to a request for a result; RuntimeError: the client is poisoned
            text, remedy = str(error), _REMEDIES.get(type(error).__name__, _RESUME)
            shown = (text.strip() or type(error).__name__).splitlines()[0]
            if self._key is not None and self._key in text:
                raise ServiceError(f"{doing} failed ({shown.replace(self._key, 'the key')}); {remedy}") from None
            raise ServiceError(f"{doing} failed ({shown}); {remedy}") from error

    def refuse_unknown_model(self, model: str) -> None:
        """Raise UserError for a model that the server does not list."""
        known = [m.model_name for m in self.capabilities().supported_models or () if m.model_name]
        if known and model not in known:
            raise unknown_name("model on this Tinker server", model, known)

    def capabilities(self) -> Any:
        """Return the server's own description. Raises ServiceError."""
        doing = "asking the Tinker server for its capabilities"
        with self.telling(doing):
            return self.wait(self._rest.get_server_capabilities(), doing)

    def close(self, status: str = "success") -> None:
        """End the session, "success", "errored" or "interrupted"; a server that has gone is not an error."""
        closing = self.client.close(status)
        try:
            if self.url is None or answers(self.url, seconds=min(30.0, self.patience)):
                self.wait(closing, "closing the session")
            else:
                wait([closing.future()], timeout=1.0)  # it has begun, and its cancellation ends the heartbeats
        except ServiceError:
            pass
        finally:
            closing.future().cancel()


def settle(loop: asyncio.AbstractEventLoop, seconds: float = 5.0) -> None:
    """End what the SDK still does on its ``loop``, in a thread that is not waited for, before Python ends.

    Its transport is written in Rust: a thread of it that Python ends by force takes the process down with SIGABRT.
    """

    async def stop() -> None:
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        loop.stop()

    if loop.is_running():
        asyncio.run_coroutine_threadsafe(stop(), loop)
    end = time.monotonic() + seconds
    while loop.is_running() and time.monotonic() < end:
        time.sleep(0.01)


def answers(url: str, seconds: float = 5.0) -> bool:
    """Return whether the server at ``url`` reports within so many ``seconds`` that it is healthy."""
    try:
        with urlopen(f"{url}/api/v1/healthz", timeout=seconds) as reply:
            return bool(reply.status == 200)
    except HTTPError as error:
        return error.code < 500  # it is alive, and has no such page
    except (OSError, HTTPException, ValueError):  # no server, something other than a web server, not an address
        return False
