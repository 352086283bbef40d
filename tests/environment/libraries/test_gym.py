"""Gymnasium's environments, the real ones: one by one, side by side, and played by a language model."""

from typing import ClassVar

import numpy as np
import pytest
from chat_tokenizers import ScriptedEngine, chat_tokenizer

from textpolicy.engine import Sampling
from textpolicy.environment import GymAdapter, GymnasiumTextEnv, VectorizedEnvironment, make_vectorized_env
from textpolicy.errors import UserError
from textpolicy.loop.collect import collect
from textpolicy.rollout import RolloutRunner, create_strategy
from textpolicy.rollout.base import checked_step

gymnasium = pytest.importorskip("gymnasium", reason="Gymnasium is an extra: pip install 'textpolicy[gymnasium]'")

LAKE = {"map_name": "4x4", "is_slippery": False}
RIGHT, DOWN = 2, 1
ACROSS = [DOWN, DOWN, RIGHT, RIGHT, DOWN, RIGHT]  # over the 4x4 lake, past its holes


class Guess(gymnasium.Env):
    """Guess a word of one letter in three turns."""

    observation_space = gymnasium.spaces.Text(40)
    action_space = gymnasium.spaces.Text(1, charset="abc")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.word, self.turn = "abc"[self.np_random.integers(3)], 0
        return f"guess, game {seed}", {}

    def step(self, action):
        self.turn += 1
        right = action == self.word
        return "wrong", float(right), right, self.turn == 3, {}


def play(env, *texts, game=0):
    tokenizer = env.tokenizer
    turns = [([*tokenizer.encode(t, add_special_tokens=False), tokenizer.eos_token_id], True) for t in texts]
    return collect(ScriptedEngine(*turns), env, [game], 1, Sampling(16))[0]


def lake(games=1, **settings):
    return GymnasiumTextEnv(
        lambda: gymnasium.make("FrozenLake-v1", **LAKE), games, tokenizer=chat_tokenizer("chatml"), **settings
    )


# ---- one by one


def test_an_environment_keeps_our_contract_and_its_own_rewards():
    env = GymAdapter("FrozenLake-v1", **LAKE)
    observation, info = env.reset(seed=1)
    assert (observation, type(info)) == (0, dict)
    results = [checked_step(env, action) for action in ACROSS]
    assert [r["observation"] for r in results] == [4, 8, 9, 10, 14, 15]
    assert [r["reward"] for r in results] == [0, 0, 0, 0, 0, 1]
    assert [r["terminated"] for r in results] == [False] * 5 + [True]


def test_a_clone_has_the_same_settings_and_its_own_state():
    env = GymAdapter("FrozenLake-v1", **LAKE)
    env.reset()
    env.step(DOWN)
    clone = env.clone()
    assert clone.reset()[0] == 0
    assert clone.step(DOWN)["observation"] == 4
    assert env.step(DOWN)["observation"] == 8


def test_it_renders_the_games_own_picture_and_closing_closes_the_game():
    closed = []

    class Drawn(gymnasium.Env):
        observation_space = action_space = gymnasium.spaces.Discrete(2)
        metadata: ClassVar = {"render_modes": ["ansi"], "render_fps": 4}

        def __init__(self, render_mode=None):
            self.render_mode = render_mode

        def reset(self, *, seed=None, options=None):
            return 0, {}

        def render(self):
            return "a lake"

        def close(self):
            closed.append(True)

    gymnasium.register("Drawn-v0", Drawn)
    try:
        env = GymAdapter("Drawn-v0", render_mode="ansi")
        env.reset()
        assert env.render() == "a lake"
        assert closed == []
        env.close()
        assert closed == [True]
    finally:
        gymnasium.registry.pop("Drawn-v0")


def test_a_runner_collects_from_one():
    def policy(obs, deterministic=False):
        return 0, {}

    collected = RolloutRunner(GymAdapter("CartPole-v1"), policy, create_strategy("ppo"), 30).collect()
    assert len(collected) == 30
    assert collected.episodes[0].obs[0].shape == (4,)
    assert all(episode.done[-1] for episode in collected.episodes)


def test_gymnasiums_absence_is_an_install_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r"pip install 'textpolicy\[gymnasium\]'"):
        GymAdapter("CartPole-v1")


# ---- side by side


@pytest.mark.parametrize("use_async", [False, True])
def test_environments_side_by_side_are_each_as_alone(use_async):
    together = make_vectorized_env("CartPole-v1", 3, use_async)
    alone = [GymAdapter("CartPole-v1") for _ in range(3)]
    try:
        observations, _ = together.reset(seed=5)
        expected = np.array([env.reset(seed=5 + i)[0] for i, env in enumerate(alone)])
        np.testing.assert_array_equal(observations, expected)
        assert observations.dtype == np.float32
        result = together.step(np.array([0, 1, 0]))
        singles = [env.step(action) for env, action in zip(alone, [0, 1, 0], strict=True)]
        np.testing.assert_array_equal(result["observation"], [s["observation"] for s in singles])
        assert result["reward"].tolist() == [1.0, 1.0, 1.0]
        assert result["terminated"].tolist() == result["truncated"].tolist() == [False] * 3
    finally:
        together.close()


def test_as_many_actions_as_environments_are_needed():
    together = make_vectorized_env("CartPole-v1", 2, use_async=False)
    together.reset(seed=0)
    assert isinstance(together, VectorizedEnvironment)
    with pytest.raises(UserError, match="3 actions were given for 2 environments"):
        together.step([0, 1, 0])
    with pytest.raises(UserError, match="num_envs is 0"):
        make_vectorized_env("CartPole-v1", 0)


# ---- played by a language model


def test_turns_are_actions_and_observations_are_messages():
    env = lake(instructions="Reach 15.", is_correct=lambda reward: reward == 1)
    assert env.prompt_text(0) == "Reach 15.\n\n0"
    episode = play(env, *(f"I go {action}" for action in ACROSS))
    output = [line.removeprefix("[user] ") for line in episode.text.splitlines() if line.startswith("[user]")]
    assert output == ["4", "8", "9", "10", "14"]
    assert (episode.reward, episode.is_correct, episode.truncated) == (1.0, True, False)


def test_falling_into_a_hole_ends_the_game_without_success():
    episode = play(lake(is_correct=lambda reward: reward == 1), str(DOWN), str(RIGHT))
    assert (episode.reward, episode.is_correct, episode.truncated) == (0.0, False, False)


def test_an_invalid_action_is_answered_and_costs_a_turn():
    episode = play(lake(max_turns=4), "left", "7", str(DOWN), str(DOWN))
    lines = [line for line in episode.text.splitlines() if line.startswith("[user]")]
    assert lines == [
        "[user] That is no action: it has no whole number",
        "[user] That is no action: 7 is not in Discrete(4)",
        "[user] 4",
    ]
    assert episode.truncated


def test_a_text_space_takes_the_text_and_a_groups_games_begin_alike():
    env = GymnasiumTextEnv(Guess, 8, tokenizer=chat_tokenizer("gemma"), seed=3)
    assert env.prompt_text(2) == "guess, game 5"
    won = {word: [play(env, word, word, word, game=i).reward for i in range(8)] for word in "abc"}
    assert np.array([won[word] for word in "abc"]).sum(axis=0).tolist() == [1.0] * 8
    again = [play(env, "a", "a", "a", game=i) for i in range(8)]
    assert [e.reward for e in again] == won["a"]
    assert all(e.truncated == (e.reward == 0) for e in again)


def test_a_space_that_no_text_belongs_to_needs_a_reader():
    with pytest.raises(UserError, match="give read_action"):
        GymnasiumTextEnv("Pendulum-v1", 1, tokenizer=chat_tokenizer("chatml"))
    env = GymnasiumTextEnv("Pendulum-v1", 1, tokenizer=chat_tokenizer("chatml"), read_action=lambda text: [float(text)])
    assert play(env, "0.5", "x", *["0"] * 6).truncated
    with pytest.raises(UserError, match="games is 0"):
        lake(games=0)


# ---- games that do otherwise


class Scripted(gymnasium.Env):
    """Ten actions; ``events`` say what each move does: raise it, or return it in place of the usual tuple."""

    action_space = gymnasium.spaces.Discrete(10)
    observation_space = gymnasium.spaces.Discrete(10)
    closed = 0

    def __init__(self, *events):
        self.events = list(events)

    def reset(self, *, seed=None, options=None):
        return 0, {}

    def step(self, action):
        event = self.events.pop(0) if self.events else None
        if isinstance(event, BaseException):
            raise event
        return (int(action), 1.0, False, False, {}) if event is None else event

    def close(self):
        type(self).closed += 1


def scripted(*events, **settings):
    Scripted.closed = 0
    return GymnasiumTextEnv(lambda: Scripted(*events), 1, tokenizer=chat_tokenizer("chatml"), **settings)


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("1", 1),
        ("I take 3, no: 4.", 4),
        ("**7**", 7),
        (r"\boxed{2}", 2),
        ("(5)", 5),
        ("action: 6!", 6),
        ("so...8", 8),
        ("+3", 3),
        ("I am 90% sure of 2", 2),
        ("<think>1 or 2? 9.</think>4", 4),
        ("1.0", None),
        ("0.5", None),
        (".5", None),
        ("1/2", None),
        ("1,000", None),
        ("1 000", None),
        ("12\u202f003", None),
        ("1'000", None),
        ("1+2", None),
        ("2*3", None),
        ("\u22121", None),
        ("0x10", None),
        ("1 or 2 or 3", 3),
        ("1. left 2. right: 2.", 2),
        ("x=5", 5),
        ("3:30", None),
        ("2^3", None),
        ("4th", None),
        ("x2", None),
        ("7e1", None),
        ("\u0663", None),
        ("2\u00b2", None),
        ("10000000001", None),
        ("9" * 30, None),
        ("9" * 5000, None),
        ("-1", None),
        ("10", None),
        ("<think>so it is 3", None),
        ("<think>3</think>I do not know", None),
        ("", None),
    ],
)
def test_an_action_is_the_last_whole_number_after_the_thought(text, action):
    env = scripted()
    env.reset()
    read = env.tokenizer.decode(env.step(text)["observation"].tolist())
    assert read.endswith(f"user\n{action}<|im_end|>\n<|im_start|>assistant\n") is (action is not None)
    assert ("That is no action: " in read) is (action is None)


@pytest.mark.parametrize("reader", [None, int])
def test_a_thought_that_the_prompt_opened_holds_no_action(reader):
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>{% endif %}"
    env = GymnasiumTextEnv(Scripted, 1, tokenizer=tokenizer, read_action=reader, max_turns=5)
    episode = play(env, "so I take 3", "so 3</think>4", "<think>5</think> 6 ", "7", "8")
    read = [line for line in episode.text.splitlines() if line.startswith("[user]")]
    refused = "[user] That is no action: it ends inside a thought"
    assert read == [refused, "[user] 4", "[user] 6", refused]


def test_what_a_table_of_actions_does_not_have_is_answered():
    env = GymnasiumTextEnv(
        Scripted, 1, tokenizer=chat_tokenizer("chatml"), read_action={"up": 4}.__getitem__, max_turns=3
    )
    read = [line for line in play(env, "down", "up", "up").text.splitlines() if line.startswith("[user]")]
    assert read == ["[user] That is no action: 'down'", "[user] 4"]


@pytest.mark.parametrize(
    "error", [gymnasium.error.NameNotFound("no Chess"), ImportError("no ale"), TypeError("no seed")]
)
def test_a_function_that_makes_no_game_is_refused(error):
    def make():
        raise error

    with pytest.raises(UserError, match=f"the function of the game raised {type(error).__name__}: no "):
        GymnasiumTextEnv(make, 1, tokenizer=chat_tokenizer("chatml"))


@pytest.mark.parametrize(
    "error", [ValueError("taken"), AssertionError("taken"), gymnasium.error.InvalidAction("taken")]
)
def test_a_move_that_the_game_refuses_is_answered(error):
    episode = play(scripted(error, max_turns=3), "1", "2", "3")
    assert episode.text.count("[user] The game refuses 1: taken") == 1
    assert (episode.reward, Scripted.closed) == (2.0, 2)  # with the one that the prompts are from


@pytest.mark.parametrize("error", [KeyError("x"), ZeroDivisionError(), RuntimeError("x"), SystemExit(0)])
def test_a_game_that_fails_is_unscorable_and_the_others_go_on(error, caplog):
    env = scripted(None, error)
    tokenizer = env.tokenizer
    turns = [([*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id], True) for text in "1122"]
    episodes = collect(ScriptedEngine(*turns), env, [0], 2, Sampling(16))
    assert [np.isnan(e.reward) for e in episodes] == [True, True]
    assert type(error).__name__ in caplog.text
    assert Scripted.closed == 3


def test_a_game_that_fails_to_begin_or_to_close_is_a_warning_in_the_middle_of_a_run(caplog):
    class Flaky(Scripted):
        begun = 0

        def reset(self, *, seed=None, options=None):
            Flaky.begun += 1
            if Flaky.begun == 2:
                raise ConnectionError("no server")
            return 0, {}

        def close(self):
            raise OSError("no window")

    env = GymnasiumTextEnv(Flaky, 1, tokenizer=chat_tokenizer("chatml"), max_turns=1)
    assert [np.isnan(play(env, "1").reward) for _ in range(2)] == [True, False]
    assert "ConnectionError: no server" in caplog.text
    assert "no window" in caplog.text


@pytest.mark.parametrize("reward", [None, float("nan"), float("inf"), np.array([np.nan])])
def test_a_reward_that_is_no_number_makes_the_episode_unscorable(reward):
    assert np.isnan(play(scripted((1, reward, True, False, {})), "1").reward)
    assert play(scripted((1, np.array([0.5]), np.array(True), False, {})), "1").reward == 0.5


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        ((1, 1.0, True, {}), "a tuple of 4; return observation, reward, terminated"),
        ({"observation": 1, "reward": 1.0}, "a dict; return observation"),
        (1, "a int; return observation"),
        ((1, "much", True, False, {}), "the reward 'much'; return one number"),
        ((1, [1.0, 2.0], True, False, {}), r"the reward \[1.0, 2.0\]; return one number"),
    ],
)
def test_a_game_that_returns_other_shapes_is_refused_in_a_sentence(returned, what):
    with pytest.raises(UserError, match=what):
        play(scripted(returned), "1")
    monkey = GymAdapter.__new__(GymAdapter)
    monkey.env = Scripted(returned)
    with pytest.raises(UserError, match=what):
        monkey.step(1)


class Bare(Scripted):
    def reset(self, *, seed=None, options=None):
        return 0


class Broken(Scripted):
    def reset(self, *, seed=None, options=None):
        raise OSError("no display")


class NoSpace(Scripted):
    action_space = None


@pytest.mark.parametrize(
    ("game", "what"),
    [
        ("Chess-v9", r"cannot make 'Chess-v9' \(.*; check its name"),
        ("nowhere:Chess-v9", "cannot make 'nowhere:Chess-v9'"),
        ("FrozenLake-v99", "cannot make 'FrozenLake-v99'"),
        ("", "cannot make ''"),
        (Bare, r"reset\(\) of a game returned a int; return observation, info"),
        (Broken, r"cannot begin with seed 0 \(OSError: no display\)"),
        (NoSpace, "no text is an action of None by itself; give read_action"),
        (Scripted(), "game is a Scripted; give the id of one, or a function"),
        (lambda: None, "the function of the game made a NoneType; make a gymnasium.Env"),
        (None, "game is a NoneType"),
    ],
)
def test_what_is_no_game_is_refused_in_a_sentence(game, what):
    with pytest.raises(UserError, match=what) as error:
        GymnasiumTextEnv(game, 1, tokenizer=chat_tokenizer("chatml"))
    assert "\n" not in str(error.value)


def test_an_unknown_game_and_unknown_settings_are_refused_wherever_they_are_named():
    for make in (GymAdapter, lambda name, **more: make_vectorized_env(name, 2, use_async=False, env_kwargs=more)):
        with pytest.raises(UserError, match="cannot make 'Chess-v9'"):
            make("Chess-v9")
        with pytest.raises(UserError, match=r"cannot make 'CartPole-v1' .*gravitas"):
            make("CartPole-v1", gravitas=3)


@pytest.mark.parametrize(("turns", "settings"), [("1", {"max_turns": 1}), ("12", {"max_turns": 2}), ("", {})])
def test_a_game_whose_episode_is_cut_off_or_left_is_closed(turns, settings):
    env = scripted(**settings)
    assert Scripted.closed == 1
    env.reset()
    for text in turns:
        env.step(text)
    env.reset()
    assert Scripted.closed == 2
    env.step("1" * 40, truncated=True)
    assert Scripted.closed == 3


class Parts(gymnasium.Env):
    """Observations of several parts, one of them in two dimensions."""

    box, few = gymnasium.spaces.Box(0, 1, (2, 2)), gymnasium.spaces.Discrete(5)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, kind):
        inner = gymnasium.spaces.Dict({"box": self.box})
        kinds = {
            "tuple": (gymnasium.spaces.Tuple((self.few, self.box)), (3, np.ones((2, 2), np.float32))),
            "nested": (gymnasium.spaces.Tuple((self.few, inner)), (3, {"box": np.ones((2, 2), np.float32)})),
            "dict": (gymnasium.spaces.Dict({"a": self.few, "b": self.box}), {"a": 3, "b": np.ones((2, 2), np.float32)}),
            "text": (gymnasium.spaces.Text(9), "hello"),
        }
        self.observation_space, self.seen = kinds[kind]

    def reset(self, *, seed=None, options=None):
        return self.seen, {}

    def step(self, action):
        return self.seen, 1.0, False, False, {}


@pytest.mark.parametrize("kind", ["tuple", "nested", "dict", "text"])
def test_observations_of_several_parts_are_one_row_for_each_environment(kind):
    several = VectorizedEnvironment(gymnasium.vector.SyncVectorEnv([lambda: Parts(kind)] * 3))
    if kind == "text":
        with pytest.raises(UserError, match=r"observations of Text.* are no numbers"):
            several.reset()
        return
    rows = [[3, 1, 1, 1, 1]] * 3
    assert several.reset()[0].tolist() == several.step([0, 1, 0])["observation"].tolist() == rows
    with pytest.raises(UserError, match="1 actions were given for 3 environments"):
        several.step(1)
