"""The emergence logger writes the documented keys, line by line, and only valid JSON."""

import json
import time

import numpy as np
import pytest

from textpolicy.analysis.sepa.emergence import EmergenceLogger
from textpolicy.buffer import Episode as BufferedEpisode
from textpolicy.errors import UserError
from textpolicy.types import Completion, Episode

PIECES = ("Wait", " let", " me", " add", ".")
GENERATION_KEYS = [
    "step",
    "prompt",
    "completion",
    "reward",
    "num_tokens",
    "tokens",
    "logprobs",
    "entropy_per_token",
    "planning_phrases_found",
    "planning_token_ratio",
    "contains_strategic_gram",
    "strategic_gram_word_count",
    "non_strategic_gram_word_count",
    "strategic_gram_word_ratio",
    "gram_entropy_mean",
    "non_gram_entropy_mean",
    "gram_entropy_delta",
    "metadata",
]
STEP_KEYS = [
    "step",
    "mean_reward",
    "std_reward",
    "mean_completion_length",
    "max_tokens_limit",
    "max_tokens_hit_count",
    "max_tokens_hit_rate",
    "planning_token_ratio",
    "entropy_mean",
    "entropy_std",
    "strategic_gram_match_rate",
    "strategic_gram_word_ratio",
    "gram_entropy_on_mean",
    "gram_entropy_off_mean",
    "gram_entropy_delta",
    "gram_entropy_pair_count",
    "correct_count",
    "total_count",
    "logging_overhead_ms",
]


class Letters:
    """A tokenizer of one letter per id."""

    def decode(self, ids):
        return "".join(chr(i) for i in ids)


def spoken(reward=1.0, pieces=PIECES, is_correct=None, truncated=False):
    """An episode whose tokens have log-probs -1, -2, ... in turn."""
    count = len(pieces)
    completion = Completion(
        np.arange(1, count + 1, dtype=np.int32), -np.arange(1, count + 1, dtype=np.float32), truncated=truncated
    )
    scored = {"reward": reward, "is_correct": is_correct, "pieces": pieces, "text": "".join(pieces), "prompt": "1 + 1?"}
    return Episode.from_completion([7, 8], completion, group=0, **scored)


def lines(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_a_step_writes_a_line_for_every_completion_and_one_for_itself(tmp_path):
    logger = EmergenceLogger(tmp_path / "run" / "emergence", max_completion_tokens=5)
    row = logger.log_step(3, [spoken(), spoken(0.0, truncated=True)], Letters(), extra_step_metrics={"condition": "x"})
    folder = tmp_path / "run" / "emergence"
    assert lines(folder, "steps") == [row]
    assert [*row] == [*STEP_KEYS, "condition"]
    generations = lines(folder, "generations")
    assert [[*g] for g in generations] == [GENERATION_KEYS, GENERATION_KEYS]
    assert [g["reward"] for g in generations] == [1.0, 0.0]
    assert row["max_tokens_hit_count"] == 1
    assert row["max_tokens_limit"] == 5


def test_the_figures_of_a_completion_are_those_worked_by_hand(tmp_path):
    logger = EmergenceLogger(tmp_path, strategic_grams=["wait let me"])
    row = logger.log_step(0, [spoken(0.25)], Letters())
    [g] = lines(tmp_path, "generations")
    assert g["tokens"] == [1, 2, 3, 4, 5]
    assert g["logprobs"] == [-1, -2, -3, -4, -5]
    assert g["entropy_per_token"] == [1, 2, 3, 4, 5]
    assert g["planning_phrases_found"] == ["wait let me"]
    assert g["planning_token_ratio"] == 3 / 5
    assert (g["strategic_gram_word_count"], g["non_strategic_gram_word_count"]) == (3, 1)  # "add." is the other word
    assert (g["gram_entropy_mean"], g["non_gram_entropy_mean"], g["gram_entropy_delta"]) == (2.0, 4.5, -2.5)
    assert (row["mean_reward"], row["entropy_mean"], row["gram_entropy_pair_count"]) == (0.25, 3.0, 1)


def test_correctness_is_the_rewards_verdict_or_else_a_reward_of_nearly_one(tmp_path):
    episodes = [spoken(0.2, is_correct=True), spoken(1.0, is_correct=False), spoken(0.99), spoken(0.98)]
    row = EmergenceLogger(tmp_path).log_step(0, episodes, Letters(), examples=[{}] * 4)
    assert [g["metadata"]["correctness"] for g in lines(tmp_path, "generations")] == [True, False, True, False]
    assert (row["correct_count"], row["total_count"]) == (2, 4)


def test_metadata_come_from_the_example_and_are_empty_without_one(tmp_path):
    logger = EmergenceLogger(tmp_path)
    logger.log_step(0, [spoken()], Letters(), examples=[{"target": 24, "numbers": [8, 3], "secret": 1}])
    logger.log_step(1, [spoken()], Letters())
    found = [g["metadata"] for g in lines(tmp_path, "generations")]
    assert found == [{"target": 24, "numbers": [8, 3], "correctness": True}, {}]


def test_a_metadata_extractor_takes_the_place_of_the_usual_entries(tmp_path):
    logger = EmergenceLogger(tmp_path, metadata_extractor=lambda example, reward: {"n": example["n"], "r": reward})
    logger.log_step(0, [spoken(0.5)], Letters(), examples=[{"n": 4}])
    assert lines(tmp_path, "generations")[0]["metadata"] == {"n": 4, "r": 0.5, "correctness": False}


def test_episodes_of_a_buffer_and_their_dicts_are_read_alike(tmp_path):
    buffered = BufferedEpisode(
        obs=[np.array([72, 105])], act=[[79, 107]], rew=[1.0], next_obs=[np.zeros(0)], done=[True], timeout=[False],
        logprob=[np.array([-1.0, -2.0], np.float32)], group=0,
    )  # fmt: skip
    EmergenceLogger(tmp_path).log_step(0, [buffered, buffered.to_dict()], Letters())
    first, second = lines(tmp_path, "generations")
    assert first == second
    assert (first["prompt"], first["completion"], first["tokens"]) == ("Hi", "Ok", [79, 107])


def test_empty_completions_and_unscorable_rewards_are_null_and_never_nan(tmp_path):
    row = EmergenceLogger(tmp_path).log_step(0, [spoken(float("nan"), pieces=())], Letters())
    [g] = lines(tmp_path, "generations")
    assert g["reward"] is None
    assert (g["tokens"], g["gram_entropy_delta"], row["mean_reward"]) == ([], None, None)
    assert "NaN" not in (tmp_path / "generations.jsonl").read_text()


def test_files_are_made_with_the_first_step_appended_to_and_closed_as_often_as_one_likes(tmp_path):
    logger = EmergenceLogger(tmp_path / "later")
    assert not (tmp_path / "later").exists()
    for step in range(2):
        logger.log_step(step, [spoken()], Letters())
        logger.finish()
        logger.finish()
    assert [row["step"] for row in lines(tmp_path / "later", "steps")] == [0, 1]


def test_examples_have_to_be_as_many_as_the_episodes(tmp_path):
    with pytest.raises(UserError, match="1 examples for 2 episodes"):
        EmergenceLogger(tmp_path).log_step(0, [spoken(), spoken()], Letters(), examples=[{}])


def test_a_hundred_completions_are_logged_in_well_under_a_second(tmp_path):
    long = PIECES * 60  # 300 tokens each
    logger = EmergenceLogger(tmp_path)
    logger.log_step(0, [spoken(pieces=long)], Letters())
    started = time.perf_counter()
    row = logger.log_step(1, [spoken(pieces=long)] * 100, Letters())
    assert time.perf_counter() - started < 1
    assert row["logging_overhead_ms"] < 1000
