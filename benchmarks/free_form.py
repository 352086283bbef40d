"""Measure the untrained model, asked as in training and freely: one JSON row per task.

    .venv/bin/python benchmarks/free_form.py

The demo judges bare numbers, after two worked examples. Here the same test problems are also asked plainly
and graded leniently (the last number of up to 48 tokens is right), so that a gain in form is not taken for
one in skill.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from machine import describe

from textpolicy.config.settings import Config
from textpolicy.engine import Sampling
from textpolicy.environment.single_turn import TextGenerationEnv
from textpolicy.loop.evaluation import evaluate
from textpolicy.run.assembly import build_engine, environment
from textpolicy.tasks import TASKS, load_task

RESULTS = Path(__file__).parent / "results" / "free_form.jsonl"


def last_number_right(prompt: str, completion: str, example: dict, **kwargs: object) -> dict:
    numbers = "".join(c if c.isascii() and c.isdigit() else " " for c in completion).split()
    right = bool(numbers) and numbers[-1] == example["answer"]
    return {"reward": float(right), "is_correct": right}


def main() -> None:
    config = Config()
    engine, tokenizer = build_engine(config)
    for name in TASKS:
        task = load_task(name)
        questions = [p.question for p in task.test]
        examples = [{"answer": p.answer} for p in task.test]
        env = TextGenerationEnv(questions, last_number_right, max_tokens=48, tokenizer=tokenizer, examples=examples)
        result = evaluate(engine, env, Sampling(48, temperature=0.0))
        as_trained = evaluate(
            engine,
            environment(task, task.test, tokenizer, config),
            Sampling(config.rollout.max_tokens, temperature=0.0),
        )
        row = {
            "benchmark": "free_form",
            "task": name,
            "free_form": result.accuracy.value,
            "free_form_interval": result.accuracy.interval,
            "bare_number": as_trained.accuracy.value,
            "bare_number_interval": as_trained.accuracy.interval,
            "problems": result.accuracy.total,
            "sample": [[e.prompt, e.text] for e in result.episodes[:3]],
            **describe(),
        }
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(name, "free form", result.accuracy, "bare number", as_trained.accuracy, row["sample"])


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
