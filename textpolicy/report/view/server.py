"""The local pages: their routes, who may reach them, and the server of `textpolicy view`.

Jinja2 makes the pages as HTML and escapes whatever a model wrote. They have links and forms and no script at all;
the Content-Security-Policy lets a browser run none, load nothing from elsewhere and send nothing away. The keys, and
filters that act at once, come from a frame beside the page, whose one script no word of a model enters.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar
from urllib.parse import urlencode

from pydantic import Field, ValidationError

from ..._system.extras import extra
from ..._system.ports import bound
from ...config.mistakes import explain
from ...config.settings import LocalPath, Positional, Section
from ...errors import TextPolicyError, UserError
from ...record.prompts import compare
from ...record.reader import flat
from ..learning import outcome
from ..rendering import render
from .curves import curves
from .drawing import COLOURINGS, Colouring, draw
from .index import Address, Query, Whole
from .overview import arranged, by_setting, entries, unusual
from .prompts import Order, judged
from .runs import Runs

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

INSTALL = "textpolicy"
PROMPTS_PER_PAGE = 100
_HERE = Path(__file__).parent
_POLICY = "default-src 'none'; base-uri 'none'; style-src 'self'; img-src data:; form-action 'self'; "
_HEADERS = {
    "Content-Security-Policy": _POLICY + "frame-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_OF_THE_REPORT = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
_OF_THE_FRAME = "default-src 'none'; script-src 'self'; connect-src 'self'; base-uri 'none'; frame-ancestors 'self'"
_INLINE_STYLES = {**_HEADERS, "Content-Security-Policy": _OF_THE_REPORT}
_FILES = {
    "style.css": _HEADERS,
    "keys.js": _HEADERS,
    "keys.html": {**_HEADERS, "Content-Security-Policy": _OF_THE_FRAME},
}

S = TypeVar("S", bound=Section)


class ViewArguments(Section):
    """Browse the completions of a run, or compare runs, on a page that only this machine can open."""

    run: Annotated[LocalPath, Positional]
    """Folder of the run, which may still be running, or a folder of runs such as runs/."""
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
    with bound("127.0.0.1", args.port) as listening:
        listening.listen()  # before the address is printed, for whoever reads it may connect at once
        print(f"http://127.0.0.1:{listening.getsockname()[1]}/{token}/  (Ctrl-C ends it)", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


class CompletionQuery(Query):
    """The completion to show, and the list that it was opened from."""

    at: str = ""
    by: Colouring = "credit"


class PairQuery(Section):
    """The two completions to show side by side."""

    a: str = ""
    b: str = ""
    by: Colouring = "credit"


class PromptsQuery(Section):
    """The run whose prompts are listed, and the one that it is compared with."""

    run: Whole = 0
    other: Whole | None = None
    sort: Order = "hardest"
    page: Whole = 1


class PromptQuery(Section):
    """The prompt to look up in one run or two."""

    index: Whole = 0
    run: Whole = 0
    other: Whole | None = None


class RunsQuery(Section):
    """The order of the list of runs."""

    sort: str | None = None  # a column
    order: Literal["rising", "falling"] = "falling"


class ReportQuery(Section):
    """The run to report on; all if not given."""

    run: Whole | None = None


def make_app(folders: Sequence[Path], token: str) -> Starlette:
    """Serve the pages of the runs in ``folders``, only under /``token``/. Raises UserError for one without a run."""
    applications, routing = extra("starlette.applications", INSTALL), extra("starlette.routing", INSTALL)
    hosts = extra("starlette.middleware.trustedhost", INSTALL).TrustedHostMiddleware
    middleware = extra("starlette.middleware", INSTALL).Middleware
    pages = Pages(Runs(folders))
    pages.known.refresh()
    routes = [
        routing.Route("/", pages.completions),
        *(routing.Route(f"/{name}", getattr(pages, name)) for name in PAGES),
        *(routing.Route(f"/{name}", pages.file) for name in _FILES),
    ]
    return applications.Starlette(
        routes=[routing.Mount(f"/{token}", routes=routes)],
        middleware=[middleware(hosts, allowed_hosts=["127.0.0.1", "localhost"])],
        exception_handlers={TextPolicyError: pages.refused, OSError: pages.refused},
    )


PAGES = ("completion", "pair", "prompts", "prompt", "report", "runs")


@dataclass(frozen=True)
class Pages:
    """The pages, one method each."""

    known: Runs

    def runs(self, request: Request) -> Response:
        """Show the runs, in the order of a column, and what was reached with each value of a setting."""
        query = _asked(request, RunsQuery)
        self.known.refresh()
        found = entries(self.known.opened)
        values = by_setting(found)
        lines = found if query.sort is None else arranged(found, query.sort, query.order == "falling")
        names = list(dict.fromkeys(value.setting for value in values))
        return self._page("runs.html", request, lines=lines, values=values, names=names, query=query)

    def completions(self, request: Request) -> Response:
        """Show a run's curves and filtered groups, and its summary above all of them; the list if several are open."""
        if len(self.known.opened) > 1 and not request.query_params:
            return self.runs(request)
        query = _asked(request, Query)
        run = self.known.run(query.run)
        shown: dict[str, Any] = {"page": run.page(query), "curves": curves(run.recorded.rows)}
        if query == Query(run=query.run):
            shown["doctor"], shown["cut"] = run.doctor(), len(run.index("rollouts").select(Query(finish="length")))
            shown["outcome"], shown["settings"] = outcome(run.recorded), unusual(flat(run.recorded.config))
        return self._page(
            "completions.html", request, run=run, query=query, refresh="live" in request.query_params, **shown
        )

    def completion(self, request: Request) -> Response:
        """Show one completion, token by token, with the others of its group."""
        query = _asked(request, CompletionQuery)
        side = self._side(query.at)
        [drawing] = draw([side["row"]], query.by, side["run"].strongest)
        listed = Query(**query.model_dump(exclude={"at", "by", "page"}) | {"run": side["run"].number})
        group, before, after = side["run"].around(side["address"], listed)
        beside = {"group": group, "before": before, "after": after}
        return self._page("completion.html", request, **side, **beside, drawing=drawing, by=query.by)

    def pair(self, request: Request) -> Response:
        """Show two completions side by side, from one group or from two runs."""
        query = _asked(request, PairQuery)
        sides = [self._side(address) for address in (query.a, query.b)]
        strongest = max(side["run"].strongest for side in sides)
        drawings = draw([side["row"] for side in sides], query.by, strongest)
        sides = [{**side, "drawing": drawing} for side, drawing in zip(sides, drawings, strict=True)]
        return self._page("pair.html", request, sides=sides, by=query.by)

    def prompts(self, request: Request) -> Response:
        """Show each prompt of a run by how often it was right, or its mean rewards in two, the most changed first."""
        query = _asked(request, PromptsQuery)
        run, other = self.known.run(query.run), None if query.other is None else self.known.run(query.other)
        index = run.index("rollouts")
        tables = [each.index("rollouts").table for each in (run, other) if each is not None]
        rows: Sequence[Any] = judged(index.table, query.sort) if other is None else compare(*tables)
        pages = max(1, -(-len(rows) // PROMPTS_PER_PAGE))
        number = min(max(1, query.page), pages)
        shown = rows[(number - 1) * PROMPTS_PER_PAGE : number * PROMPTS_PER_PAGE]
        texts = index.prompts([row.prompt_index for row in shown])
        lines = [(row, texts[row.prompt_index]) for row in shown]
        page, total = {"number": number, "pages": pages, "total": len(rows)}, len(index.table)
        return self._page(
            "prompts.html", request, run=run, other=other, lines=lines, page=page, total=total, query=query
        )

    def prompt(self, request: Request) -> Response:
        """Redirect to a prompt's latest completion in two runs, side by side; of one run, to all its completions."""
        from starlette.responses import RedirectResponse

        query = _asked(request, PromptQuery)
        runs = [self.known.run(number) for number in (query.run, query.other) if number is not None]
        found = [page.groups[0].lines[0] for run in runs if (page := run.page(Query(prompt=query.index))).groups]
        if len(found) < 2:
            return RedirectResponse(f"./?run={query.run}&prompt={query.index}", headers=_HEADERS)
        return RedirectResponse(f"./pair?a={found[0].address}&b={found[1].address}", headers=_HEADERS)

    def report(self, request: Request) -> Response:
        """Show the HTML report as it would be written now."""
        from starlette.responses import HTMLResponse

        from ..page import report_html

        number = _asked(request, ReportQuery).run
        runs = self.known.opened if number is None else [self.known.run(number)]
        back = "./" if number is None else f"./?run={number}"
        return HTMLResponse(report_html([run.folder for run in runs], back), headers=_INLINE_STYLES)

    def file(self, request: Request) -> Response:
        """Send the style sheet, or the frame and its script."""
        from starlette.responses import FileResponse

        name = request.url.path.rpartition("/")[2]
        return FileResponse(_HERE / name, headers={**_FILES[name], "Cache-Control": "max-age=3600"})

    def refused(self, request: Request, error: Exception) -> Response:
        """Show the error of an invalid request, or of a run's files."""
        sentence = str(error)
        if isinstance(error, OSError):
            sentence = f"{error.filename} cannot be used ({error.strerror}); check the folder of the run"
        return self._page("refused.html", request, status=400, sentence=sentence)

    def _side(self, at: str) -> dict[str, Any]:
        """Return the completion at an address: its run, address and row."""
        address = Address.read(at)
        run = self.known.run(address.run)
        return {"run": run, "address": address, "row": run.index(address.kind).one(address.file, address.row)}

    def _page(self, template: str, request: Request, status: int = 200, **values: Any) -> Response:
        """Render a template, escaping every value."""
        from starlette.responses import HTMLResponse

        def link(to: str = "", **changed: Any) -> str:
            """Return a link to a page with this one's parameters, some of them changed; None leaves one out."""
            given = changed | {name: v for name, v in request.query_params.items() if name not in changed}
            kept = {name: str(v) for name, v in given.items() if v is not None and v != ""}
            return f"{to}?{urlencode(kept, safe=':')}"

        shared = {"runs": self.known.opened, "colourings": COLOURINGS, "link": link}
        return HTMLResponse(render(f"view/{template}", **shared, **values), status, _HEADERS)


def _asked(request: Request, kind: type[S]) -> S:
    """Return the parameters of an address. Raises UserError for one that is unknown or out of range."""
    given = {name: v for name, v in request.query_params.items() if v.strip() and name != "live"}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise UserError("; ".join(explain(error, kind))) from error
