"""The local page: routes, what may reach them, and how `textpolicy view` serves them.

Pages are HTML made by Jinja2, which escapes whatever a model wrote, with links and forms and no script at all;
the Content-Security-Policy lets a browser run none, load nothing from elsewhere and send nothing away.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import Field, ValidationError
from pydantic_settings import CliPositionalArg

from ..._system.extras import extra
from ...config.settings import Section, explain
from ...errors import UserError
from .drawing import COLOURINGS, Colouring, draw, draw_together
from .index import Address, Query
from .runs import ViewedRun, prompts_of

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

INSTALL = "textpolicy"
_HERE = Path(__file__).parent
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_INLINE_STYLES = {
    **_HEADERS,
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'",
}


class ViewArguments(Section):
    """Browse the completions of a run, or compare two, on a page that only this machine can open."""

    run: CliPositionalArg[Path]
    """Folder of the run; it may still be going on."""
    other: CliPositionalArg[Path | None] = None
    """Folder of a second one, to compare with."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port on 127.0.0.1; a free one if 0."""


def view(arguments: ViewArguments) -> None:
    """Serve until Ctrl-C; prints the address, which has a token that no other page knows."""
    uvicorn = extra("uvicorn", INSTALL)
    folders = [arguments.run] if arguments.other is None else [arguments.run, arguments.other]
    token = secrets.token_urlsafe(18)
    app = make_app(folders, token)
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", arguments.port))
            listening.listen()  # before the address is told: whoever has it may ask at once
        except OSError as error:
            raise UserError(f"port {arguments.port} cannot be used ({error.strerror}); choose another") from error
        print(f"http://127.0.0.1:{listening.getsockname()[1]}/{token}/  (Ctrl-C ends it)", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


def make_app(folders: Sequence[Path], token: str) -> Starlette:
    """The pages of one run or two, under /``token``/ alone. Raises UserError for a folder that is no run's."""
    applications, routing = extra("starlette.applications", INSTALL), extra("starlette.routing", INSTALL)
    hosts = extra("starlette.middleware.trustedhost", INSTALL).TrustedHostMiddleware
    middleware = extra("starlette.middleware", INSTALL).Middleware
    pages = Pages([ViewedRun.open(i, folder) for i, folder in enumerate(folders)], token)
    routes = [
        routing.Route("/", pages.completions, name="completions"),
        routing.Route("/completion", pages.completion, name="completion"),
        routing.Route("/pair", pages.pair, name="pair"),
        routing.Route("/prompts", pages.prompts, name="prompts"),
        routing.Route("/prompt", pages.prompt, name="prompt"),
        routing.Route("/report", pages.report, name="report"),
        routing.Route("/style.css", pages.style, name="style"),
    ]
    return applications.Starlette(
        routes=[routing.Mount(f"/{token}", routes=routes)],
        middleware=[middleware(hosts, allowed_hosts=["127.0.0.1", "localhost"])],
        exception_handlers={UserError: pages.refused},
    )


@dataclass(frozen=True)
class Pages:
    """One method per page."""

    runs: Sequence[ViewedRun]
    token: str

    def completions(self, request: Request) -> Response:
        """The list, filtered, below the curves of the run."""
        run, query = self._run(request), _query(request)
        shown: dict[str, Any] = {"run": run, "query": query, "page": run.page(query), "curves": run.curves()}
        return self._page("completions.html", request, refresh="live" in request.query_params, **shown)

    def completion(self, request: Request) -> Response:
        """One, token by token, with the others of its group."""
        run, address, row = self._found(request, "at")
        by = _colouring(request)
        siblings = run.siblings(address, row)
        one: dict[str, Any] = {"run": run, "address": address, "row": row, "drawing": draw(row, by)}
        return self._page("completion.html", request, **one, by=by, siblings=siblings)

    def pair(self, request: Request) -> Response:
        """Two side by side, of one group or of two runs."""
        by, found = _colouring(request), [self._found(request, name) for name in ("a", "b")]
        drawings = draw_together([row for _, _, row in found], by)
        sides = [
            {"run": run, "address": address, "row": row, "drawing": drawing}
            for (run, address, row), drawing in zip(found, drawings, strict=True)
        ]
        return self._page("pair.html", request, sides=sides, by=by)

    def prompts(self, request: Request) -> Response:
        """What became of each prompt: in two runs, or in the two halves of one."""
        return self._page("prompts.html", request, rows=prompts_of(self.runs)[:500])

    def prompt(self, request: Request) -> Response:
        """One prompt's latest completion in each run, side by side; of one run, all its completions."""
        from starlette.responses import RedirectResponse

        index = _whole(request, "index")
        found = [line for run in self.runs if (line := run.latest(index)) is not None]
        if len(found) < 2:
            return RedirectResponse(f"./?prompt={index}", headers=_HEADERS)
        return RedirectResponse(f"./pair?a={found[0].address}&b={found[1].address}", headers=_HEADERS)

    def report(self, request: Request) -> Response:
        """The HTML report as it would be written now."""
        from starlette.responses import HTMLResponse

        from ..page import report_html

        return HTMLResponse(report_html([run.folder for run in self.runs]), headers=_INLINE_STYLES)

    def style(self, request: Request) -> Response:
        from starlette.responses import FileResponse

        return FileResponse(_HERE / "style.css", headers={**_HEADERS, "Cache-Control": "max-age=3600"})

    def refused(self, request: Request, error: Exception) -> Response:
        """A request that cannot work, in one sentence."""
        return self._page("refused.html", request, status=400, sentence=str(error))

    def _run(self, request: Request) -> ViewedRun:
        number = _whole(request, "run") if "run" in request.query_params else 0
        return self._numbered(number)

    def _numbered(self, number: int) -> ViewedRun:
        if number >= len(self.runs):
            raise UserError(f"there is no run {number} on this page; choose one below {len(self.runs)}")
        return self.runs[number]

    def _found(self, request: Request, name: str) -> tuple[ViewedRun, Address, dict[str, Any]]:
        address = Address.read(request.query_params.get(name, ""))
        run = self._numbered(address.run)
        return run, address, run.completion(address)

    def _page(self, template: str, request: Request, status: int = 200, **values: Any) -> Response:
        from starlette.responses import HTMLResponse

        shared = {"runs": self.runs, "colourings": COLOURINGS, "link": _Links(request)}
        return HTMLResponse(_environment().get_template(template).render(**shared, **values), status, _HEADERS)


class _Links:
    """Links to this page with some of what it asks for changed."""

    def __init__(self, request: Request) -> None:
        self._asked = dict(request.query_params)

    def __call__(self, path: str = "", **changed: Any) -> str:
        """``path`` with what this page asks for, but ``changed``; None leaves a name out."""
        from urllib.parse import urlencode

        asked = {**self._asked, **{name: str(value) for name, value in changed.items() if value is not None}}
        return f"{path}?{urlencode({n: v for n, v in asked.items() if v and changed.get(n, v) is not None})}"


def _environment() -> Any:
    """Jinja2's, which escapes every value."""
    jinja2 = extra("jinja2", INSTALL)
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )


def _query(request: Request) -> Query:
    asked = {
        name: value for name, value in request.query_params.items() if value.strip() and name not in ("run", "live")
    }
    try:
        return Query.model_validate(asked)
    except ValidationError as error:
        raise UserError("; ".join(explain(error, Query))) from error


def _colouring(request: Request) -> Colouring:
    asked = request.query_params.get("by", "credit")
    if asked not in get_args(Colouring):
        raise UserError(f"completions are not coloured by {asked!r}; choose one of {', '.join(COLOURINGS)}")
    return asked  # type: ignore[return-value]  # one of them


def _whole(request: Request, name: str) -> int:
    text = request.query_params.get(name, "")
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r}; give a whole number")
    return int(text)
