"""A small proxy in front of a Tinker server that delays, drops and fails requests according to a plan."""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}


@dataclass(frozen=True)
class Fault:
    """What happens to one request: it waits, and is then dropped or answered with ``status``, or passed on."""

    seconds: float = 0.0
    drop: bool = False
    status: int = 0
    lost: bool = False  # passed on, and its answer dropped


Plan = Callable[[str, int], Fault | None]  # the path, and how often it was asked for before


class FaultyProxy:
    """``url`` leads to ``target`` by way of the ``plan``; ``seen`` counts requests by path and fault."""

    def __init__(self, target: str, plan: Plan):
        self.target, self.plan = urlsplit(target), plan
        self.asked: Counter[str] = Counter()
        self.faults: list[tuple[str, Fault]] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                proxy.handle(self)

            do_GET = do_POST = do_DELETE = handle_any  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("content-length") or 0))
        fault = self.plan(request.path, self.asked[request.path])
        self.asked[request.path] += 1
        if fault is not None:
            self.faults.append((request.path, fault))
            time.sleep(fault.seconds)
            if fault.drop:
                request.close_connection = True
                return
            if fault.status:
                return answer(request, fault.status, {"content-type": "application/json"}, b'{"detail": "planted"}')
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
        status, named, content = self.passed_on(request.command, request.path, body, headers)
        if fault is not None and fault.lost:
            request.close_connection = True
            return
        answer(request, status, named, content)

    def passed_on(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict, bytes]:
        link = http.client.HTTPConnection(self.target.hostname, self.target.port, timeout=120)
        try:
            link.request(method, path, body, headers)
            reply = link.getresponse()
            return reply.status, dict(reply.getheaders()), reply.read()
        finally:
            link.close()

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def answer(request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes) -> None:
    try:
        request.send_response(status)
        for name, value in headers.items():
            if name.lower() not in HOP_BY_HOP:
                request.send_header(name, value)
        request.send_header("content-length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)
    except (BrokenPipeError, ConnectionResetError):
        request.close_connection = True
