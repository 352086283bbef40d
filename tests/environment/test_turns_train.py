"""Two steps of training on the embedded model in every kind of environment with turns: tools, games."""

from dataclasses import replace

import numpy as np
import pytest

from textpolicy.algorithms import algorithm
from textpolicy.engine import Sampling
from textpolicy.environment import GymnasiumTextEnv, ToolEnv
from textpolicy.loop import Schedule, train
from textpolicy.on_policy import OnPolicyCheck


def trained(engine, env, max_tokens, **settings):
    """(row, episodes) of two steps; the on-policy check stops a run whose tokens are not those it scores."""
    steps = []
    train(
        engine,
        env,
        algorithm("grpo"),
        schedule=Schedule(1e-4, steps=2),
        prompts_per_step=2,
        group_size=4,
        sampling=Sampling(max_tokens=max_tokens, seed=1),
        check=OnPolicyCheck(every=1, completions=8, max_gap=1e-3),
        on_step=lambda step, row, episodes: steps.append((row, episodes)),
        **settings,
    )
    return steps


def spans(episode):
    """How many turns the policy had."""
    return int((np.diff(episode.mask.astype(int)) == 1).sum())


def calculate(expression: str) -> str:
    """Work out an expression."""
    return "7"


def first_number(text):
    """Everything is a call, so that an untrained model gets an answer and another turn."""
    from textpolicy.environment import ToolCall

    return [ToolCall("calculate", {"expression": text[:10]})] if "7" not in text else []


@pytest.mark.slow
def test_a_tool_environment_trains_on_policy(fresh_smollm_engine):
    engine, tokenizer = fresh_smollm_engine
    prompts = ["What is 3 + 4? Answer briefly.", "What is 2 + 5? Answer briefly."]
    env = ToolEnv(
        prompts,
        [calculate],
        lambda prompt, completion, example, **_: 1 / (1 + len(completion)),
        20,
        tokenizer=tokenizer,
        parse=first_number,
        max_turns=2,
    )
    steps = trained(engine, env, 20)
    assert [row["step"] for row, _ in steps] == [0, 1]
    assert all(row["on_policy_gap_mean"] < 1e-4 for row, _ in steps)
    assert all(row["updated"] for row, _ in steps)
    several = [e for _, episodes in steps for e in episodes if spans(e) > 1]
    assert several
    assert all(not e.mask[np.flatnonzero(e.mask)[0] :].all() for e in several)


@pytest.mark.slow
def test_a_game_of_gymnasium_trains_on_policy(fresh_smollm_engine):
    pytest.importorskip("gymnasium", reason="Gymnasium is an extra: pip install 'textpolicy[gymnasium]'")
    engine, tokenizer = fresh_smollm_engine
    env = GymnasiumTextEnv(
        "Blackjack-v1",
        4,
        tokenizer=tokenizer,
        instructions="We play blackjack. Answer 1 to take a card, 0 to stop.",
        describe=lambda o: f"You have {o[0]}, the dealer shows {o[1]}.",
        max_tokens=20,
        max_turns=3,
    )
    steps = trained(engine, env, 20)
    assert all(row["on_policy_gap_mean"] < 1e-4 for row, _ in steps)
    assert {e.reward for _, episodes in steps for e in episodes} <= {-1.0, 0.0, 1.0}
    assert any(spans(e) > 1 for _, episodes in steps for e in episodes)


def test_an_untrained_turn_mask_would_be_seen(tiny_engine):
    """The check that guards the runs above does refuse an episode whose tokens are not those that were sampled."""
    from textpolicy.environment import MultiTurnEnv, Reply
    from textpolicy.errors import UserError
    from textpolicy.on_policy import measure
    from textpolicy.rollout.collect import collect

    class Numbers:
        def encode(self, text):
            return [int(word) for word in text.split()]

        def decode(self, ids):
            return " ".join(map(str, ids))

    class Once:
        def __init__(self):
            self.left = 1

        def reply(self, text):
            self.left -= 1
            return Reply(({"role": "user", "content": "9 8 7 6"},)) if self.left >= 0 else Reply()

    tiny_engine.stop = np.arange(200, dtype=np.int32)
    env = MultiTurnEnv(["1 2"], lambda example: Once(), max_tokens=6, tokenizer=Numbers(), chat=False)
    episodes = [e for e in collect(tiny_engine, env, [0], 16, Sampling(6, seed=2)) if spans(e) > 1 and not e.truncated]
    assert measure(tiny_engine, episodes).maximum < 1e-4
    swapped = [replace(e, tokens=np.where(e.mask, e.tokens, 5).astype(np.int32)) for e in episodes]
    assert measure(tiny_engine, swapped).mean > 0.01
    with pytest.raises(UserError, match="not on-policy"):
        OnPolicyCheck(max_gap=1e-3)(tiny_engine, 0, swapped)
