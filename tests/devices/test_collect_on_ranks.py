"""Rollouts on ranks: the episodes of one process, of several turns, too, and of environments that play themselves."""

from contextlib import nullcontext

import numpy as np
import pytest
from chat_tokenizers import chat_tokenizer
from test_team import in_haste, together  # noqa: F401 (a fixture)

from textpolicy.devices.team import ALONE
from textpolicy.engine import Sampling, sample_from
from textpolicy.environment import DrivenEnv, MultiTurnEnv, Reply
from textpolicy.errors import RankError, UserError
from textpolicy.loop.collect import collect
from textpolicy.loop.evaluation import evaluate
from textpolicy.run.ranks import together as as_one
from textpolicy.types import Completion, Episode

TOKENIZER = chat_tokenizer("chatml")
LETTERS = [TOKENIZER.convert_tokens_to_ids(letter) for letter in "abcdefgh"]


class Streams:
    """A local engine whose completions are drawn from (seed, stream) and the prompt's length."""

    stop = np.array([TOKENIZER.eos_token_id])
    score = update = save = staticmethod(lambda *_: pytest.fail("rollouts do not call it"))

    def __init__(self, team=ALONE):
        self.team, self.sampled = team, 0

    def keep_turns(self):
        return nullcontext()

    def sample(self, prompts, n, sampling, streams=None):
        streams = range(len(prompts) * n) if streams is None else streams
        drawn = [self._drawn(sampling.seed, stream, len(prompts[i // n])) for i, stream in enumerate(streams)]
        self.sampled += len(drawn)
        return [drawn[i * n : (i + 1) * n] for i in range(len(prompts))]

    def _drawn(self, seed, stream, length):
        draw = np.random.default_rng([seed, stream, length])
        tokens = [*draw.choice(LETTERS, draw.integers(1, 6)), TOKENIZER.eos_token_id]
        return Completion(np.array(tokens, np.int32), draw.normal(-2, 1, len(tokens)).astype(np.float32))


class Host:
    """Answers as often as the example says, then pays for the letters of the last turn."""

    def __init__(self, turns):
        self.left = turns

    def reply(self, text):
        self.left -= 1
        if self.left < 0:
            return Reply(reward=float(sum(map(ord, text)) % 7), is_correct=len(text) > 3)
        return Reply(({"role": "user", "content": f"the {self.left}"},))


def talks():
    examples = [{"turns": n % 4} for n in range(7)]
    prompts = [f"the user {'he ' * n}" for n in range(7)]
    return MultiTurnEnv(
        prompts, lambda example: Host(example["turns"]), max_tokens=8, tokenizer=TOKENIZER, examples=examples
    )


class Plays(DrivenEnv):
    """Plays two turns with the engine it is given, and numbers its groups as it is told."""

    def __len__(self):
        return 7

    def play(self, engine, wanted):
        prompts = [LETTERS[: 1 + i] for i in wanted.prompts for _ in range(wanted.group_size)]
        first = sample_from(engine, prompts, 1, wanted.sampling, wanted.streams)
        groups = [group for group in wanted.numbers for _ in range(wanted.group_size)]
        return [
            Episode.from_completion(prompt, said, reward=float(said.tokens.sum() % 5), group=group, is_correct=True)
            for prompt, [said], group in zip(prompts, first, groups, strict=True)
        ]


def told(episodes):
    return [
        (e.group, e.prompt_index, e.tokens.tolist(), e.logprobs.tolist(), e.mask.tolist(), e.reward, e.text, e.pieces)
        for e in episodes
    ]


@pytest.mark.parametrize("env", [talks(), Plays()], ids=["turns", "driven"])
@pytest.mark.parametrize(("size", "devices"), [(2, None), (3, None), (3, ["fast", "slow", "slow"]), (5, None)])
def test_ranks_play_the_episodes_of_one_process(env, size, devices):
    drawn = [2, 0, 6, 2, 5, 1]  # one twice: two groups
    alone = told(collect(Streams(), env, drawn, 3, Sampling(8, seed=5), first_group=12))
    assert [group for group, *_ in alone] == [12 + n for n in range(6) for _ in range(3)]

    def work(team):
        engine = Streams(team)
        found = told(collect(engine, env, drawn, 3, Sampling(8, seed=5), first_group=12))
        return found, engine.sampled

    ranks = together(work, size, devices)
    assert [found for found, _ in ranks] == [alone] * size
    sampled = [count for _, count in ranks]
    assert sum(sampled) == work(ALONE)[1]  # each is sampled once
    assert size > 3 or min(sampled) > 0


def test_an_evaluation_is_dealt_too():
    expected = told(evaluate(Streams(), talks(), Sampling(8, seed=1), 2).episodes)
    found = together(lambda team: told(evaluate(Streams(team), talks(), Sampling(8, seed=1), 2).episodes), 3)
    assert found == [expected] * 3


@pytest.mark.parametrize("name", ["mlx-lm", "base:tokenizer", "questions"])
def test_a_rank_with_another_version_model_or_task_ends_the_run_before_its_first_step(name):
    class Parts:
        def __init__(self, rank):
            self.versions = {name: f"digest {rank}", "device": f"gpu {rank}", "python": f"3.1{rank}"}
            self.engine = Streams()
            self.engine.digest = lambda: 0

    first, second = together(lambda team: as_one(Parts(team.rank), team))
    for error in (first, second):  # its own, or that another rank has ended with it
        assert isinstance(error, UserError | RankError)
    assert f"rank 1 on host1 has {name} digest 1 and rank 0 on host0 digest 0; give all ranks the same" in str(first)
