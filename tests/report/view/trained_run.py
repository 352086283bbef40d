"""A run that is trained: a tiny random model learns to say seven, through ``run.Run`` as every run goes."""

from __future__ import annotations

import time

import pytest
from conftest import make_tiny_engine

from textpolicy.config.settings import Config
from textpolicy.loop.evaluation import evaluate
from textpolicy.run import assembly
from textpolicy.run.training_run import Run
from textpolicy.tasks.base import Problem, Task

STEPS, PROMPTS, SAMPLES = 12, 4, 8
ASKED = ["1 2", "3", "4 5 6", "2 2", "9 1", "5"]


class Numbers:
    """A tokenizer whose text is the ids themselves."""

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(str(i) for i in ids)


def says_seven(prompt, completion, example):
    words = completion.split()
    share = words.count("7") / max(len(words), 1)
    return {"reward": share, "is_correct": share >= 0.5}


def train_run(folder, name="gtpo", seed=1):
    """The folder of a finished run."""
    config = Config(
        seed=seed,
        steps=STEPS,
        quiet=True,
        algorithm={"name": name},
        optimizer={"learning_rate": 0.05},
        rollout={"prompts_per_step": PROMPTS, "group_size": SAMPLES, "max_tokens": 6},
        evaluation={"every": 4},
        on_policy={"every": 4},
    )
    problems = tuple(Problem(prompt, "7") for prompt in ASKED)
    task = Task("seven", "say seven", problems, problems, problems, str, says_seven)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "build_engine", lambda *_: (make_tiny_engine(vocabulary=16), Numbers()))
        parts = assembly.assemble(config, task)
    before = evaluate(parts.engine, parts.splits["test"], parts.greedy)
    folder.mkdir()
    assembly.write_setup(folder, parts)
    return Run(parts, folder).begin(before, time.perf_counter(), None)
