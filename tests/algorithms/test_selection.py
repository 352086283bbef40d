"""What of a buffer is trained on: the documented dict, hand-made, and the way back from it."""

import numpy as np
import pytest

from textpolicy.algorithms import grpo
from textpolicy.algorithms.selection import (
    as_arrays,
    as_episodes,
    compute_prompt_group_stats,
    filter_informative_prompts,
    row_and_position,
    select_all_data,
    select_informative_data,
    select_recent_data,
)
from textpolicy.buffer import Buffer

# (prompt, completion, reward, group, is_correct)
EPISODES = [
    ([5, 9], [7], 1.0, 4, None),
    ([8], [2, 6, 1], 0.0, 2, None),
    ([5, 9], [], 0.25, 4, True),
]


def made(episodes=EPISODES, entropy=True, **changes):
    buffer = Buffer(200)
    for prompt, completion, reward, group, is_correct in episodes:
        steps = -np.arange(1.0, len(completion) + 1, dtype=np.float32)
        buffer.add(
            np.array(prompt, np.int32), completion, reward, np.zeros(0, np.int32), True,
            **{"logprob": steps, "entropy": -steps / 2 if entropy else None, "group": group, **changes},
            is_correct=is_correct,
        )  # fmt: skip
    return buffer


def rewarded(groups):
    """Episodes of the given rewards, one list per prompt."""
    return made([([1], [2], r, g, None) for g, rewards in enumerate(groups) for r in rewards]).episodes


# the dict


def test_all_data_is_the_buffer_in_its_order():
    data = select_all_data(made())
    assert data["obs"].tolist() == [[5, 9, 7, 0], [8, 2, 6, 1], [5, 9, 0, 0]]
    assert data["act"].tolist() == [[7, 0, 0], [2, 6, 1], [0, 0, 0]]
    assert data["logprob"].tolist() == [-1, -1, -2, -3]
    assert data["token_entropies"].tolist() == [0.5, 0.5, 1, 1.5]
    assert data["rewards"].tolist() == [1, 0, 0.25]
    assert data["binary_rewards"].tolist() == [1, 0, 1]
    assert data["episode_lengths"].tolist() == [1, 3, 0]
    assert data["prompt_lengths"].tolist() == [2, 1, 2]
    assert data["prompt_ids"].tolist() == [1, 0, 1]
    assert data["num_prompt_groups"] == 2
    assert data["temperature"].tolist() == [1, 1, 1]


def test_entropies_are_there_only_if_every_episode_carried_them():
    assert "token_entropies" not in select_all_data(made(entropy=False))


def test_a_reward_that_could_not_be_given_is_nan_in_both_kinds():
    data = select_all_data(made([([1], [2], float("nan"), 0, None), ([1], [2], float("nan"), 0, False)]))
    assert np.isnan(data["rewards"]).tolist() == [True, True]
    assert np.isnan(data["binary_rewards"]).tolist() == [True, False]


def test_recent_data_is_the_latest_episodes():
    assert select_recent_data(made(), max_episodes=2)["act"].tolist() == [[2, 6, 1], [0, 0, 0]]
    assert len(select_recent_data(made())["rewards"]) == 3


def test_the_dict_gives_the_episodes_back():
    episodes = [e.as_training() for e in made(temperature=None).episodes]
    for there, back in zip(episodes, as_episodes(as_arrays(episodes)), strict=True):
        assert np.array_equal(there.tokens, back.tokens)
        assert np.array_equal(there.mask, back.mask)
        assert np.array_equal(there.logprobs, back.logprobs)
        assert (there.reward, there.temperature) == (back.reward, back.temperature)
    assert [e.group for e in as_episodes(as_arrays(episodes))] == [1, 0, 1]


def of_several_turns():
    """Prompt 5 9, turn 7, reply 2 3, turn 6 1, beside an episode of one turn."""
    buffer = made([([8], [2], 0.0, 2, None)])
    for obs, act, rew, done in (([5, 9], [7], 0.0, False), ([5, 9, 7, 2, 3], [6, 1], 1.0, True)):
        logprob = -np.array(act, np.float32)
        buffer.add(np.array(obs, np.int32), act, rew, obs[:0], done, logprob=logprob, entropy=-logprob, group=4)
    return buffer


def test_several_turns_keep_their_replies_and_a_mask_of_the_sampled_tokens():
    data = select_all_data(of_several_turns())
    assert data["obs"].tolist() == [[8, 2, 0, 0, 0, 0, 0], [5, 9, 7, 2, 3, 6, 1]]
    assert data["mask"].astype(int).tolist() == [[0, 1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 1, 1]]
    assert data["act"].tolist() == [[2, 0, 0], [7, 6, 1]]
    assert data["logprob"].tolist() == [-1, -7, -6, -1]
    assert data["token_entropies"].tolist() == [0.5, 7, 6, 1]
    assert (data["prompt_lengths"].tolist(), data["episode_lengths"].tolist()) == ([1, 2], [1, 3])
    back = as_episodes(data)[1]
    assert back.tokens.tolist() == [5, 9, 7, 2, 3, 6, 1]
    assert back.mask.astype(int).tolist() == [0, 0, 1, 0, 0, 1, 1]
    assert back.logprobs.tolist() == [0, 0, -7, 0, 0, -6, -1]


def test_a_dict_without_a_mask_is_of_one_turn():
    data = select_all_data(made())
    del data["mask"]
    assert [e.tokens.tolist() for e in as_episodes(data)] == [[5, 9, 7], [8, 2, 6, 1], [5, 9]]


def test_a_dict_without_temperature_was_sampled_at_one():
    data = select_all_data(made())
    del data["temperature"]
    assert [e.temperature for e in as_episodes(data)] == [1.0] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": [1.0]}, "rewards has shape"),
        ({"logprob": [-1.0]}, "give their token counts"),
        ({"prompt_lengths": [2, 2, 2]}, "does not hold every prompt and completion"),
        ({"obs": [[1, 2]]}, "does not hold every prompt and completion"),
        ({"mask": np.zeros((3, 4), bool)}, "does not mark the episode_lengths tokens"),
        ({"mask": np.ones((3, 2), bool)}, r"mask has shape \(3, 2\)"),
        ({"mask": [[1, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]]}, "does not mark"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        as_episodes({**select_all_data(made()), **change})


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match="lacks logprob, prompt_ids"):
        as_episodes({k: v for k, v in select_all_data(made()).items() if k not in ("logprob", "prompt_ids")})


def test_tokens_know_their_completion_and_place():
    row, position = row_and_position([2, 0, 3], 5)
    assert row.tolist() == [0, 0, 2, 2, 2]
    assert position.tolist() == [0, 1, 0, 1, 2]


# what cannot be selected from


@pytest.mark.parametrize("select", [select_all_data, select_recent_data, select_informative_data])
def test_only_a_buffer_with_episodes_can_be_selected_from(select):
    with pytest.raises(TypeError, match="from a dict; give the Buffer"):
        select({"episodes": []})
    with pytest.raises(ValueError, match="collect some rollouts"):
        select(Buffer())


def test_less_than_one_episode_cannot_be_recent():
    with pytest.raises(ValueError, match="max_episodes is 0"):
        select_recent_data(made(), 0)


def test_episodes_without_log_probs_or_group_are_refused():
    with pytest.raises(ValueError, match="has no logprob"):
        select_all_data(made(logprob=None))
    for select in (select_all_data, select_informative_data):
        with pytest.raises(ValueError, match="has no group"):
            select(made(group=None))


# informative prompts


def test_groups_that_agree_are_dropped_and_counted_as_all_right_or_all_wrong():
    episodes = rewarded([[1, 1], [0, 1], [0, 0, 0], [0.1] * 7, [1]])
    kept, stats = filter_informative_prompts(episodes)
    assert kept == [*episodes[2:4], episodes[14]]
    assert stats == {
        "prompts_kept": 2,
        "prompts_dropped_all_correct": 1,
        "prompts_dropped_all_wrong": 2,
        "prompts_dropped_single": 0,
        "prompts_kept_single": 1,
        "episodes_kept": 3,
        "episodes_dropped": 12,
        "filter_rate": 12 / 15,
    }


def test_a_group_of_one_can_be_dropped():
    kept, stats = filter_informative_prompts(rewarded([[1], [0, 1]]), keep_single_completion=False)
    assert len(kept) == 2
    assert (stats["prompts_dropped_single"], stats["prompts_kept_single"]) == (1, 0)


def test_one_success_in_128_is_informative_unless_a_variance_is_required():
    episodes = rewarded([[1, *[0] * 127]])
    assert len(filter_informative_prompts(episodes)[0]) == 128
    assert filter_informative_prompts(episodes, min_variance=0.01)[0] == []


def test_unscorable_completions_do_not_decide_whether_a_group_is_informative():
    nan = float("nan")
    kept, stats = filter_informative_prompts(rewarded([[nan, 1, 1], [nan, 0, 1], [nan, nan]]))
    assert len(kept) == 3
    assert stats["prompts_dropped_single"] == 1


def test_no_episodes_have_counts_of_zero():
    kept, stats = filter_informative_prompts([])
    assert kept == []
    assert set(stats.values()) == {0}


def test_where_every_group_agrees_informative_data_has_no_row():
    buffer = Buffer()
    buffer.episodes = rewarded([[1, 1], [0, 0]])
    data = select_informative_data(buffer)
    assert data["rewards"].shape == (0,)
    assert data["filter_stats"]["episodes_dropped"] == 4
    assert as_episodes(data) == []


def test_group_statistics_worked_by_hand():
    stats = compute_prompt_group_stats(rewarded([[0, 1], [0, 0, 1, 1], [1, 1]]))
    assert stats == pytest.approx(
        {
            "num_prompts": 3,
            "num_episodes": 8,
            "completions_per_prompt": 8 / 3,
            "reward_variance_mean": 0.5 / 3,
            "reward_variance_std": np.std([0.25, 0.25, 0]),
        }
    )
    assert set(compute_prompt_group_stats([]).values()) == {0}


def test_the_functions_are_reachable_as_the_documentation_spells_them():
    assert grpo.select_recent_data is select_recent_data
    assert grpo.select_all_data is select_all_data
    assert grpo.select_informative_data is select_informative_data
    assert grpo.filter_informative_prompts is filter_informative_prompts
    assert grpo.compute_prompt_group_stats is compute_prompt_group_stats
