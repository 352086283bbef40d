"""A run that is trained: a tiny random model learns to say seven, through ``run.Run`` as every run goes."""

from __future__ import annotations

import time

from conftest import make_tiny_engine

from textpolicy.config.recipe import configure
from textpolicy.config.settings import Config
from textpolicy.environment.single_turn import TextGenerationEnv
from textpolicy.loop.evaluation import evaluate
from textpolicy.run.assembly import greedy, write_setup
from textpolicy.run.training_run import Run

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
    engine = make_tiny_engine(vocabulary=16)
    env = TextGenerationEnv(ASKED, says_seven, max_tokens=6, tokenizer=Numbers())
    splits = {"train": env, "validation": env, "test": env}
    before = evaluate(engine, env, greedy(config))
    folder.mkdir()
    write_setup(folder, config, engine)
    return Run(config, folder, engine, splits, configure(config)).begin(before, time.perf_counter(), None)
