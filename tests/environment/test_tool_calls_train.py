"""A step of training in every grammar of tool calls: a tiny model calls tools as its template explains."""

import numpy as np
import pytest

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
from chat_tokenizers import CALLS, TOOL_SPECIAL, chat_tokenizer
from conftest import make_tiny_engine

from textpolicy.algorithms import algorithm
from textpolicy.engine import Sampling
from textpolicy.environment import ToolEnv
from textpolicy.loop.on_policy import OnPolicyCheck
from textpolicy.loop.train import Schedule, train
from textpolicy.types import Batch, Completion, Episode


def add(a: int, b: int) -> str:
    """Add two numbers."""
    return f"sum {a + b}"


def short(prompt, completion, example, messages, **_):
    """Shorter answers are better, after two calls."""
    assert [m["role"] for m in messages if m["role"] != "system"] == ["user", *["assistant", "tool"] * 2, "assistant"]
    assert [m["content"] for m in messages if m["role"] == "tool"] == ["sum 42"] * 2
    return 1 / (1 + len(completion))


class Calling:
    """A tiny model that writes ``turns`` first, with the log-probs that it gives them, and then its own."""

    def __init__(self, engine, *turns):
        self.engine, self.turns, self.stop, self.seen = engine, turns, engine.stop, []

    def sample(self, prompts, n, sampling, streams=None):
        self.seen.append([list(p) for p in prompts])
        if len(self.seen) > len(self.turns):
            return self.engine.sample(prompts, n, sampling, streams)
        tokens = np.array(self.turns[len(self.seen) - 1], np.int32)
        zeros = np.zeros(len(tokens), np.float32)
        out = []
        for prompt in prompts:
            episode = Episode.from_completion(prompt, Completion(tokens, zeros, zeros), reward=0.0, group=0)
            batch = Batch.pack([episode], [np.ones(len(episode.tokens))])
            logprobs = self.engine.score(batch)[batch.weights > 0]
            out.append([Completion(tokens, logprobs.astype(np.float32), zeros)] * n)
        return out

    def __getattr__(self, name):
        return getattr(self.engine, name)


def test_every_family_is_here():
    assert {*CALLS} == {*TOOL_SPECIAL}


@pytest.mark.parametrize("family", CALLS)
def test_a_step_trains_on_calls_as_the_template_explains_them(family):
    tokenizer = chat_tokenizer(family, tools=True)
    end = tokenizer.eos_token_id  # which ends a call in gpt-oss, and a turn elsewhere
    call = [*tokenizer.encode(CALLS[family], add_special_tokens=False), end]
    tiny = make_tiny_engine(len(tokenizer))
    tiny.stop = np.array([end, *range(20, 200)], np.int32)  # so that an untrained model comes to an end
    engine = Calling(tiny, call, call)
    env = ToolEnv(["40 and 2?"], [add], short, 400, tokenizer=tokenizer)
    rows, episodes = [], []
    train(
        engine,
        env,
        algorithm("grpo"),
        schedule=Schedule(1e-3, steps=1),
        prompts_per_step=1,
        group_size=4,
        sampling=Sampling(400, seed=3),
        check=OnPolicyCheck(every=1, completions=8, max_gap=1e-3),
        on_step=lambda step, row, collected: (rows.append(row), episodes.extend(collected)),
    )
    [row] = rows
    assert row["updated"]
    assert row["on_policy_gap_mean"] < 1e-4
    for episode in episodes:
        ids = episode.tokens.tolist()
        assert sum(ids[n : n + len(call)] == call for n in range(len(ids))) == 2  # as they were sampled
        turns = np.split(episode.mask, np.flatnonzero(np.diff(episode.mask.astype(int))) + 1)
        assert [len(turn) for turn in turns if turn.all()][:2] == [len(call)] * 2
    read = tokenizer.decode(engine.seen[2][0][len(engine.seen[1][0]) + len(call) :])
    assert "sum 42" in read
    assert "to=functions.add" not in read
