"""Buffer and its episodes: what is kept, what is dropped, what training accepts."""

import numpy as np
import pytest

from textpolicy.buffer import Buffer, Episode
from textpolicy.errors import UserError

STEP = {"obs": 0, "act": 1, "rew": 0.5, "next_obs": 2, "done": True}
TEXT = {
    "obs": np.array([7, 8], np.int32),
    "act": [4, 5, 6],
    "rew": 0.25,
    "next_obs": np.zeros(0, np.int32),
    "done": True,
    "timeout": True,
    "logprob": np.array([-1, -2, -3], np.float32),
    "group": 3,
}


def text_episode(**changes):
    buffer = Buffer()
    buffer.add(**{**TEXT, **changes})
    return buffer.episodes[0]


def fill(*rewards):
    buffer = Buffer()
    for rew in rewards:
        buffer.add(**{**STEP, "rew": rew})
    return buffer


def test_an_episode_closes_at_done_or_timeout():
    buffer = Buffer()
    buffer.add(**{**STEP, "done": False})
    assert (buffer.episode_count, len(buffer.current_episode), len(buffer)) == (0, 1, 1)
    buffer.add(**{**STEP, "done": False}, timeout=True)
    buffer.add(**STEP)
    assert [len(e) for e in buffer.episodes] == [2, 1]
    assert (len(buffer), len(buffer.current_episode)) == (3, 0)


def test_whole_episodes_are_evicted_first_in_first_out():
    buffer = Buffer(max_episodes=2)
    for rew in (1, 2, 3):
        buffer.add(**{**STEP, "done": False, "rew": rew})
        buffer.add(**{**STEP, "rew": rew})
    assert [e.rew for e in buffer.episodes] == [[2, 2], [3, 3]]


def test_ready_and_clear():
    buffer = fill(1, 2)
    assert buffer.ready()
    assert buffer.ready(2)
    assert not buffer.ready(3)
    buffer.clear()
    assert (len(buffer), buffer.episode_count, buffer.ready()) == (0, 0, False)


@pytest.mark.parametrize("make", [lambda: Buffer(0), lambda: fill(1).sample_latest_steps(0)])
def test_sizes_below_one_are_refused(make):
    with pytest.raises(ValueError, match="is 0; set it to 1 or more"):
        make()


@pytest.mark.parametrize("name", ["logprob", "value", "entropy", "is_correct"])
def test_an_optional_field_of_some_steps_only_is_refused_by_name(name):
    buffer = Buffer()
    buffer.add(**{**STEP, "done": False}, **{name: 1})
    with pytest.raises(ValueError, match=name):
        buffer.add(**STEP)
    buffer.clear()
    buffer.add(**{**STEP, "done": False})
    with pytest.raises(ValueError, match=name):
        buffer.add(**STEP, **{name: 1})
    assert len(buffer) == 1


def test_false_and_zero_are_values_of_an_optional_field():
    buffer = Buffer()
    buffer.add(**STEP, is_correct=False, value=0.0)
    assert (buffer.episodes[0].is_correct, buffer.episodes[0].value) == ([False], [0.0])


def test_an_episode_survives_the_trip_through_a_dict():
    episode = text_episode(temperature=0.5)
    copy = Buffer()
    copy.add_episode_from_dict(episode.to_dict())
    assert copy.episodes[0].to_dict() == episode.to_dict()
    assert (copy.episodes[0].group, copy.episodes[0].temperature, copy.episodes[0].value) == (3, 0.5, None)


def test_a_dict_that_lacks_a_field_or_a_step_is_refused():
    complete = text_episode().to_dict()
    with pytest.raises(ValueError, match="lacks rew, timeout"):
        Episode.from_dict({k: v for k, v in complete.items() if k not in ("rew", "timeout")})
    with pytest.raises(ValueError, match="logprob has 2 entries and obs 1"):
        Buffer().add_episode_from_dict({**complete, "logprob": [1, 2]})


def test_validation_finds_a_list_of_another_length():
    buffer = fill(1, 2)
    buffer.validate_consistency()
    buffer.episodes[1].done.append(True)
    with pytest.raises(ValueError, match="done has 2 entries"):
        buffer.validate_consistency()


def test_sample_stacks_every_step_and_drops_fields_that_an_episode_lacks():
    buffer = Buffer()
    buffer.add(**{**STEP, "obs": [1, 2]}, value=0.1, logprob=-1.0)
    buffer.add(**{**STEP, "obs": [3, 4]}, logprob=-2.0)
    sample = buffer.sample()
    np.testing.assert_array_equal(sample["obs"], [[1, 2], [3, 4]])
    np.testing.assert_array_equal(sample["logprob"], [-1, -2])
    assert "value" not in sample


def test_sample_keeps_ragged_steps_as_objects():
    buffer = Buffer()
    buffer.add(**TEXT)
    buffer.add(**{**TEXT, "act": [9]})
    assert [act.tolist() for act in buffer.sample()["act"]] == [[4, 5, 6], [9]]


def test_an_empty_buffer_cannot_be_sampled():
    with pytest.raises(ValueError, match="no complete episode"):
        Buffer().sample()


def test_the_latest_steps_and_episodes():
    buffer = fill(1, 2, 3)
    assert buffer.sample_latest_steps(2)["rew"].tolist() == [2, 3]
    assert [e.rew for e in buffer.sample_episodes(2)] == [[2], [3]]
    assert [e.rew for e in buffer.sample_episodes(5, order="desc")] == [[3], [2], [1]]
    with pytest.raises(ValueError, match="order is 'random'"):
        buffer.sample_episodes(1, order="random")


def test_tensors_of_an_episode_have_one_row_per_step():
    tensors = text_episode().to_tensor_dict()
    assert (tensors["obs"].shape, tensors["act"].shape, tensors["logprob"].shape) == ((1, 2), (1, 3), (1, 3))


def test_nothing_is_printed(capsys):
    fill(*range(60))
    assert capsys.readouterr() == ("", "")


# ---- as_training


def test_a_text_episode_becomes_a_training_episode():
    e = text_episode(entropy=np.array([0.1, 0.2, 0.3]), temperature=0.7, is_correct=False).as_training()
    assert (e.tokens.dtype, e.tokens.tolist()) == (np.int32, [7, 8, 4, 5, 6])
    assert e.mask.tolist() == [False, False, True, True, True]
    assert e.logprobs.tolist() == [0, 0, -1, -2, -3]
    np.testing.assert_allclose(e.entropy, [0, 0, 0.1, 0.2, 0.3], rtol=1e-6)
    assert (e.reward, e.group, e.temperature, e.truncated, e.is_correct) == (0.25, 3, 0.7, True, False)


def test_the_temperature_is_one_unless_given_and_none_is_kept():
    assert text_episode().as_training().temperature == 1.0
    assert text_episode(temperature=None).as_training().temperature is None


def test_an_empty_completion_has_nothing_to_train_on():
    e = text_episode(act=[], logprob=np.zeros(0)).as_training()
    assert (e.tokens.tolist(), e.mask.any()) == ([7, 8], False)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"logprob": None}, "no logprob"),
        ({"logprob": np.zeros(2)}, "logprob has 2 entries for 3 tokens"),
        ({"entropy": np.zeros(4)}, "entropy has 4 entries for 3 tokens"),
        ({"group": None}, "no group"),
        ({"act": "text"}, "act of an episode is 'text'"),
        ({"act": 3}, "act of an episode is 3"),
    ],
)
def test_an_episode_that_cannot_be_trained_on_is_an_error_with_the_reason(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        text_episode(**changes).as_training()


def several_turns(*steps):
    """An episode with a step for each (obs, act, reward); log-probs are -1, -2, ... over all of them."""
    buffer, done = Buffer(), 0
    for n, (obs, act, rew) in enumerate(steps, 1):
        logprob = -np.arange(done + 1.0, done + 1 + len(act))
        done, last = done + len(act), n == len(steps)
        buffer.add(
            np.array(obs, np.int32), act, rew, obs[:0], last, last, logprob, is_correct=last, group=3, temperature=0.5
        )
    return buffer.episodes[0]


def test_several_turns_become_one_row_in_which_only_the_policys_tokens_are_masked_in():
    e = several_turns(
        ([7, 8], [4, 5], 0.25), ([7, 8, 4, 5, 9], [6], 0.0), ([7, 8, 4, 5, 9, 6, 1, 2], [3], 0.5)
    ).as_training()
    assert e.tokens.tolist() == [7, 8, 4, 5, 9, 6, 1, 2, 3]
    assert e.mask.astype(int).tolist() == [0, 0, 1, 1, 0, 1, 0, 0, 1]
    assert e.logprobs.tolist() == [0, 0, -1, -2, 0, -3, 0, 0, -4]
    assert (e.reward, e.group, e.temperature, e.truncated, e.is_correct) == (0.75, 3, 0.5, True, True)


@pytest.mark.parametrize("obs", [[7, 8, 4, 9], [7, 8], [7, 8, 5, 4, 9], [1, 7, 8, 4, 5]])
def test_an_observation_that_rewrites_earlier_tokens_cannot_be_trained_on(obs):
    with pytest.raises(UserError, match=r"observation of step 1 .* does not begin with the 4 tokens before it"):
        several_turns(([7, 8], [4, 5], 0.0), (obs, [6], 1.0)).as_training()


def test_an_episode_has_one_temperature_and_at_least_one_step():
    buffer = Buffer()
    buffer.add(**{**TEXT, "done": False, "timeout": False}, temperature=1.0)
    with pytest.raises(ValueError, match=r"temperature 0\.5 and those before it with 1\.0"):
        buffer.add(**TEXT, temperature=0.5)
    with pytest.raises(UserError, match="has no steps"):
        Episode(group=1).as_training()
