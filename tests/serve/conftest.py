"""A server with the made model, and clients of the real SDK."""

import warnings

import pytest
from made_model import MadeModel
from running_server import running


@pytest.fixture
def made():
    return MadeModel()


@pytest.fixture
def server(made, tmp_path):
    with running([made], tmp_path / "server") as started:
        yield started


@pytest.fixture
def connect(server, no_tinker_account):
    """``connect()``: clients of the server, closed when the test is over."""
    tinker = pytest.importorskip("tinker", reason="the clients are the Tinker SDK's")
    warnings.filterwarnings("ignore", category=FutureWarning, module="tinker")
    clients = []

    def client(url=None, key="tml-test"):
        clients.append(tinker.ServiceClient(base_url=url or server.url, api_key=key))
        return clients[-1]

    yield client
    for each in clients:
        each.close("success").result()
