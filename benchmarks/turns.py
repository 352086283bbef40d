"""Compare rollouts of several turns that keep what earlier turns have read with those that read it again.

    .venv/bin/python benchmarks/turns.py [--model smollm2-135m] [--turns 6] [--prompt-tokens 500] [--before CHECKOUT]

Both play the same tool episodes in one run, by turns: every turn calls a calculator, after a prompt of a few hundred
tokens. Each process samples a turn first that does not count. Completions must be the same; those that differ, by
rounding, are counted. With a checkout of an earlier commit its rollouts are measured, too, each in a process of its own
between the others. A row is appended to benchmarks/results/turns.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from machine import describe

import textpolicy as tp  # before mlx: it gives MLX a fast BLAS

# isort: split
from textpolicy.engine import Sampling
from textpolicy.environment.multi_turn import ToolEnv
from textpolicy.environment.text.calls import ToolCall
from textpolicy.loop.collect import collect
from textpolicy.mlx.engine import MLXEngine


def calculate(expression: str) -> str:
    """Return the value of an arithmetic expression."""
    return f"{expression} is a sum of {len(expression)} characters"


class ReadingAgain:
    """The engine that keeps nothing, so that every turn is read from the beginning."""

    def __init__(self, engine: MLXEngine):
        self.engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def keep_turns(self) -> AbstractContextManager[None]:
        return nullcontext()


def main(before: Path | None, only: int | None, **sizes: Any) -> None:
    engine, env, sampling = made(**sizes)
    prompts, group, times = range(sizes["prompts"]), sizes["group"], sizes["times"]

    def played(playing: Any, seed: int) -> tuple[float, list[list[int]]]:
        start = time.perf_counter()
        episodes = collect(playing, env, prompts, group, Sampling(sampling, seed=seed))
        return time.perf_counter() - start, [e.tokens.tolist() for e in episodes]

    engine.sample([env.prompt_ids(i).tolist() for i in prompts], group, Sampling(sampling, seed=times))  # to warm up
    if only is not None:
        print(json.dumps(played(ReadingAgain(engine), only)))
        return
    seconds: dict[str, list[float]] = {"kept": [], "again": []} | ({"before": []} if before else {})
    differing, lengths = dict.fromkeys([*seconds][1:], 0), []
    for seed in range(times):
        said = {}
        for how in seconds:
            if how == "before":
                took, said[how] = earlier(before, seed, sizes)
            else:
                took, said[how] = played(engine if how == "kept" else ReadingAgain(engine), seed)
            seconds[how].append(took)
        lengths += [len(tokens) for tokens in said["kept"]]
        for how in differing:
            differing[how] += sum(a != b for a, b in zip(said["kept"], said[how], strict=True))
    row = {
        "benchmark": "turns", "model": sizes["model"], "prompt_tokens": len(env.prompt_ids(0)), "turns": sizes["turns"],
        "max_tokens": sampling, "episodes": len(lengths), "tokens_per_episode": round(sum(lengths) / len(lengths)),
        "differing": differing, **{f"{how}_s": [round(s, 2) for s in found] for how, found in seconds.items()},
        **{f"of_{how}": round(sum(seconds["kept"]) / sum(seconds[how]), 3) for how in differing}, **describe(),
    }  # fmt: skip
    print(json.dumps(row))
    with (Path(__file__).parent / "results" / "turns.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def made(model: str, prompt_tokens: int, turns: int, max_tokens: int, prompts: int, **_: int) -> tuple[Any, Any, int]:
    """The engine, the environment, and the tokens of a turn at most."""
    loaded, tokenizer = tp.load_model(model)
    words = tokenizer.vocab_size
    engine = MLXEngine(loaded, stop=[*tokenizer.eos_token_ids, *range(10, words, 23)])  # a turn has about 23 tokens
    filler = "You may ask the calculator as often as you like before you answer. " * (prompt_tokens // 15)
    env = ToolEnv(
        [f"{filler}Reach {n} with 3, 5 and 7." for n in range(prompts)],
        [calculate],
        lambda prompt, completion, example, **_: 0.0,
        max_tokens,
        tokenizer=tokenizer,
        parse=lambda text: [ToolCall("calculate", {"expression": text[:12]})],
        describe=lambda schemas: "",
        max_turns=turns,
    )
    return engine, env, max_tokens


def earlier(checkout: Path | None, seed: int, sizes: dict[str, Any]) -> tuple[float, list[list[int]]]:
    """The seconds and the tokens of the same episodes with the package of ``checkout``."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    path = f"{Path(checkout or '.').resolve()}:{Path(__file__).parent}"
    command = [sys.executable, "-P", __file__, f"--only={seed}", *flags]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True
    )
    took, said = json.loads(done.stdout.strip().splitlines()[-1])
    return took, said


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--before", type=Path, help="a checkout of an earlier commit")
    parser.add_argument("--only", type=int, help="read again with this seed, and print seconds and tokens")
    sizes = {"prompt_tokens": 500, "turns": 6, "max_tokens": 48, "prompts": 2, "group": 4, "times": 2}
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    main(**vars(parser.parse_args()))
