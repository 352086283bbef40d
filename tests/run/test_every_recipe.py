"""Every recipe of the table trains a small model: two steps, each of which moves the adapters."""

import zlib

import numpy as np
import pytest

from textpolicy.algorithms import ALGORITHMS
from textpolicy.config.recipe import configure
from textpolicy.config.settings import Config
from textpolicy.engine import Sampling
from textpolicy.environment.single_turn import TextGenerationEnv
from textpolicy.loop.train import Schedule, train
from textpolicy.tasks import load_task

STEPS = 2  # in the first, LoRA's A stays, because its B is 0
PROMPTS, GROUP, TOKENS = 2, 3, 2  # in a step; small, because every recipe trains
SETTINGS = {"adapter": {"rank": 2}, "rollout": {"max_tokens": TOKENS}, "machine": {"threads": 1}}


def of_its_own(prompt, completion, example):
    """From 0 to 1, another for every text: so small a batch must not agree by chance."""
    return zlib.crc32(completion.encode()) / 2**32


@pytest.fixture(scope="module")
def built(small_model):
    """The engine of a run, its environment, and the adapters it starts with; tests put those back."""
    from textpolicy.run.assembly import build_engine

    engine, tokenizer = build_engine(Config.model_validate({**SETTINGS, "model": str(small_model)}))
    questions = [p.question for p in load_task("largest").train[:40]]  # bare: worked examples take time to read
    env = TextGenerationEnv(questions, of_its_own, TOKENS, tokenizer=tokenizer, chat=False)
    return engine, env, engine.weights()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_recipe_moves_the_adapters_in_every_step(built, name):
    from textpolicy.mlx.engine import MLXEngine

    first, env, start = built
    first.restore(start)
    engine = MLXEngine(first.model, stop=first.stop.tolist())  # with an optimiser of its own
    states, rows = [{key: np.array(value) for key, value in start.items()}], []

    def on_step(step, row, episodes):
        rows.append(row)
        states.append({key: np.array(value) for key, value in engine.weights().items()})

    train(
        engine,
        env,
        configure(Config.model_validate({**SETTINGS, "algorithm": {"name": name}})),
        schedule=Schedule(1e-3, STEPS),
        prompts_per_step=PROMPTS,
        group_size=GROUP,
        sampling=Sampling(TOKENS, seed=1),
        on_step=on_step,
    )
    assert len(rows) == STEPS
    for row, before, after in zip(rows, states, states[1:], strict=False):
        assert row["updated"] == 1
        assert 0 < row["grad_norm"] < np.inf
        assert np.isfinite(row["loss"])
        assert row["logprob_gap_max"] < 1e-3
        assert any(not np.array_equal(before[key], after[key]) for key in before)
    assert all(not np.array_equal(states[0][key], states[-1][key]) for key in start)
