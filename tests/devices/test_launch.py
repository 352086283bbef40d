"""Which backend connects the ranks of a machine, whether a process is one of several, and what is refused."""

import json
import secrets
import sys
import threading
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Listener

import mlx.core as mx
import pytest

from textpolicy.config.settings import Config
from textpolicy.devices.launch import launched, start
from textpolicy.errors import UserError
from textpolicy.mlx import collectives
from textpolicy.run.ranks import joined


@pytest.fixture
def alone(monkeypatch):
    for name in ("MLX_RANK", "MLX_HOSTFILE", "MLX_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)


def pretend(monkeypatch, device, cuda):
    monkeypatch.setattr(collectives.mx, "default_device", lambda: device)
    monkeypatch.setattr(collectives.mx.cuda, "is_available", lambda: cuda)


def test_the_ranks_of_a_machine_are_connected_by_what_its_devices_have(monkeypatch):
    pretend(monkeypatch, mx.cpu, False)
    assert collectives.backend() == "ring"
    pretend(monkeypatch, mx.gpu, True)
    assert collectives.backend() == "nccl"
    pretend(monkeypatch, mx.cpu, True)
    assert collectives.backend() == "ring"


def test_a_mac_has_one_gpu_for_one_rank_and_its_ranks_share_its_memory(monkeypatch):
    pretend(monkeypatch, mx.gpu, True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert collectives._machine() != collectives._boot()
    pretend(monkeypatch, mx.gpu, False)
    assert collectives._machine() == collectives._boot()
    with pytest.raises(UserError, match="this Mac has one GPU"):
        collectives.backend()


def test_rank_0_is_looked_for_where_the_ranks_were_launched(alone, monkeypatch, tmp_path):
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([["10.0.0.7:32323", "10.0.1.7:32324"], ["10.0.0.8:32325"]]))
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    monkeypatch.setattr(collectives.socket, "gethostname", lambda: "studio.invalid")
    assert collectives._addresses() == ["10.0.0.7", "10.0.1.7"]
    monkeypatch.setenv("MLX_JACCL_COORDINATOR", "192.168.1.5:41000")
    assert collectives._addresses() == ["192.168.1.5", "10.0.0.7", "10.0.1.7"]


def test_a_link_takes_the_first_address_that_answers_and_only_with_the_key():
    key = secrets.token_bytes(32)
    listener, came = Listener(("127.0.0.1", 0), authkey=key), []

    def accept():
        while not came:
            with suppress(OSError, EOFError, AuthenticationError):
                came.append(listener.accept().recv())

    thread = threading.Thread(target=accept)
    thread.start()
    first = {"host": "studio", "port": listener.address[1], "key": key.hex()}
    with pytest.raises(AuthenticationError):
        collectives._reach({**first, "addresses": ["127.0.0.1"], "key": secrets.token_bytes(32).hex()})
    collectives._reach({**first, "addresses": ["127.0.0.2.invalid", "127.0.0.1"]}).send("here")
    thread.join(10)
    listener.close()
    assert came == ["here"]
    with pytest.raises(UserError, match=r"rank 0 on studio cannot be reached at 127\.0\.0\.1; give its address"):
        collectives._reach({**first, "addresses": ["127.0.0.1"]})


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"MLX_RANK": "0", "MLX_HOSTFILE": "/tmp/hosts.json"}, True),
        ({"MLX_RANK": "0", "MLX_HOSTFILE": ""}, False),  # mlx.launch with one host
        ({"MLX_RANK": "1", "MLX_WORLD_SIZE": "2"}, True),
        ({"MLX_RANK": "0", "MLX_WORLD_SIZE": "1"}, False),
        ({"OMPI_COMM_WORLD_RANK": "3"}, True),
    ],
)
def test_a_rank_is_known_by_its_environment(alone, monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched() == expected


def test_a_program_without_a_file_starts_no_other_ranks(alone, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-c", "..."])
    with pytest.raises(UserError, match=r"machine\.devices is 2 and this program was not started from a file"):
        start(2, lambda: "ring")
    assert start(1, lambda: "ring") is None


def test_a_remote_engine_has_no_devices_here(alone):
    refused = joined(Config(engine="tinker", machine={"devices": 2}))
    with pytest.raises(UserError, match=r"machine\.devices is 2 and engine tinker"), refused:
        pass
    with joined(Config()) as team:
        assert team.size == 1
