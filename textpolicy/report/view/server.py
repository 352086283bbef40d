"""The local page: its routes, who may reach them, and the server of `textpolicy view`.

Jinja2 makes the pages as HTML and escapes whatever a model wrote. They have links and forms and no script at all;
the Content-Security-Policy lets a browser run none, load nothing from elsewhere and send nothing away.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args
from urllib.parse import urlencode

from pydantic import Field, ValidationError

from ..._system.extras import extra
from ...config.settings import LocalPath, Positional, Section, explain
from ...errors import UserError
from ...record.prompts import compare, halves
from ...record.reader import load_run
from .curves import curves
from .drawing import COLOURINGS, Colouring, draw
from .index import Address, Query
from .runs import ViewedRun

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

    run: Annotated[LocalPath, Positional]
    """Folder of the run, which may still be running."""
    other: Annotated[LocalPath | None, Positional] = None
    """Folder of a second run to compare with."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port on 127.0.0.1; a free one if 0."""


def view(args: ViewArguments) -> None:
    """Serve until Ctrl-C, and print the address, which contains a secret token. Raises UserError."""
    uvicorn = extra("uvicorn", INSTALL)
    folders = [args.run] if args.other is None else [args.run, args.other]
    token = secrets.token_urlsafe(18)
    app = make_app(folders, token)
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", args.port))
            listening.listen()  # before the address is printed, for whoever reads it may connect at once
        except OSError as error:
            raise UserError(f"port {args.port} cannot be used ({error.strerror}); choose another") from error
        print(f"http://127.0.0.1:{listening.getsockname()[1]}/{token}/  (Ctrl-C ends it)", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


def make_app(folders: Sequence[Path], token: str) -> Starlette:
    """Serve the pages of one run or two, only under /``token``/. Raises UserError for a folder that is not a run."""
    applications, routing = extra("starlette.applications", INSTALL), extra("starlette.routing", INSTALL)
    hosts = extra("starlette.middleware.trustedhost", INSTALL).TrustedHostMiddleware
    middleware = extra("starlette.middleware", INSTALL).Middleware
    pages = Pages([ViewedRun(i, folder) for i, folder in enumerate(folders)])
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
    """The pages, one method each."""

    runs: Sequence[ViewedRun]

    def completions(self, request: Request) -> Response:
        """Show the filtered list, below the curves of the run."""
        given = {name: v for name, v in request.query_params.items() if v.strip() and name != "live"}
        try:
            query = Query.model_validate(given)
        except ValidationError as error:
            raise UserError("; ".join(explain(error, Query))) from error
        run = self._run(query.run)
        shown: dict[str, Any] = {
            "run": run,
            "query": query,
            "page": run.page(query),
            "curves": curves(load_run(run.folder).rows),
        }
        return self._page("completions.html", request, refresh="live" in request.query_params, **shown)

    def completion(self, request: Request) -> Response:
        """Show one completion, token by token, with the others of its group."""
        side, by = self._side(request, "at"), _colouring(request)
        [drawing] = draw([side["row"]], by)
        siblings = side["run"].siblings(side["address"], side["row"])
        return self._page("completion.html", request, **side, drawing=drawing, by=by, siblings=siblings)

    def pair(self, request: Request) -> Response:
        """Show two completions side by side, from one group or from two runs."""
        by, sides = _colouring(request), [self._side(request, name) for name in ("a", "b")]
        drawings = draw([side["row"] for side in sides], by)
        sides = [{**side, "drawing": drawing} for side, drawing in zip(sides, drawings, strict=True)]
        return self._page("pair.html", request, sides=sides, by=by)

    def prompts(self, request: Request) -> Response:
        """Show each prompt's mean reward in two runs, or in the two halves of one, the most changed first."""
        tables = [run.index("rollouts").table for run in self.runs]
        rows = compare(*(halves(tables[0]) if len(tables) == 1 else tables))
        return self._page("prompts.html", request, rows=rows[:500])

    def prompt(self, request: Request) -> Response:
        """Redirect to a prompt's latest completion in each run, side by side; of one run, to all its completions."""
        from starlette.responses import RedirectResponse

        index = request.query_params.get("index", "")
        if not index.isdecimal():
            raise UserError(f"index is {index!r}; give a whole number")
        found = [line for run in self.runs for line in run.page(Query(prompt=int(index))).lines[:1]]
        if len(found) < 2:
            return RedirectResponse(f"./?prompt={index}", headers=_HEADERS)
        return RedirectResponse(f"./pair?a={found[0].address}&b={found[1].address}", headers=_HEADERS)

    def report(self, request: Request) -> Response:
        """Show the HTML report as it would be written now."""
        from starlette.responses import HTMLResponse

        from ..page import report_html

        return HTMLResponse(report_html([run.folder for run in self.runs]), headers=_INLINE_STYLES)

    def style(self, request: Request) -> Response:
        """Send the style sheet."""
        from starlette.responses import FileResponse

        return FileResponse(_HERE / "style.css", headers={**_HEADERS, "Cache-Control": "max-age=3600"})

    def refused(self, request: Request, error: Exception) -> Response:
        """Show the error of an invalid request."""
        return self._page("refused.html", request, status=400, sentence=str(error))

    def _run(self, number: int) -> ViewedRun:
        """Return run ``number`` of the page. Raises UserError."""
        if number >= len(self.runs):
            raise UserError(f"there is no run {number} on this page; choose one below {len(self.runs)}")
        return self.runs[number]

    def _side(self, request: Request, name: str) -> dict[str, Any]:
        """Return the completion at the address in the parameter ``name``: its run, address and row."""
        address = Address.read(request.query_params.get(name, ""))
        run = self._run(address.run)
        return {"run": run, "address": address, "row": run.index(address.kind).one(address.file, address.row)}

    def _page(self, template: str, request: Request, status: int = 200, **values: Any) -> Response:
        """Render a template, escaping every value."""
        from starlette.responses import HTMLResponse

        def link(**changed: Any) -> str:
            """Return a link to this page with some parameters changed; None leaves one out."""
            given = {**request.query_params, **{name: str(v) for name, v in changed.items() if v is not None}}
            return f"?{urlencode({n: v for n, v in given.items() if v and changed.get(n, v) is not None})}"

        jinja2 = extra("jinja2", INSTALL)
        loader = jinja2.FileSystemLoader(_HERE)
        environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
        shared = {"runs": self.runs, "colourings": COLOURINGS, "link": link}
        return HTMLResponse(environment.get_template(template).render(**shared, **values), status, _HEADERS)


def _colouring(request: Request) -> Colouring:
    """Return the value to colour by. Raises UserError for an unknown one."""
    name = request.query_params.get("by", "credit")
    if name not in get_args(Colouring):
        raise UserError(f"completions are not coloured by {name!r}; choose one of {', '.join(COLOURINGS)}")
    return name  # type: ignore[return-value]  # one of them
