"""Kill a server between a client's request and its result, start it again, and compare with one that was left alone.

    python tests/chaos/kill_server.py --trials 100

Every server is a child of this process, forked once everything is imported, with the model of NumPy that the server's
tests use. The client repeats what it did not hear the end of, as the Tinker SDK does. A trial is equal if every loss,
every completion and the number of steps are those of the server that was left alone: nothing is lost or done twice.
With --sdk the client is the SDK itself, in a process of its own, and the model a tiny one on MLX, whose losses and
log-probs may differ by the rounding of sums.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests/serve")]

import numpy as np  # noqa: E402
import uvicorn  # noqa: E402
from asking import Asking, a_pass, loss_of  # noqa: E402
from made_model import MadeModel  # noqa: E402

from textpolicy._system.ports import bound  # noqa: E402
from textpolicy.serve.server import make_app  # noqa: E402
from textpolicy.serve.service import Service  # noqa: E402

STEPS = 6
LIMIT = 300.0  # seconds of a trial, on a machine that is busy with other things
DATA = [[1, 2, 3, 4], [5, 6, 7]]


class Server:
    """A server in a process of its own, on a port that it keeps over its lives."""

    def __init__(self, folder: Path, models: Callable[[], Any]) -> None:
        self.folder, self.models = folder, models
        self.socket = bound("127.0.0.1", 0)
        self.socket.listen(512)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.kills, self.lock = 0, threading.Lock()
        self.pid = self._start()

    def _start(self) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:  # the child, which never returns
            log = os.open(self.folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            service = Service(self.models, self.folder)
            config = uvicorn.Config(make_app(service), log_level="warning", lifespan="off", ws="none")
            uvicorn.Server(config).run(sockets=[self.socket])
        finally:
            os._exit(1)

    def kill(self, *, again: bool = True) -> None:
        """Kill the server, and start another in its folder."""
        with self.lock:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            if again:
                self.kills += 1
                self.pid = self._start()


class Client(Asking):
    """A client that repeats what it did not hear the end of."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        end = time.monotonic() + LIMIT
        while True:
            try:
                status, answer = super().__call__(*arguments, **keywords)
            except (URLError, HTTPException, OSError) as error:  # the server is gone, perhaps in the middle
                if time.monotonic() > end:
                    raise
                del error
                time.sleep(0.01)
                continue
            if status < 500:
                return status, answer


def work(url: str, before: Any = lambda: None) -> tuple[list[float], list[bytes], int]:
    """Train and sample; return losses, completions, and steps. ``before`` is called ahead of each wait for a result."""
    ask = Client(url)
    session, model = ask.model(seed=5)
    losses, completions, seq = [], [], 0
    for step in range(STEPS):
        passed = ask("forward_backward", a_pass(model, seq + 1, DATA))[1]["request_id"]
        stepped = ask.step(model, seq + 2)[1]["request_id"]
        save = {"model_id": model, "seq_id": seq + 3, "sampling_session_seq_id": step}
        saved = ask("save_weights_for_sampler", save)[1]["request_id"]
        before()
        losses.append(loss_of(ask.result(passed)))
        before()
        assert "metrics" in ask.result(stepped)
        before()
        named = ask.result(saved)
        assert "sampling_session_id" in named, named
        sampler = named["sampling_session_id"]
        asked = {"sampling_session_id": sampler, "seq_id": 0, "prompt": {"chunks": [{"tokens": [1]}]}}
        asked["sampling_params"] = {"max_tokens": 6, "seed": step}
        sampled = ask("asample", asked)[1]["request_id"]
        before()
        completions.append(ask.result(sampled))
        seq += 3
    ask("session_heartbeat", {"session_id": session})
    return losses, completions, seq


def made() -> dict[str, Any]:
    """Return the model of NumPy."""
    model = MadeModel()
    return {model.name: model}


def work_of_sdk(base: str, url: str, before: Any = lambda: None) -> tuple[list[float], list[Any], int]:
    """Do as ``work`` does with the SDK and the model ``base``, in a process that shares no threads."""
    ours, theirs = multiprocessing.Pipe()

    def wait() -> None:
        theirs.send(None)
        theirs.recv()

    process = multiprocessing.get_context("fork").Process(target=lambda: theirs.send(with_sdk(base, url, wait)))
    process.start()
    theirs.close()
    while (found := ours.recv()) is None:
        before()
        ours.send(None)
    process.join()
    return found  # type: ignore[no-any-return]


def with_sdk(base: str, url: str, before: Callable[[], None]) -> tuple[list[float], list[Any], int]:
    """Train and sample; return losses and log-probs, completions, and steps."""
    import tinker

    client = tinker.ServiceClient(base_url=url, api_key="tml-local").create_lora_training_client(base, rank=4, seed=5)
    client = client.result()
    data = [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={"target_tokens": np.array(tokens[1:]), "weights": np.ones(len(tokens) - 1, np.float32)},
        )
        for tokens in DATA
    ]
    numbers, completions = list[float](), list[Any]()
    for step in range(STEPS):
        passed = client.forward_backward(data, "cross_entropy")
        stepped = client.optim_step(tinker.AdamParams(learning_rate=0.01))
        before()
        numbers.append(passed.result().metrics["loss:sum"])
        before()
        stepped.result()
        before()
        sampler = client.save_weights_and_get_sampling_client().result()
        asked = tinker.SamplingParams(max_tokens=6, seed=step, stop=[])
        sampled = sampler.sample(tinker.ModelInput.from_ints([1]), 2, asked)
        before()
        for one in sampled.result().sequences:
            completions.append(one.tokens)
            numbers += one.logprobs
    return numbers, completions, 3 * STEPS


@dataclass(frozen=True)
class Kind:
    """The client of the trials, its server's models, and by how much numbers may differ."""

    work: Callable[..., tuple[list[float], list[Any], int]]
    models: Callable[[], Any]
    tolerance: float = 0.0

    def equal(self, found: Any, expected: Any) -> bool:
        """Return whether two results are the same."""
        return bool(np.allclose(found[0], expected[0], 0, self.tolerance)) and found[1:] == expected[1:]


def trial(number: int, seed: int, kind: Kind, expected: Any, folder: Path) -> tuple[bool, int]:
    """Return whether a trial went as the one that was left alone, and how often its server was killed."""
    rng, place = random.Random(f"{seed} {number}"), folder / f"trial-{number}"
    server = Server(place, kind.models)
    struck = {rng.randrange(4 * STEPS) for _ in range(rng.randrange(1, 4))}
    waits = iter(range(4 * STEPS))
    killers: list[threading.Timer] = []

    def before() -> None:
        if next(waits) in struck:
            if rng.random() < 0.5:
                server.kill()
            else:  # a moment later, while it works, or while the client waits or asks for more
                if killers:
                    killers[-1].join()
                killers.append(threading.Timer(rng.random() * 0.05, server.kill))
                killers[-1].start()

    try:
        found = kind.work(server.url, before)
    finally:
        for killer in killers:
            killer.join()
        server.kill(again=False)
        server.socket.close()
    rows = (place / "runs").glob("*/metrics.jsonl")
    steps = [json.loads(line)["step"] for path in rows for line in path.read_text().splitlines()]
    equal = kind.equal(found, expected) and steps == list(range(STEPS))
    if equal:
        shutil.rmtree(place)
    else:
        print(f"trial {number} differs: {found[0]} instead of {expected[0]}; steps {steps}; {place}", file=sys.stderr)
    return equal, server.kills


def main() -> int:
    """Run the trials and print their row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sdk", action="store_true", help="with the SDK as the client, and a tiny model on MLX")
    parser.add_argument("--record", action="store_true", help="append the row to benchmarks/results/chaos.jsonl")
    args = parser.parse_args()
    began, folder = time.time(), Path(tempfile.mkdtemp(prefix="kill-server-"))
    kind = Kind(work, made)
    if args.sdk:
        from textpolicy.mlx.tenants import model  # noqa: F401 - imported once, before the forks
        from textpolicy.serve.command import load
        from textpolicy.tinker.server.tiny_model import write_tiny_model

        os.environ["TINKER_TELEMETRY"] = "0"
        write_tiny_model(folder / "tiny")
        base = str(folder / "tiny")
        kind = Kind(partial(work_of_sdk, base), lambda: load([base]), 1e-5)
    alone = Server(folder / "alone", kind.models)
    expected = kind.work(alone.url)
    alone.kill(again=False)
    results = [trial(i, args.seed, kind, expected, folder) for i in range(args.trials)]
    equal, kills = sum(same for same, _ in results), sum(killed for _, killed in results)
    row = {
        "benchmark": "chaos", "set": "server" + ", SDK" * args.sdk, "trials": args.trials,
        "equal": equal, "faults": [],
        "struck": {"kill": kills}, "seconds": round(time.time() - began, 1), "seed": args.seed,
    }  # fmt: skip
    if args.record:
        from machine import describe

        with (ROOT / "benchmarks/results/chaos.jsonl").open("a") as file:
            file.write(json.dumps({**row, **describe()}) + "\n")
    print(json.dumps(row))
    if equal == args.trials:
        shutil.rmtree(folder)
    return 0 if equal == args.trials else 1


if __name__ == "__main__":
    sys.exit(main())
