"""Compare the completions of ``textpolicy serve`` with a rollout of our own engine, in turns: one JSON row.

    OPENBLAS_NUM_THREADS=1 .venv/bin/python benchmarks/tinker_sampling.py [--samples 64] [--tokens 24] [--repeats 3]

Server, client and engine are in this process, on the same weights: an adapter as a training client has it. One request
of ``asample`` asks for all completions of a prompt, the engine samples as many of the same; nothing ends before its
last token. A ratio is that of tokens per second, the server's to the engine's: by the wall, and by the processor time
of all threads, which other programs on the machine hardly change. It is taken over the quickest of the repeats.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

sys.path.append(str(Path(__file__).parents[1] / "tests/serve"))

from asking import Asking
from running_server import running

from textpolicy.engine import Sampling
from textpolicy.serve import messages
from textpolicy.serve.command import load

RESULTS = Path(__file__).parent / "results" / "tinker_sampling.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of it")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    prompt = np.random.default_rng(0).integers(100, 10_000, asked.prompt).tolist()
    with (
        tempfile.TemporaryDirectory() as folder,
        running(lambda: load([asked.model]), Path(folder) / "server") as server,
    ):
        ask = Asking(server.url)
        _, model = ask.model(asked.model, rank=32, seed=1)
        save = {"model_id": model, "seq_id": 1, "sampling_session_seq_id": 0}
        sampler = ask.result(ask("save_weights_for_sampler", save)[1]["request_id"])["sampling_session_id"]

        def served(seed: int) -> int:
            sent = {
                "sampling_session_id": sampler, "seq_id": seed, "num_samples": asked.samples,
                "prompt": {"chunks": [{"tokens": prompt}]},
                "sampling_params": {"max_tokens": asked.tokens, "seed": seed, "stop": []},
            }  # fmt: skip
            body = ask.result(ask("asample", sent)[1]["request_id"])
            return sum(
                len(one.tokens) // 4 for one in messages._messages()["SampleResponse"].FromString(body).sequences
            )

        def in_thread(work: Callable[[], Any]) -> Any:
            """Return what ``work`` returns in the thread that owns the models."""
            result: Future[Any] = Future()
            server.service.worker.post(lambda: result.set_result(work()))
            return result.result()

        def own() -> Any:
            from textpolicy.mlx.engine import MLXEngine

            weights: Any = server.service.decoders._weights_of(server.service.registry.samplers[sampler])
            return MLXEngine(weights.model, stop=[])

        engine = in_thread(own)

        def rolled_out(seed: int) -> int:
            sampling = Sampling(asked.tokens, seed=seed)
            return sum(len(c.tokens) for c in in_thread(lambda: engine.sample([prompt], asked.samples, sampling))[0])

        ways = {"server": served, "engine": rolled_out}
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for seed in range(asked.repeats + 1):  # the first of each is not counted
            for name, way in ways.items():
                wall, cpu = time.perf_counter(), time.process_time()
                assert way(seed) == asked.samples * asked.tokens
                took = time.perf_counter() - wall, time.process_time() - cpu
                print(f"{name}: {took[0]:.1f} s, {took[1]:.1f} s of processor time", flush=True)
                if seed:
                    seconds[name].append(took)
    best = {name: np.min(took, axis=0) for name, took in seconds.items()}
    row = {
        "benchmark": "tinker_sampling", **vars(asked),
        "seconds": {name: [wall for wall, _ in took] for name, took in seconds.items()},
        "cpu_seconds": {name: [cpu for _, cpu in took] for name, took in seconds.items()},
        "tokens_per_second": {name: asked.samples * asked.tokens / float(wall) for name, (wall, _) in best.items()},
        "ratio_by_wall": float(best["engine"][0] / best["server"][0]),
        "ratio_by_cpu": float(best["engine"][1] / best["server"][1]),
        **describe(),
    }  # fmt: skip
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(f"tokens/s, server over engine: {row['ratio_by_wall']:.2f} by wall, {row['ratio_by_cpu']:.2f} by CPU")


if __name__ == "__main__":
    main()
