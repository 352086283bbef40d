"""The run folder: it records what was sampled and credited, in atomic, small files that are easily cut back."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from conftest import random_episodes, recipe

pa = pytest.importorskip("pyarrow", reason="run folders are Parquet files")

from textpolicy.analysis import load_run  # noqa: E402
from textpolicy.errors import UserError  # noqa: E402
from textpolicy.record import layout  # noqa: E402
from textpolicy.record.recorder import Recorder  # noqa: E402
from textpolicy.types import Completion, Episode  # noqa: E402


def spell(tokens):
    return [f" {t}" for t in tokens]


def credited(episodes, name="hicra"):
    algorithm = recipe(name)
    return algorithm.credited(episodes, algorithm.tokens(episodes, algorithm.controller()))


@pytest.fixture
def run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    return tmp_path


@pytest.fixture
def episodes():
    return random_episodes(np.random.default_rng(0))


def recorded(run, step=0):
    return load_run(run).rollouts.to_pylist()


def test_every_completion_comes_back_token_by_token(run, episodes):
    trained = credited(episodes)
    Recorder(run, spell).step(3, {}, trained)
    rows = recorded(run)
    assert len(rows) == len(episodes)
    for row, e in zip(rows, trained, strict=True):
        n = len(row["prompt_tokens"])
        assert row["prompt_tokens"] + row["tokens"] == e.tokens.tolist()
        assert row["length"] == len(row["tokens"]) == e.mask.sum()
        assert row["pieces"] == [f" {t}" for t in row["tokens"]]
        assert row["logprobs"] == e.logprobs[n:].tolist()  # to the bit
        assert row["entropy"] == pytest.approx(e.entropy[n:].tolist(), rel=1e-3)
        assert row["credit"] == e.credited.credit[n:].tolist()
        assert row["planning"] == e.credited.planning[n:].tolist()
        assert (row["reward"], row["group"], row["step"], row["split"]) == (e.reward, e.group, 3, "train")
        assert row["sampled"] is None
        assert row["finish_reason"] == "stop"


def test_the_advantage_is_that_of_the_group_and_the_credit_that_of_the_batch(run, episodes):
    algorithm = recipe("hicra")
    Recorder(run, spell).step(0, {}, credited(episodes))
    batch = algorithm.credit(episodes)
    for i, row in enumerate(recorded(run)):
        members = [e.reward for e in episodes if e.group == row["group"]]
        if len(set(members)) == 1:
            assert row["advantage"] == 0
        else:
            assert np.sign(row["advantage"]) == np.sign(row["reward"] - np.mean(members))
        trained = batch.advantages[i][batch.weights[i] != 0]
        np.testing.assert_array_equal(np.float32(row["credit"]), trained)


def test_unknown_values_are_null(run, episodes):
    first = replace(
        episodes[0], entropy=None, reward=float("nan"), truncated=True, scores={"a": 1.0, "b": float("nan")}
    )
    Recorder(run, spell).step(0, {}, [first])
    [row] = recorded(run)
    assert row["reward"] is row["entropy"] is row["credit"] is row["advantage"] is row["learner_logprobs"] is None
    assert row["scores"] == [("a", 1.0), ("b", None)]
    assert row["finish_reason"] == "length"


def test_the_learners_logprobs_are_kept_where_they_were_computed(run, episodes):
    scored = replace(episodes[0], learner=episodes[0].logprobs + np.float32(0.25))
    Recorder(run, spell).step(0, {}, [scored, episodes[1]])
    first, second = recorded(run)
    assert np.float32(first["learner_logprobs"]) - np.float32(first["logprobs"]) == pytest.approx(0.25)
    assert second["learner_logprobs"] is None


def test_replies_of_an_environment_are_kept_and_marked(run):
    turn = Completion(np.array([4, 5], np.int32), np.array([-1, -2], np.float32))
    episode = Episode.from_turns([1, 2], [turn, turn], [[7, 8, 9]], reward=1.0, group=0)
    Recorder(run, spell).step(0, {}, [episode])
    [row] = recorded(run)
    assert row["tokens"] == [4, 5, 7, 8, 9, 4, 5]
    assert row["sampled"] == [True, True, False, False, False, True, True]
    assert row["logprobs"] == [-1, -2, 0, 0, 0, -1, -2]
    assert row["length"] == 4


def test_text_that_utf8_has_no_bytes_for_does_not_stop_a_run(run, episodes):
    Recorder(run, lambda tokens: ["\ud800"] * len(tokens)).step(0, {}, [replace(episodes[0], text="a\ud800b")])
    assert recorded(run)[0]["text"] == "a?b"


def test_evaluations_have_files_of_their_own(run, episodes):
    recorder = Recorder(run, spell)
    greedy = [replace(e, temperature=0.0) for e in episodes]
    recorder.evaluated(0, "validation", {"kind": "eval"}, greedy)
    recorder.evaluated(0, "validation", {"kind": "eval_sampled"}, episodes)
    recorder.evaluated(20, "test", {"kind": "eval"}, greedy)
    names = [p.name for p in layout.parquet_files(run / "evals")]
    assert names == ["test-000020.parquet", "validation-000000.parquet", "validation-sampled-000000.parquet"]
    evals = load_run(run).evals
    assert evals.num_rows == 3 * len(episodes)
    assert set(evals["split"].to_pylist()) == {"validation", "test"}


def test_a_run_is_cut_back_to_a_step(run, episodes):
    recorder = Recorder(run, spell)
    for step in range(5):
        recorder.step(step, {}, episodes)
        recorder.evaluated(step + 1, "validation", {}, episodes)
    (run / "rollouts" / ".step-000002.parquet.part").write_text("half")  # what a crash leaves
    layout.drop_from(run, 3)
    assert not list((run / "rollouts").glob(".*"))
    loaded = load_run(run)
    assert set(loaded.rollouts["step"].to_pylist()) == {0, 1, 2}
    assert set(loaded.evals["step"].to_pylist()) == {1, 2, 3}


def test_a_write_that_fails_leaves_the_file_before_it_and_no_part_that_is_read(run, episodes, monkeypatch):
    recorder = Recorder(run, spell)
    recorder.step(0, {}, episodes)
    before = layout.rollouts_path(run, 0).read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for step in (0, 1):
        with pytest.raises(OSError, match="No space left"):
            recorder.step(step, {}, episodes[:1])
    assert layout.rollouts_path(run, 0).read_bytes() == before
    assert load_run(run).rollouts.num_rows == len(episodes)


def test_a_folder_without_completions_gives_empty_tables_with_their_columns(run):
    assert load_run(run).rollouts.schema == layout.schema()
    assert load_run(run).read("evals", ["step", "reward"]).column_names == ["step", "reward"]


def test_some_columns_of_some_rows_are_read_alone(run, episodes):
    import pyarrow.compute as pc

    Recorder(run, spell).step(0, {}, episodes)
    right = load_run(run).read("rollouts", ["group", "reward"], pc.field("reward") == 1)
    assert right.to_pydict() == {
        "group": [e.group for e in episodes if e.reward == 1],
        "reward": [1.0 for e in episodes if e.reward == 1],
    }


def test_metrics_have_a_column_for_every_name_and_the_line_being_written_is_left_out(run):
    rows = [
        {"kind": "train", "step": 0, "reward_mean": 0.5},
        {"kind": "eval", "step": 0, "split": "test", "accuracy": 0.5, "problems": 2},
        {"kind": "train", "step": 1, "entropy": 1.5},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(lines + '{"kind": "train", "st')
    loaded = load_run(run)
    assert loaded.metrics.to_pydict() == {
        "kind": ["train"] * 2, "step": [0, 1], "reward_mean": [0.5, None], "entropy": [None, 1.5],
    }  # fmt: skip
    assert loaded.evaluations["accuracy"].to_pylist() == [0.5]
    assert loaded.metrics.to_pandas()["entropy"].iloc[1] == 1.5


def test_versions_and_summary_are_those_of_the_files_and_empty_without_them(run):
    (run / "metrics.jsonl").write_text("")
    assert (load_run(run).versions, load_run(run).summary, load_run(run).config) == ({}, {}, {})
    (run / "versions.json").write_text('{"mlx": "0.30"}')
    (run / "summary.json").write_text('{"kept_step": 3}')
    assert (load_run(run).versions, load_run(run).summary) == ({"mlx": "0.30"}, {"kept_step": 3})
    (run / "summary.json").write_text('"done"')
    with pytest.raises(UserError, match=r"summary\.json is not a JSON object; the run folder is damaged"):
        load_run(run).summary  # noqa: B018


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        load_run(tmp_path)


def test_a_generated_token_takes_less_than_100_bytes(run):
    """Completions as long as those of the default task, with credit, entropy and log-probs that do not repeat."""
    rng = np.random.default_rng(1)
    episodes = []
    for g in range(16):
        prompt = rng.integers(1, 49_000, 60).tolist()
        for _ in range(8):
            t = int(rng.integers(2, 6))
            completion = Completion(
                rng.integers(1, 49_000, t).astype(np.int32), -rng.random(t).astype(np.float32),
                rng.random(t).astype(np.float32),
            )  # fmt: skip
            texts = {
                "prompt": f"Largest of {prompt[:5]}?",
                "text": " ".join(spell(completion.tokens)),
                "pieces": ("",) * t,
            }
            episodes.append(
                Episode.from_completion(prompt, completion, reward=float(rng.random() < 0.5), group=g, **texts)
            )
    Recorder(run, spell).step(0, {}, credited(episodes, "gtpo"))
    tokens = sum(int(e.mask.sum()) for e in episodes)
    assert layout.rollouts_path(run, 0).stat().st_size / tokens < 100
