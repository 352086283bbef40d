"""Episodes of several turns: the engine's tokens, on every template, within every limit."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from chat_tokenizers import SPECIAL, ScriptedEngine, chat_tokenizer
from toy_tokenizers import Letters, Numbers

from textpolicy.engine import Sampling
from textpolicy.environment import MultiTurnEnv, Reply
from textpolicy.environment.text.conversation import Conversation
from textpolicy.errors import UserError
from textpolicy.loop.collect import collect
from textpolicy.rollout import RolloutRunner, create_strategy
from textpolicy.types import Batch

FAMILIES = sorted(SPECIAL)


@dataclass
class Host:
    """Answers with the lines it was given, then ends the episode."""

    lines: tuple = ("hello user", "the 124")
    heard: list = field(default_factory=list)

    def reply(self, text):
        self.heard.append(text)
        if len(self.heard) > len(self.lines):
            return Reply(reward=1.0, is_correct=True)
        return Reply(({"role": "user", "content": self.lines[len(self.heard) - 1]},), reward=0.25)


def make(tokenizer, lines=Host.lines, **settings):
    return MultiTurnEnv(["the user"], lambda example: Host(lines), max_tokens=40, tokenizer=tokenizer, **settings)


def spelled(tokenizer, text):
    """``text`` as the ids of its letters: not what the tokenizer would make of it."""
    return [tokenizer.convert_tokens_to_ids(letter) for letter in text]


def turns_of(tokenizer, *texts):
    """Turns that end with the stop token, spelled letter by letter."""
    return [([*spelled(tokenizer, text), tokenizer.eos_token_id], True) for text in texts]


def play(env, engine, **sampling):
    return collect(engine, env, [0], 1, Sampling(**{"max_tokens": 40, **sampling}))[0]


class Says:
    """A policy that samples the given turns, (tokens, stopped) each, and records every observation."""

    def __init__(self, turns):
        self.turns, self.seen = turns, []

    def __call__(self, obs, deterministic=False):
        tokens, stopped = self.turns[len(self.seen)]
        self.seen.append(np.asarray(obs).tolist())
        return tokens, {"logprob": np.zeros(len(tokens), np.float32), "truncated": not stopped}


def disagreements(episode, engine):
    """Calls of the engine that did not see exactly the episode's tokens up to the turn that they sampled."""
    starts = np.flatnonzero(episode.mask & ~np.append(False, episode.mask[:-1]))
    assert len(starts) == len(engine.seen)
    return [n for n, start in enumerate(starts) if engine.seen[n] != episode.tokens[:start].tolist()]


# ---- token for token


@pytest.mark.parametrize("family", FAMILIES)
def test_an_episode_is_the_engines_input_and_output_token_for_token(family):
    tokenizer = chat_tokenizer(family)
    engine = ScriptedEngine(*turns_of(tokenizer, "hello", "answer", "the"))
    episode = play(make(tokenizer), engine)
    assert disagreements(episode, engine) == []
    output = [tokens for tokens, _ in engine.turns]
    assert episode.tokens[episode.mask].tolist() == [t for tokens in output for t in tokens]
    assert episode.tokens.tolist() == [*engine.seen[-1], *output[-1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_a_turn_and_encoding_it_again_would_be_seen(family, monkeypatch):
    tokenizer = chat_tokenizer(family)

    def recoded(self):
        out = list(self.prompt)
        for n, turn in enumerate(self.turns):
            added = self.added[n] if n < len(self.added) else []
            out += tokenizer.encode(tokenizer.decode(turn), add_special_tokens=False) + added
        return out

    monkeypatch.setattr(Conversation, "tokens", property(recoded))
    engine = ScriptedEngine(*turns_of(tokenizer, "hello", "answer", "the"))
    assert disagreements(play(make(tokenizer), engine), engine) == [1, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_in_the_tokenizers_own_spelling_give_the_template_of_the_whole_conversation(family):
    tokenizer = chat_tokenizer(family)
    texts = ["hello", "answer", "the"]
    output = [([*tokenizer.encode(t, add_special_tokens=False), tokenizer.eos_token_id], True) for t in texts]
    episode = play(make(tokenizer), ScriptedEngine(*output))
    replies = ["hello user", "the 124"]
    messages = [{"role": "user", "content": "the user"}]
    for text, reply in zip(texts, [*replies, None], strict=True):
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": reply}]
    whole = tokenizer.apply_chat_template(messages[:-1], tokenize=True, return_dict=False)
    assert episode.tokens.tolist() == whole[: len(episode.tokens)]
    assert tokenizer.decode(whole[len(episode.tokens) :]).strip() == ""  # the line break behind the last turn


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stop_token_is_there_once_whoever_wrote_it(family):
    tokenizer = chat_tokenizer(family)
    end = tokenizer.eos_token_id
    stopped = play(make(tokenizer), ScriptedEngine(*turns_of(tokenizer, "he", "he", "he")))
    first = spelled(tokenizer, "he")
    episode = stopped.tokens.tolist()
    at = next(i for i in range(len(episode)) if episode[i : i + 2] == first)
    assert episode[at + 2] == end
    assert episode[at + 3] != end
    assert stopped.mask[at + 2]
    assert not stopped.mask[at + 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_turn_that_another_stop_token_ended_is_closed_by_the_environment(family):
    """The policy may stop in a way that the template does not write; its turn stays as it is."""
    tokenizer = chat_tokenizer(family)
    odd = tokenizer.convert_tokens_to_ids(SPECIAL[family][0])
    turns = [([*spelled(tokenizer, "he"), odd], True), *turns_of(tokenizer, "he", "he")]
    engine = ScriptedEngine(*turns)
    episode = play(make(tokenizer), engine)
    assert disagreements(episode, engine) == []
    prompt = len(engine.seen[0])
    assert episode.tokens[prompt : prompt + 4].tolist() == [*spelled(tokenizer, "he"), odd, tokenizer.eos_token_id]
    assert episode.mask[prompt : prompt + 4].tolist() == [True, True, True, False]


def test_the_embedded_model_continues_its_own_template_token_for_token(smollm):
    tokenizer = smollm[1]
    turns = [([*tokenizer.encode("Hello there"), 2], True), ([*tokenizer.encode("42"), 2], True)]
    engine = ScriptedEngine(*turns)
    env = make(tokenizer, ("And 6 * 7?",))
    episode = play(env, engine)
    assert disagreements(episode, engine) == []
    messages = [
        {"role": "user", "content": "the user"},
        {"role": "assistant", "content": "Hello there"},
        {"role": "user", "content": "And 6 * 7?"},
        {"role": "assistant", "content": "42"},
    ]
    assert [*episode.tokens, 198] == tokenizer.apply_chat_template(messages, add_generation_prompt=False, tokenize=True)


def test_a_tokenizer_without_a_template_gets_the_replies_as_they_are():
    engine = ScriptedEngine(([104], True), ([105], True))
    episode = play(make(Letters(), ("ok",)), engine)
    assert "".join(map(chr, episode.tokens)) == "the user" + "h" + "ok" + "i"


def test_a_template_that_drops_the_assistants_words_is_refused():
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    engine = ScriptedEngine(*turns_of(tokenizer, "he"))
    with pytest.raises(UserError, match="changes or leaves out the assistant's messages"):
        play(make(tokenizer), engine)


# ---- masks, credit and scores


def test_only_tokens_of_the_policy_have_weight_log_probs_and_pieces():
    tokenizer = chat_tokenizer("chatml")
    engine = ScriptedEngine(*turns_of(tokenizer, "hello", "answer", "the"))
    episode = play(make(tokenizer), engine)
    output = np.concatenate([-np.arange(1, len(t) + 1) for t, _ in engine.turns])
    np.testing.assert_array_equal(episode.logprobs[episode.mask], output)
    np.testing.assert_array_equal(episode.entropy[episode.mask], -output)
    assert not episode.logprobs[~episode.mask].any()
    assert episode.pieces == (*"hello", "", *"answer", "", *"the", "")
    batch = Batch.pack([episode], [np.ones(len(episode.tokens), np.float32)])
    assert (batch.weights[0] != 0).tolist() == episode.mask[1:].tolist()
    assert batch.weights.sum() == pytest.approx(1.0)


def test_a_tokens_log_prob_in_a_later_turn_is_that_of_all_before_it(tiny_engine):
    """Teacher forcing over the whole row gives what was sampled turn by turn, replies in between."""

    env = MultiTurnEnv(
        ["1 2", "3 4 5"],
        lambda example: Host(("7 8 9", "10")),
        max_tokens=4,
        tokenizer=Numbers(),
        chat=False,
    )
    tiny_engine.stop = np.arange(150, dtype=np.int32)  # half of the vocabulary, so that turns end
    episodes = collect(tiny_engine, env, [0, 1], 8, Sampling(4, seed=3))
    several = [e for e in episodes if len(np.flatnonzero(np.diff(e.mask.astype(int)) == 1)) > 1]
    assert len(several) >= 8
    batch = Batch.pack(several, [np.ones(len(e.tokens), np.float32) for e in several])
    live = batch.weights != 0
    np.testing.assert_allclose(tiny_engine.score(batch)[live], batch.logprobs[live], atol=2e-5)


def test_the_reward_sees_the_last_turn_the_conversation_and_the_replies():
    seen = {}

    def spy(prompt, completion, example, messages, replies, truncated, **kwargs):
        seen.update(prompt=prompt, completion=completion, roles=[m["role"] for m in messages], replies=len(replies))
        return 0.5, False

    tokenizer = chat_tokenizer("chatml")
    episode = play(make(tokenizer, reward_fn=spy), ScriptedEngine(*turns_of(tokenizer, "hello", "answer", "the")))
    assert (episode.reward, episode.is_correct) == (0.5, False)
    assert seen == {
        "prompt": "the user",
        "completion": "the",
        "roles": ["user", "assistant", "user", "assistant", "user", "assistant"],
        "replies": 3,
    }


def test_without_a_reward_function_the_replies_rewards_are_summed():
    tokenizer = chat_tokenizer("gemma")
    episode = play(make(tokenizer), ScriptedEngine(*turns_of(tokenizer, "he", "he", "he")))
    assert (episode.reward, episode.is_correct) == (1.5, True)


def test_the_transcript_names_the_speaker_of_each_message():
    tokenizer = chat_tokenizer("llama3")
    episode = play(make(tokenizer, ("ok",)), ScriptedEngine(*turns_of(tokenizer, "he", "the")))
    assert (episode.prompt, episode.text) == ("the user", "[assistant] he\n[user] ok\n[assistant] the")


# ---- how an episode ends


def test_a_turn_that_is_cut_off_ends_the_episode_truncated_without_a_reply():
    tokenizer = chat_tokenizer("chatml")
    hosts = []
    env = MultiTurnEnv(["the"], lambda example: hosts.append(Host()) or hosts[-1], max_tokens=2, tokenizer=tokenizer)
    episode = play(env, ScriptedEngine((spelled(tokenizer, "he"), False)), max_tokens=2)
    assert episode.truncated
    assert hosts[0].heard == []
    assert episode.tokens.tolist()[-2:] == spelled(tokenizer, "he")


def test_the_last_turn_allowed_ends_the_episode_truncated_if_the_partner_would_continue():
    tokenizer = chat_tokenizer("chatml")
    episode = play(make(tokenizer, max_turns=2), ScriptedEngine(*turns_of(tokenizer, "he", "the")))
    assert episode.truncated
    assert episode.mask[-1]
    ended = play(make(tokenizer, (), max_turns=1), ScriptedEngine(*turns_of(tokenizer, "he")))
    assert not ended.truncated


def test_an_episode_without_room_for_another_turn_is_truncated():
    tokenizer = chat_tokenizer("chatml")
    engine = ScriptedEngine(*turns_of(tokenizer, "he", "he", "he"))
    full = play(make(tokenizer), engine)
    needed = len(engine.seen[-1]) - len(engine.seen[0]) + 40  # up to the last turn, and room for it
    enough = play(make(tokenizer, max_episode_tokens=needed), ScriptedEngine(*engine.turns))
    short = play(make(tokenizer, max_episode_tokens=needed - 1), ScriptedEngine(*engine.turns))
    assert enough.tokens.tolist() == full.tokens.tolist()
    assert not enough.truncated
    assert short.truncated
    assert len(short.tokens) < len(full.tokens)
    assert short.mask[-1]


def test_a_partner_may_end_the_episode_as_truncated():
    class Clock:
        def reply(self, text):
            return Reply(truncated=True)

    tokenizer = chat_tokenizer("chatml")
    env = MultiTurnEnv(["the"], lambda example: Clock(), tokenizer=tokenizer)
    assert play(env, ScriptedEngine(*turns_of(tokenizer, "he"))).truncated


def test_unfinished_episodes_are_sampled_in_one_call_without_the_finished_ones():
    tokenizer = chat_tokenizer("chatml")
    lines = iter([(), ("ok",), ("ok", "ok")])
    env = MultiTurnEnv(["the", "he", "us"], lambda example: Host(next(lines)), max_tokens=40, tokenizer=tokenizer)
    engine = ScriptedEngine(*turns_of(tokenizer, "he", "he", "he"))
    episodes = collect(engine, env, [0, 1, 2], 1, Sampling(40), first_group=5)
    assert engine.calls == 3
    assert len(engine.seen) == 3 + 2 + 1
    assert [e.group for e in episodes] == [5, 6, 7]
    assert [int((np.diff(e.mask.astype(int)) == 1).sum()) for e in episodes] == [1, 2, 3]


def test_each_turn_draws_from_a_seed_of_its_own():
    seeds = []
    tokenizer = chat_tokenizer("chatml")

    class Spy(ScriptedEngine):
        def sample(self, prompts, n, sampling):
            seeds.append(sampling.seed)
            return super().sample(prompts, n, sampling)

    for seed in (1, 1, 2):
        play(make(tokenizer), Spy(*turns_of(tokenizer, "he", "he", "he")), seed=seed)
    assert len(set(seeds[:3])) == 3
    assert seeds[:3] == seeds[3:6]
    assert len(set(seeds)) == 6


# ---- step by step


def test_step_by_step_the_observation_is_everything_so_far():
    tokenizer = chat_tokenizer("chatml")
    output = [tokens for tokens, _ in turns_of(tokenizer, "hello", "answer", "the")]
    env = make(tokenizer)
    obs, _ = env.reset()
    seen = []
    for turn in output:
        seen.append(obs.tolist())
        result = env.step(turn)
        obs = result["observation"]
    assert (result["terminated"], result["reward"], result["info"]["is_correct"]) == (True, 1.5, True)
    engine = ScriptedEngine(*((turn, True) for turn in output))
    play(env, engine)
    assert seen == engine.seen


def test_a_runner_plays_several_turns_one_after_another():
    tokenizer = chat_tokenizer("chatml")
    turn = turns_of(tokenizer, "he")[0][0]

    class Policy:
        def __call__(self, obs, deterministic=False):
            return turn, {"logprob": np.zeros(len(turn), np.float32)}

        def sample_batch(self, prompts, deterministic=False):
            raise AssertionError("an episode of several turns cannot be sampled at once")

    buffer = RolloutRunner(make(tokenizer), Policy(), create_strategy("grpo"), max_steps=6).collect()
    assert [len(e) for e in buffer.episodes] == [3, 3]
    assert [e.rew for e in buffer.episodes] == [[0.0, 0.0, 1.5]] * 2
    assert [e.group for e in buffer.episodes] == [0, 1]
    with pytest.raises(ValueError, match="MultiTurnEnv cannot be batched"):
        RolloutRunner(make(tokenizer), Policy(), create_strategy("grpo")).collect_batched(Policy().sample_batch, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_runner_buffers_the_episode_that_the_training_loop_collects(family):
    tokenizer = chat_tokenizer(family)
    output = turns_of(tokenizer, "hello", "answer", "the")
    policy = Says(output)
    [buffered] = RolloutRunner(make(tokenizer), policy, create_strategy("grpo"), max_steps=3).collect().episodes
    there, here = play(make(tokenizer), ScriptedEngine(*output)), buffered.as_training()
    assert here.tokens.tolist() == there.tokens.tolist()
    assert here.mask.tolist() == there.mask.tolist()
    assert (here.reward, here.is_correct, here.truncated) == (there.reward, there.is_correct, there.truncated)
    assert disagreements(here, policy) == []


def test_a_turn_that_the_policys_own_limit_cut_off_ends_the_episode_and_is_scored():
    tokenizer, hosts = chat_tokenizer("chatml"), []

    def partner(example):
        hosts.append(Host())
        return hosts[-1]

    def score(prompt, completion, example, truncated):
        return 0.25 if truncated else 1.0

    env = MultiTurnEnv(["the"], partner, score, max_tokens=40, tokenizer=tokenizer)
    policy = Says([(spelled(tokenizer, "he"), False)])
    [episode] = RolloutRunner(env, policy, create_strategy("grpo"), max_steps=1).collect().episodes
    assert (episode.rew, episode.timeout, hosts[-1].heard) == ([0.25], [True], [])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [({"max_turns": 0}, "max_turns is 0"), ({"max_episode_tokens": 39}, "max_episode_tokens is 39")],
)
def test_limits_that_leave_no_room_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        make(chat_tokenizer("chatml"), **settings)
