"""Measure the client's own time in a training step on a Tinker server: one JSON row.

    .venv/bin/python benchmarks/tinker_overhead.py [--prompts 64] [--group 16] [--tokens 512] [--latency 10]

A step samples ``prompts`` x ``group`` completions of ``tokens`` tokens, credits them with a recipe, and updates. The
server is a fake inside the process: it encodes the requests as the SDK does, and hands out completions of the right
size after ``latency`` seconds for sampling and as long for the update (hosted Tinker works in cycles of about ten
seconds). Everything else that passes is the client's: ``overhead`` is its share of the step. With --real URL MODEL
the same is measured against a running server, by subtracting what was waited for.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from threading import Timer
from types import SimpleNamespace
from typing import Any

import numpy as np
from machine import describe
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.types import ForwardBackwardInput, ForwardBackwardRequest, TensorData
from zstandard import ZstdCompressor

from textpolicy.algorithms import algorithm
from textpolicy.engine import Sampling
from textpolicy.tinker.engine import TinkerEngine
from textpolicy.types import Episode

RESULTS = Path(__file__).parent / "results" / "tinker_overhead.jsonl"


class Recorded:
    """Service and clients that answer after ``latency`` seconds, and add up how long was waited for them."""

    def __init__(self, tokens: int, latency: float):
        self.latency, self.waited = latency, 0.0
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(1, 30_000, tokens).astype(np.int32)
        self.logprobs = -rng.random(tokens, np.float32)
        self.client = self

    def telling(self, doing: str) -> Any:
        return nullcontext()

    def wait(self, pending: Any, doing: str) -> Any:
        started = time.perf_counter()
        result = pending.result()
        self.waited += time.perf_counter() - started
        return result

    def later(self, answer: Any) -> Future[Any]:
        future: Future[Any] = Future()
        timer = Timer(self.latency, future.set_result, [answer])
        timer.daemon = True
        timer.start()
        return future

    def now(self, answer: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(answer)
        return future

    def get_tokenizer(self) -> Any:
        return SimpleNamespace(eos_token_id=0)

    def save_weights_and_get_sampling_client(self) -> Future[Any]:
        return self.now(self)

    def sample(self, prompt: Any, n: int, params: Any) -> Future[Any]:
        one = SimpleNamespace(tokens_np=self.tokens, logprobs_np=self.logprobs, stop_reason="length")
        return self.later(SimpleNamespace(sequences=[one] * n))

    def forward_backward(self, data: Any, loss: str, config: Any) -> Future[Any]:
        self.encoded = sum(len(encode(part, loss, config)) for part in np.array_split(np.array(data, object), 8))
        found = [{"logprobs": TensorData.from_numpy(np.zeros(d.model_input.length, np.float32))} for d in data]
        return self.later(SimpleNamespace(loss_fn_outputs=found, metrics={}))

    def optim_step(self, params: Any) -> Future[Any]:
        return self.now(SimpleNamespace(metrics={}))


def encode(data: Any, loss: str, config: Any) -> bytes:
    """A request as the SDK writes it, protobuf and zstd; it sends parts of some megabytes."""
    inside = ForwardBackwardInput(data=list(data), loss_fn=loss, loss_fn_config=config)
    request = ForwardBackwardRequest(model_id="model", seq_id=1, forward_backward_input=inside)
    return ZstdCompressor().compress(forward_backward_request_to_proto(request).SerializeToString())


class Timed:
    """A real service, whose waits are added up."""

    def __init__(self, service: Any):
        self.service, self.waited = service, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.service, name)

    def wait(self, pending: Any, doing: str) -> Any:
        started = time.perf_counter()
        result = self.service.wait(pending, doing)
        self.waited += time.perf_counter() - started
        return result


def step(engine: TinkerEngine, prompts: int, group: int, tokens: int, recipe: str) -> None:
    """One step of training on made-up prompts and rewards."""
    rng = np.random.default_rng(1)
    asked = [rng.integers(32, 127, 24).tolist() for _ in range(prompts)]
    sampled = engine.sample(asked, group, Sampling(max_tokens=tokens))
    episodes = [
        Episode.from_completion(p, c, reward=float(i % 2), group=g)
        for g, (p, members) in enumerate(zip(asked, sampled, strict=True))
        for i, c in enumerate(members)
    ]
    how = algorithm(recipe)
    engine.update(how.credit(episodes, how.controller()), how.surrogate, 1e-5)


def measure(
    service: Any, engine: TinkerEngine, steps: int, shape: tuple[int, int, int], recipe: str
) -> dict[str, float]:
    """Medians over ``steps`` after one that does not count."""
    rows = []
    for _ in range(steps + 1):
        service.waited = 0.0
        started, worked = time.perf_counter(), time.process_time()
        step(engine, *shape, recipe)
        seconds = time.perf_counter() - started
        rows.append((seconds, seconds - service.waited, time.process_time() - worked))
    whole, own, cpu = (float(np.median(column)) for column in zip(*rows[1:], strict=True))
    return {"step_seconds": whole, "client_seconds": own, "cpu_seconds": cpu, "overhead": own / whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--latency", type=float, default=10.0, help="seconds, of sampling and of the update each")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--recipe", default="gtpo")
    parser.add_argument("--real", nargs=2, metavar=("URL", "MODEL"), help="a running server instead of the fake")
    parser.add_argument("--dry", action="store_true", help="append nothing to the results")
    asked = parser.parse_args()
    shape = (asked.prompts, asked.group, asked.tokens)
    service: Any
    if asked.real:
        engine = TinkerEngine.connect(asked.real[1], base_url=asked.real[0], rank=4, reduction="mean")
        service = engine.service = Timed(engine.service)  # type: ignore[assignment]
    else:
        service = Recorded(asked.tokens, asked.latency)
        engine = TinkerEngine(service, service, "model")
    found = measure(service, engine, asked.steps, shape, asked.recipe)
    row = {
        "benchmark": "tinker_overhead",
        "server": "real" if asked.real else "fake",
        "prompts": asked.prompts,
        "group": asked.group,
        "tokens": asked.tokens,
        "recipe": asked.recipe,
        "latency": None if asked.real else asked.latency,
        **found,
        **describe(),
    }
    print(json.dumps(row))
    if not asked.dry:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
