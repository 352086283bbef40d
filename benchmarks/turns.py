"""Compare rollouts of several turns that keep what earlier turns have read with those that read it again.

    .venv/bin/python benchmarks/turns.py [--model smollm2-135m] [--turns 6] [--prompt-tokens 500]

Both play the same tool episodes in one run, by turns: every turn calls a calculator, after a prompt of a few hundred
tokens. Completions must be the same; those that differ, by rounding, are counted. A row is appended to
benchmarks/results/turns.jsonl.
"""

from __future__ import annotations

import argparse
import json
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


def main(model: str, prompt_tokens: int, turns: int, max_tokens: int, prompts: int, group: int, times: int) -> None:
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
    seconds: dict[str, list[float]] = {"kept": [], "again": []}
    flips, played = 0, []
    for seed in range(times):
        said = []
        for how in seconds:
            playing: Any = engine if how == "kept" else ReadingAgain(engine)
            start = time.perf_counter()
            episodes = collect(playing, env, range(prompts), group, Sampling(max_tokens, seed=seed))
            seconds[how].append(time.perf_counter() - start)
            said.append([e.tokens.tolist() for e in episodes])
        flips += sum(a != b for a, b in zip(*said, strict=True))
        played += [len(tokens) for tokens in said[0]]
    row = {
        "benchmark": "turns", "model": model, "prompt_tokens": len(env.prompt_ids(0)), "turns": turns,
        "max_tokens": max_tokens, "episodes": len(played), "tokens_per_episode": round(sum(played) / len(played)),
        "differing": flips, **{f"{how}_s": [round(s, 2) for s in found] for how, found in seconds.items()},
        "ratio": round(min(seconds["kept"]) / min(seconds["again"]), 3), **describe(),
    }  # fmt: skip
    print(json.dumps(row))
    with (Path(__file__).parent / "results" / "turns.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    sizes = {"prompt_tokens": 500, "turns": 6, "max_tokens": 48, "prompts": 2, "group": 4, "times": 2}
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    main(**vars(parser.parse_args()))
