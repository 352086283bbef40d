"""A folder is one server's at a time: a second would take the requests of the first."""

import sys

import pytest

from textpolicy._system.lock import lock_with_children
from textpolicy.errors import MissingDependencyError, UserError
from textpolicy.tinker.server import environment, server


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "server_python", lambda say: sys.executable)
    monkeypatch.setattr(server, "_STOP_LIMIT", 0.1)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return server.ServerSettings(model=tmp_path / "model", folder=tmp_path / "served")


def test_a_second_server_in_a_folder_is_refused(settings):
    settings.folder.mkdir()
    with (
        lock_with_children(settings.folder / "server.lock", 0, "taken"),
        pytest.raises(UserError, match=r"another server works in .*served; stop it, or give this one another --folder"),
    ):
        server.LocalServer(settings)
    assert not (settings.folder / "server.log").exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(settings):
    settings.folder.write_text("")
    with pytest.raises(UserError, match=r"the server's folder .*served cannot be used"):
        server.LocalServer(settings)


@pytest.mark.parametrize("call", [environment.server_python, server.tiny_model_folder])
def test_a_missing_filelock_names_the_extra(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "filelock", None)
    with pytest.raises(MissingDependencyError, match=r"filelock is not installed; .*'textpolicy\[tinker\]'"):
        call()
