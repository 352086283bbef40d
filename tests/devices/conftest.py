"""The toy run of the chaos tests, and ports for rings of ranks."""

import os
import socket
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "chaos"))


@pytest.fixture
def free_ports():
    """Return the first of so many ports in a row that are free."""

    def first(count):
        for port in range(20_000 + os.getpid() % 5_000, 30_000, 16):
            taken = []
            try:
                for n in range(count):
                    taken.append(socket.create_server(("127.0.0.1", port + n)))
                return port
            except OSError:
                continue
            finally:
                for server in taken:
                    server.close()
        raise RuntimeError("no ports are free")

    return first
