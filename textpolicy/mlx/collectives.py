"""The ranks of a run as MLX connects them: meet, sum gradients, and measure the links."""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..devices.launch import VOICE, Others
from ..devices.team import ALONE, Member, Team
from ..errors import RankError, UserError

_TOGETHER = 2**24  # numbers summed by one collective
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def backend() -> str:
    """Return the backend of MLX that connects the devices of one machine. Raises UserError."""
    if mx.default_device() == mx.cpu or mx.cuda.is_available():
        return "nccl" if mx.default_device() == mx.gpu else "ring"
    raise UserError(
        "machine.devices is above 1 and this Mac has one GPU, which one rank uses whole; start a rank on each of "
        "several Macs with mlx.launch --hostfile (docs/16_devices.md)"
    )


def meet(deadline: float, others: Others | None = None) -> Team:
    """Join the ranks that MLX connects, and link them for all that is no gradient. Raises RankError, UserError."""
    with _at_most(deadline):
        try:
            group = mx.distributed.init(strict=True)
        except RuntimeError as error:
            raise UserError(f"MLX does not connect the ranks ({error}); check the hostfile of mlx.launch") from error
        if group.size() == 1:
            return ALONE
        rank, key, listener = group.rank(), secrets.token_bytes(32), None
        near = len({*gather(_boot().encode())}) == 1
        own: dict[str, Any] = {"host": socket.gethostname(), "process": os.getpid()}
        own |= {"machine": _machine(), "device": _device()}
        if rank == 0:
            listener = Listener(("127.0.0.1" if near else "0.0.0.0", 0), backlog=group.size(), authkey=key)
            own |= {"port": listener.address[1], "key": key.hex()}
            own["addresses"] = ["127.0.0.1"] if near else _addresses()
        every = [json.loads(said) for said in gather(json.dumps(own).encode())]
        members = [Member(*(said[name] for name in ("host", "process", "machine", "device"))) for said in every]
        links: dict[int, Connection] = {}
        if listener is not None:
            while len(links) < group.size() - 1:
                with suppress(OSError, EOFError, AuthenticationError):  # of one that only tried whether it gets here
                    link = listener.accept()
                    links[link.recv()] = link
            listener.close()
        else:
            links[0] = _reach(every[0])
            links[0].send(rank)
        for link in links.values():  # small messages go at once
            with socket.socket(fileno=os.dup(link.fileno())) as same:
                same.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    team = Team(rank, members, links, deadline, voice=int(os.environ.get(VOICE, "2")))
    if others is not None:
        team.last_words = others.last_words
    return team


def gather(data: bytes) -> list[bytes]:
    """Return the ``data`` of every rank, by a collective of MLX."""
    sizes = np.array(mx.distributed.all_gather(mx.array([len(data)], mx.int32)))
    padded = mx.array(np.frombuffer(data.ljust(sizes.max(), b"\0"), np.uint8))
    rows = np.array(mx.distributed.all_gather(padded)).reshape(len(sizes), -1)
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def summed(tree: Any, team: Team) -> Any:
    """Return the sums over all ranks of the arrays in ``tree``, of one type, equal in its bits on every rank.

    Raises RankError.
    """
    names, arrays = zip(*tree_flatten(tree), strict=True)
    out: list[mx.array] = []
    while len(out) < len(arrays):
        part = [arrays[len(out)]]
        while len(out) + len(part) < len(arrays) and sum(a.size for a in part) < _TOGETHER:
            part.append(arrays[len(out) + len(part)])
        flat = mx.concatenate([a.reshape(-1) for a in part])
        try:
            flat = mx.distributed.all_sum(flat)
            mx.eval(flat)
        except RuntimeError as error:
            time.sleep(2.0)  # in which the link says which rank it was
            raise RankError(team.failure or f"the ranks have lost each other ({error}); {team.remedy}") from error
        starts = [0]
        for a in part:
            starts.append(starts[-1] + a.size)
        out += [flat[i:j].reshape(a.shape) for (i, j), a in zip(pairwise(starts), part, strict=True)]
    return tree_unflatten(list(zip(names, out, strict=True)))


def digest(arrays: Sequence[mx.array]) -> int:
    """Return a number that differs where ``arrays``, of 32 bits each, do."""
    sums = [(mx.view(a, mx.uint32).reshape(-1) * (2 * mx.arange(a.size, dtype=mx.uint32) + 1)).sum() for a in arrays]
    return hash(tuple(np.array(mx.stack(sums)).tolist()))


def links() -> tuple[int, dict[str, Any]]:
    """Return the rank of this process, and what connects it to the others, with its speed. Raises UserError."""
    known = {"MLX_HOSTFILE": "ring", "NCCL_PORT": "nccl", "MLX_JACCL_COORDINATOR": "jaccl"}
    found: dict[str, Any] = {"backend": next((name for key, name in known.items() if os.environ.get(key)), "mpi")}
    with meet(60.0) as team:
        found |= {"ranks": team.size, "hosts": ", ".join(dict.fromkeys(str(member) for member in team.members))}
        for name, size, times in (("milliseconds_of_a_sum", 1, 20), ("gigabytes_per_second", _TOGETHER, 5)):
            array, seconds = mx.ones(size), []
            mx.eval(array)
            for _ in range(times):
                team.exchange(None)
                started = time.perf_counter()
                mx.eval(mx.distributed.all_sum(array))
                seconds.append(time.perf_counter() - started)
            found[name] = float(f"{min(seconds) * 1e3 if size == 1 else 4 * size / min(seconds) / 1e9:.3g}")
        started = time.perf_counter()
        for _ in range(20):
            team.exchange(None)
        found["milliseconds_of_an_exchange"] = float(f"{(time.perf_counter() - started) / 20 * 1e3:.3g}")
        team.part()
        return team.rank, found


def _boot() -> str:
    """Return what the processes of one machine have in common."""
    return _BOOT.read_text().strip() if _BOOT.exists() else f"{socket.gethostname()} {uuid.getnode()}"


def _machine() -> str:
    """Return what ranks that share the memory they compute in have in common."""
    own_gpu = mx.default_device() == mx.gpu and mx.cuda.is_available()
    return f"{_boot()} {os.environ.get('CUDA_VISIBLE_DEVICES', '0')}" if own_gpu else _boot()


def _device() -> str:
    info = mx.device_info()
    facts = [str(info[name]) for name in ("device_name", "architecture", "memory_size") if name in info]
    return " ".join([*facts, f"{os.cpu_count()} cores"])


def _addresses() -> list[str]:
    """Return the addresses at which this process, rank 0, may be reached: those it was launched with come first."""
    found = [os.environ.get("NCCL_HOST_IP", ""), os.environ.get("MLX_JACCL_COORDINATOR", "").rpartition(":")[0]]
    if hosts := os.environ.get("MLX_HOSTFILE"):
        found += [address.rpartition(":")[0] for address in json.loads(Path(hosts).read_text())[0]]
    found += [info[4][0] for info in _resolved(socket.gethostname())]
    return list(dict.fromkeys(filter(None, found)))


def _resolved(name: str) -> list[Any]:
    try:
        return socket.getaddrinfo(name, None, socket.AF_INET)
    except OSError:
        return []


def _reach(first: dict[str, Any]) -> Connection:
    """Return a link to rank 0. Raises UserError."""
    addresses, key = first["addresses"], bytes.fromhex(first["key"])
    for address in addresses:
        try:
            socket.create_connection((address, first["port"]), 5.0).close()
        except OSError:
            continue
        return Client((address, first["port"]), authkey=key)
    raise UserError(
        f"rank 0 on {first['host']} cannot be reached at {', '.join(addresses)}; give its address in the hostfile of "
        "mlx.launch, and let its firewall pass"
    )


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """End the process, with a sentence, where the ranks take longer to meet: MLX would wait for ever."""

    def end() -> None:
        os.write(2, f"textpolicy: the ranks did not meet within {seconds:g} s; start all of them again\n".encode())
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
