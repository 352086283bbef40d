"""A server in a thread of this process, and clients of it."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from contextlib import contextmanager

import uvicorn

from textpolicy._system.ports import bound
from textpolicy.errors import ServiceError
from textpolicy.serve.server import make_app
from textpolicy.serve.service import Service


class Running:
    """A server of ``models`` at ``url``; ``stop`` ends it."""

    def __init__(self, models, folder, key=None, **settings):
        self.service = Service(models if callable(models) else lambda: {m.name: m for m in models}, folder, **settings)
        self.socket = bound("127.0.0.1", 0)
        self.socket.listen()
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        config = uvicorn.Config(make_app(self.service, key), log_level="warning", lifespan="off", ws="none")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()

    def stop(self):
        self.server.should_exit = self.server.force_exit = True
        self.thread.join()
        self.service.close()
        self.socket.close()

    def kill(self):
        """End as a process does that is killed: nothing more is written, and the lock is gone."""
        self.server.should_exit = self.server.force_exit = True
        self.thread.join()
        self.socket.close()
        nothing = Future()
        nothing.set_exception(ServiceError("killed"))
        self.service.journal.write = lambda *statements: nothing
        for model in self.service.models.values():
            model.gate.set()  # its thread ends
        self.service.worker.stop()
        self.service.journal.close()
        self.service.lock.__exit__(None, None, None)


@contextmanager
def running(models, folder, key=None, **settings):
    server = Running(models, folder, key, **settings)
    try:
        yield server
    finally:
        server.stop()
