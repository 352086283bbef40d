"""A server of pages in a thread of the test."""

import html
import threading
import urllib.error
import urllib.request

import pytest

uvicorn = pytest.importorskip("uvicorn", reason="the viewer is textpolicy[view]")

TOKEN = "a-token"


class Served:
    """An application on a free port of this machine."""

    def __init__(self, app):
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            threading.Event().wait(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        return self

    def __exit__(self, *error):
        self.server.should_exit = True
        self.thread.join()

    def get(self, path="", token=TOKEN, **headers):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{token}/{path}", headers=headers)
        with urllib.request.urlopen(request) as answer:
            return answer.read().decode(), answer.headers

    def page(self, path=""):
        return self.get(path)[0]

    def refused(self, path="", **how):
        with pytest.raises(urllib.error.HTTPError) as caught:
            self.get(path, **how)
        body = caught.value.read().decode()
        caught.value.close()
        return caught.value.code, html.unescape(body)
