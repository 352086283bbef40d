"""A connection to a Tinker server: the key, waiting for answers, and its errors as one sentence each."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
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
_LOCAL_KEY = "tml-local"  # servers on this machine look at its form alone
_LOOK = 5.0  # seconds between looks at whether a silent server still lives
_REMEDIES = {
    "TinkerError": "set TINKER_API_KEY to your key, which begins with tml-",  # the base class is raised without one
    "AuthenticationError": "check TINKER_API_KEY",
    "PermissionDeniedError": "check what the key may do",
    "BillingError": "check the balance of the account",
    "NotFoundError": "the server no longer has it; connect again, and resume from the last checkpoint",
    "RateLimitError": "ask for less at once, or try again later",
    "InternalServerError": "look at the server's log, and resume from the last checkpoint",
    "APIConnectionError": "check the network and the address of the server, and resume from the last checkpoint",
    "APITimeoutError": "check the network and the address of the server, and resume from the last checkpoint",
}
_RESUME = "resume from the last checkpoint once that is mended"


def sdk() -> Any:
    """The Tinker SDK. Raises MissingDependencyError."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # its tokenizers need no PyTorch, and it says so
    return extra("tinker", "textpolicy[tinker]")


class Service:
    """One session with the server at ``base_url``; None takes TINKER_BASE_URL, or else the hosted service.

    A call waits as long as the server lives; one whose address is known and that has not answered for
    ``patience`` seconds counts as gone. The key is TINKER_API_KEY's, or what the SDK finds by itself.
    """

    def __init__(self, base_url: str | None = None, *, patience: float = 120.0):
        """Raises UserError for a key that cannot be one, ServiceError where no server answers."""
        self.url = (base_url or os.environ.get("TINKER_BASE_URL") or "").rstrip("/") or None
        self.patience = patience
        self._key = _key(self.url)
        if self.url is not None and not answers(self.url) and not answers(self.url, seconds=min(30.0, patience)):
            raise ServiceError(
                f"no Tinker server answers at {self.url}; start one with 'textpolicy tinker-server', or mend the "
                "address"
            )
        with self.telling("connecting to the Tinker server"):
            self.client = sdk().ServiceClient(base_url=self.url, api_key=self._key)

    def wait(self, pending: Any, doing: str) -> Any:
        """The result of ``pending``, a future of the SDK; ``doing`` names it in an error. Raises ServiceError."""
        future, gone_since = pending.future(), None
        while True:
            with self.telling(doing), untouched():
                try:
                    return future.result(timeout=_LOOK if self.patience >= _LOOK else self.patience)
                except TimeoutError:
                    if future.done():  # it is the server's own
                        raise
            gone_since = None if self.url is None or answers(self.url) else gone_since or time.monotonic()
            if gone_since is not None and time.monotonic() - gone_since >= self.patience:
                raise ServiceError(
                    f"{doing} came to nothing: the Tinker server at {self.url} has not answered for "
                    f"{self.patience:g} s; start it again, and resume from the last checkpoint"
                )

    @contextmanager
    def telling(self, doing: str) -> Iterator[None]:
        """What the SDK raises inside, as a ServiceError of one sentence without the key."""
        try:
            yield
        except TextPolicyError:
            raise
        except (sdk().TinkerError, ValueError, RuntimeError, TimeoutError) as error:
            # ValueError: the server answered 400 to a question for a result; RuntimeError: the client is poisoned
            remedy = _REMEDIES.get(type(error).__name__, _RESUME)
            raise ServiceError(f"{doing} failed ({self._shown(error)}); {remedy}") from self._cause(error)

    def refuse_unknown_model(self, model: str) -> None:
        """A UserError for a model that the server does not list."""
        known = [m.model_name for m in self.capabilities().supported_models or () if m.model_name]
        if known and model not in known:
            raise unknown_name("model on this Tinker server", model, known)

    def capabilities(self) -> Any:
        """What the server says of itself. Raises ServiceError."""
        with self.telling("asking the Tinker server what it offers"):
            return self.wait(self._rest().get_server_capabilities(), "asking the Tinker server what it offers")

    def close(self, status: str = "success") -> None:
        """End the session, "success", "errored" or "interrupted"; a server that has gone is not an error."""
        try:
            self.wait(self.client.close(status), "closing the session")
        except ServiceError:
            return

    def _rest(self) -> Any:
        return sdk().RestClient(base_url=self.url, api_key=self._key)

    def _shown(self, error: Exception) -> str:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        return said if self._key is None else said.replace(self._key, "the key")

    def _cause(self, error: Exception) -> Exception | None:
        return None if self._key is not None and self._key in str(error) else error


def answers(url: str, seconds: float = 5.0) -> bool:
    """Whether the server at ``url`` says within so many ``seconds`` that it is well."""
    try:
        with urlopen(f"{url}/api/v1/healthz", timeout=seconds) as reply:
            return bool(reply.status == 200)
    except HTTPError as error:
        return error.code < 500  # it lives, and knows no such page
    except (OSError, HTTPException, ValueError):  # nobody there, something else than a web server, no address
        return False


def _key(url: str | None) -> str | None:
    """The key to send; None leaves it to the SDK, which knows of commands and files that hold one."""
    key = os.environ.get("TINKER_API_KEY")
    if key:
        if not key.startswith("tml-") and key.count(".") != 2:
            raise UserError("TINKER_API_KEY holds no key of Tinker, which begins with tml-; set it to yours")
        return key
    return _LOCAL_KEY if url is not None and _host(url) in LOCAL else None


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:  # no address; that no server answers there is said next
        return None
