"""The local server's environment and model: made once, whole or not at all, from nothing but pins."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from textpolicy.errors import ServiceError, UserError
from textpolicy.tinker.server import environment as server_env
from textpolicy.tinker.server.pins import PINS
from textpolicy.tinker.server.server import LocalServer, ServerSettings, tiny_model_folder


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTPOLICY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tinker"


def test_every_package_has_one_version_and_no_address():
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", pin) for pin in PINS)
    assert "skyrl==0.4.0" in PINS
    assert not {"torch", "peft"} & {pin.split("==")[0] for pin in PINS}


def test_without_a_recent_python_the_error_names_the_versions_that_work(empty_cache, monkeypatch):
    monkeypatch.setattr(server_env, "base_python", lambda: None)
    with pytest.raises(UserError, match=r"needs Python 3\.12 or 3\.13 and none was found"):
        server_env.server_python()
    assert not server_env.environment_folder().exists()


def executable(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_the_first_python_that_works_is_taken_wherever_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setattr(sys, "executable", executable(tmp_path / "this", "exit 1"))
    monkeypatch.setattr(server_env.shutil, "which", lambda name: None)
    assert server_env.base_python() is None
    executable(tmp_path / "pyenv" / "versions" / "3.12.1" / "bin" / "python", "exit 1")
    executable(tmp_path / "pyenv" / "versions" / "3.11.9" / "bin" / "python", "exit 0")  # too old to be asked
    of_uv = executable(tmp_path / "of_uv", "exit 0")
    uv = executable(tmp_path / "uv", f"echo {of_uv}")
    monkeypatch.setattr(server_env.shutil, "which", lambda name: uv if name == "uv" else None)
    assert server_env.base_python() == of_uv
    of_pyenv = executable(tmp_path / "pyenv" / "versions" / "3.13.0" / "bin" / "python", "exit 0")
    assert server_env.base_python() == of_pyenv


@pytest.mark.parametrize("uv", [None, "/tools/uv"])
def test_it_is_made_by_pip_or_by_uv_from_the_pins_alone_and_only_once(empty_cache, monkeypatch, uv):
    called = []

    def run(*command):
        called.append(command)
        if "pip" not in command:
            Path(command[-1]).mkdir()
            return
        assert command[-3:-1] == ("--no-deps", "-r")
        assert Path(command[-1]).read_text().split() == list(PINS)

    monkeypatch.setattr(server_env, "base_python", lambda: "/tools/python3.12")
    monkeypatch.setattr(server_env, "_run", run)
    monkeypatch.setattr(server_env.shutil, "which", lambda name: uv)
    left = server_env.environment_folder().with_name(f"{server_env.environment_folder().name}.tmp-killed")
    left.mkdir(parents=True)
    output = []
    python = server_env.server_python(output.append)
    assert not left.exists()
    assert python == server_env.environment_folder() / "bin" / "python"
    assert len(output) == 1
    assert ["pip" in command for command in called] == [False, True]
    assert [command[0] == uv for command in called] == ([True, True] if uv else [False, False])
    assert server_env.server_python() == python
    assert len(called) == 2


def test_an_installation_that_fails_is_one_sentence_and_leaves_nothing(empty_cache, monkeypatch):
    monkeypatch.setattr(server_env, "base_python", lambda: sys.executable)
    monkeypatch.setattr(server_env.shutil, "which", lambda name: None)

    def fails(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "a\nno space left")

    monkeypatch.setattr(server_env.subprocess, "run", fails)
    with pytest.raises(UserError, match=r"could not be made \(no space left\); check the network"):
        server_env.server_python()
    assert [p.name for p in empty_cache.iterdir() if p.is_dir()] == []


def test_the_tiny_model_is_the_same_every_time_and_reads_bytes(empty_cache):
    from safetensors.numpy import load_file
    from transformers import AutoTokenizer

    first, again, other = tiny_model_folder(), tiny_model_folder(), tiny_model_folder(seed=1)
    assert first == again
    weights = load_file(first / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {np.dtype(np.float32)}
    assert sum(w.size for w in weights.values()) < 100_000
    assert any((w != weights[name]).any() for name, w in load_file(other / "model.safetensors").items())
    tokenizer = AutoTokenizer.from_pretrained(first)
    text = "Größe 7\n"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token_id == json.loads((first / "config.json").read_text())["eos_token_id"]


def test_a_folder_without_a_model_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        ServerSettings(model=tmp_path, folder=tmp_path / "server")


def test_a_server_that_cannot_start_reports_why_and_leaves_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "textpolicy.tinker.server.server.server_python", lambda say: Path(sys.executable)
    )  # without SkyRL
    with pytest.raises(ServiceError, match=r"did not start \(ModuleNotFoundError: No module named '(uvicorn|skyrl)'"):
        LocalServer(ServerSettings(model=tiny_model_folder(), folder=tmp_path / "server"))


def test_a_port_that_is_taken_is_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr("textpolicy.tinker.server.server.server_python", lambda say: pytest.fail("work was done"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"^port {port} cannot be used \(Address already in use\)"):
            LocalServer(ServerSettings(model=tiny_model_folder(), folder=tmp_path / "server", port=port))
    assert not (tmp_path / "server").exists()
