"""Two steps of training on the embedded model in every kind of environment with turns: tools, games."""

from dataclasses import replace

import numpy as np
import pytest

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx
import mlx.optimizers as optim
from toy_tokenizers import Numbers
from two_steps import two_steps

from textpolicy.algorithms import grpo
from textpolicy.engine import Sampling
from textpolicy.environment import GymnasiumTextEnv, MultiTurnEnv, Reply, ToolEnv
from textpolicy.errors import UserError
from textpolicy.generation.mlx_generation import Policy
from textpolicy.loop.collect import collect
from textpolicy.loop.on_policy import OnPolicyCheck, measure
from textpolicy.rollout import RolloutRunner, create_strategy
from textpolicy.training.trainer import Trainer


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


def with_a_tool(tokenizer):
    return ToolEnv(
        ["What is 3 + 4? Answer briefly.", "What is 2 + 5? Answer briefly."],
        [calculate],
        lambda prompt, completion, example, **_: 1 / (1 + len(completion)),
        20,
        tokenizer=tokenizer,
        parse=first_number,
        max_turns=2,
    )


@pytest.mark.slow
def test_a_tool_environment_trains_on_policy(fresh_smollm_engine):
    engine, tokenizer = fresh_smollm_engine
    steps = two_steps(engine, with_a_tool(tokenizer), 20, group_size=2)
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
        instructions="We play blackjack. Answer yes.",  # which this model does briefly
        describe=lambda o: f"You have {o[0]}, the dealer shows {o[1]}.",
        read_action=lambda text: 1,
        max_tokens=20,
        max_turns=3,
    )
    steps = two_steps(engine, env, 20, group_size=2)
    assert {e.reward for _, episodes in steps for e in episodes} <= {-1.0, 0.0, 1.0}
    assert any(spans(e) > 1 for _, episodes in steps for e in episodes)


class Once:
    """Answers one turn, and is pleased by short ones."""

    def __init__(self):
        self.left = 1

    def reply(self, text):
        self.left -= 1
        answer = ({"role": "user", "content": "9 8 7 6"},) if self.left >= 0 else ()
        return Reply(answer, reward=1 / (1 + len(text)))


def of_two_turns(engine, **settings):
    """An environment for ``engine``, two thirds of whose vocabulary now end a turn."""
    engine.stop = np.arange(200, dtype=np.int32)
    return MultiTurnEnv(["1 2"], lambda example: Once(), max_tokens=6, tokenizer=Numbers(), chat=False, **settings)


def test_an_untrained_turn_mask_would_be_seen(tiny_engine):
    """The check that guards the runs above does refuse an episode whose tokens are not those that were sampled."""
    collected = collect(tiny_engine, of_two_turns(tiny_engine), [0], 16, Sampling(6, seed=2))
    episodes = [e for e in collected if spans(e) > 1 and not e.truncated]
    assert measure(tiny_engine, episodes).maximum < 1e-4
    swapped = [replace(e, tokens=np.where(e.mask, e.tokens, 5).astype(np.int32)) for e in episodes]
    assert measure(tiny_engine, swapped).mean > 0.01
    with pytest.raises(UserError, match="not on-policy"):
        OnPolicyCheck(max_gap=1e-3)(tiny_engine, 0, swapped)


def test_a_trainer_scores_buffered_turns_as_they_were_sampled(tiny_engine):
    """A step sees one log-prob of each token, whether sampled turn by turn or read at once."""
    seen = []

    def loss(old, new, advantages):
        seen.append(float(np.abs(np.array(mx.stop_gradient(new - old))).max()))
        return grpo.policy_loss(old, new, advantages)

    policy = Policy(tiny_engine, Sampling(6, seed=1))
    env = of_two_turns(tiny_engine, group_size=8)
    runner = RolloutRunner(env, policy, create_strategy("grpo"), max_steps=16)
    trainer = Trainer(tiny_engine.model, grpo.compute_advantages, loss, optim.Adam(1e-2))
    for step in range(2):
        buffer = runner.collect(max_episodes=8)
        assert max(len(e) for e in buffer.episodes) == 2
        assert [e.group for e in buffer.episodes] == [step] * 8
        assert trainer.train(buffer)["grad_norm"] > 0
    assert max(seen) < 1e-4
