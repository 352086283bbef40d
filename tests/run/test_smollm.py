"""The built-in model, end to end: greedy text as recorded, and decode against teacher forcing."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from textpolicy.engine import Sampling
from textpolicy.environment.single_turn import TextGenerationEnv
from textpolicy.mlx.engine import MLXEngine

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "smollm2_greedy.json").read_text())["continuations"]


@pytest.fixture(scope="module")
def engine(smollm):
    model, tokenizer = smollm
    return MLXEngine(model, stop=tokenizer.eos_token_ids)


@pytest.fixture(scope="module")
def env(smollm):
    questions = [r["question"] for r in RECORDED]
    return TextGenerationEnv(questions, lambda prompt, completion, example: 0.0, tokenizer=smollm[1])


def test_greedy_text_matches_the_text_of_mlx_lm(engine, env):
    completions = engine.sample([env.prompt_ids(i).tolist() for i in range(len(env))], 1, Sampling(16, temperature=0.0))
    assert len(completions) == 10
    for [ours], recorded in zip(completions, RECORDED, strict=True):
        assert ours.tokens.tolist() == recorded["tokens"], recorded["question"]


def test_logprobs_of_a_decoded_group_equal_teacher_forcing(engine, env):
    prompts = [env.prompt_ids(i).tolist() for i in range(3)]
    for prompt, members in zip(prompts, engine.sample(prompts, 3, Sampling(8, temperature=0.8, seed=1)), strict=True):
        for c in members:
            logits = engine.model(mx.array([[*prompt, *c.tokens.tolist()]]))[0, len(prompt) - 1 : -1] / 0.8
            exact = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
            np.testing.assert_allclose(c.logprobs, exact[np.arange(len(c.tokens)), c.tokens], atol=2e-4)
