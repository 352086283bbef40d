"""The server of ``textpolicy serve``: who may reach it, its routes, and how it ends."""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import ServiceError, TextPolicyError, UserError
from .api import Api
from .openai import OpenAI
from .service import RefusedError, Service

LOOPBACK = ("127.0.0.1", "localhost")


class Gate:
    """The check of every request's key and origin, before anything of it is read."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self.app, self.key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request that may be served."""
        if scope["type"] == "http":
            headers = {name.lower(): value for name, value in scope["headers"]}
            refusal = self._refusal(headers)
            if refusal is not None:
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _refusal(self, headers: dict[bytes, bytes]) -> JSONResponse | None:
        """Return the answer to a request of a stranger; None for one that may be served."""
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and urlsplit(origin).hostname not in LOOPBACK:  # a page in a browser, whose server is elsewhere
            return answer(f"a page of {origin!r:.80} may not use this server", 403)
        if self.key is None:
            return None
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        given = headers.get(b"x-api-key") or (bearer.strip() if scheme.lower() == b"bearer" else b"")
        if hmac.compare_digest(given, self.key.encode()):
            return None
        return answer("the API key is missing or wrong; send the server's key as X-API-Key or as a Bearer token", 401)


def make_app(service: Service, key: str | None = None, hosts: tuple[str, ...] = LOOPBACK) -> Starlette:
    """Return the application that serves ``service`` to those who know the ``key``, under the names in ``hosts``."""
    return Starlette(
        routes=[*Api(service).routes(), *OpenAI(service).routes()],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts)), Middleware(Gate, key=key)],
        exception_handlers={TextPolicyError: refused, OSError: refused},
    )


async def refused(request: Request, error: Exception) -> JSONResponse:
    """Answer with the sentence of an error."""
    if isinstance(error, RefusedError):
        return answer(str(error), error.status)
    if isinstance(error, UserError):
        return answer(str(error), 400)
    if isinstance(error, OSError):
        return answer(
            f"the server could not write or read a file ({error.strerror}); free some space and ask again", 507
        )
    return answer(str(error), 507 if isinstance(error, ServiceError) else 500)


def answer(sentence: str, status: int) -> JSONResponse:
    """Return the answer to a request that is not served, as both APIs word it."""
    error = {"message": sentence, "type": "invalid_request_error" if status < 500 else "server_error", "code": status}
    return JSONResponse({"error": error, "detail": sentence}, status)
