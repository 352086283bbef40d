"""Faults during a run: each is reported in one sentence, and nothing already written is lost."""

import errno
import itertools
import json
import math
import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from conftest import random_episodes, recipe
from toy_run import letters, metrics, outcome, quickly, settings, toy_task

from textpolicy._system.faults import resumable_errors
from textpolicy.cli.main import main
from textpolicy.mlx.engine import MLXEngine
from textpolicy.record.metrics_file import MetricsFile
from textpolicy.rewards.scoring import Scorer
from textpolicy.run import training_run as run_module
from textpolicy.tasks import TASKS
from textpolicy.tasks.base import Problem


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    quickly(monkeypatch)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return settings(tmp_path_factory.mktemp("toy"), steps=3)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run without faults."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        quickly(patch)
        assert main(["train", str(config), f"--output={folder}"]) == 0
    return folder


def stopped(capsys, *argv):
    """Return the error of a run that cannot continue, which is one sentence, and what it printed before."""
    capsys.readouterr()
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert err.startswith("textpolicy: ")
    assert err.count("\n") == 1
    return err, " ".join(out.split())


def failing(true, error, first, last=math.inf):
    """Return ``true``, whose calls from ``first`` to ``last``, counted from 1, raise ``error``."""
    calls = []

    def call(*arguments, **keywords):
        calls.append(1)
        if first <= len(calls) <= last:
            raise error
        return true(*arguments, **keywords)

    return call


def steps(folder):
    return [row for row in metrics(folder) if row["kind"] == "train"]


# ---- the disk


def no_room():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("what", ["sync", "metrics", "weights", "rename"])
def test_a_full_disk_stops_the_run_and_it_resumes_when_there_is_room(
    config, whole, tmp_path, capsys, monkeypatch, what
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        match what:
            case "sync":
                patch.setattr(os, "fsync", failing(os.fsync, no_room(), 40))
            case "metrics":
                patch.setattr(MetricsFile, "write", failing(MetricsFile.write, no_room(), 4))
            case "weights":
                patch.setattr(MLXEngine, "write_state", failing(MLXEngine.write_state, no_room(), 3))
            case "rename":
                patch.setattr(os, "replace", failing(os.replace, no_room(), 5))
        message, _ = stopped(capsys, "train", str(config), f"--output={folder}")
    assert f"the run in {folder} cannot write or read its files (No space left on device)" in message
    assert f"resume with: textpolicy train --resume {folder}" in message
    assert main(["train", f"--resume={folder}"]) == 0
    assert outcome(folder) == outcome(whole)


def test_a_folder_that_cannot_be_written_to_is_named(config, tmp_path, capsys, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(os, "open", failing(os.open, PermissionError(errno.EROFS, os.strerror(errno.EROFS)), 1))
    message, _ = stopped(capsys, "train", str(config), f"--output={tmp_path / 'run'}")
    assert "cannot be written to (Read-only file system); make it writable" in message


def test_an_error_of_the_network_is_not_taken_for_one_of_the_disk(tmp_path):
    with pytest.raises(ConnectionError), resumable_errors(tmp_path):
        raise ConnectionResetError("reset")


# ---- memory


@pytest.mark.parametrize(
    "error", [RuntimeError("[malloc] Unable to allocate 99 bytes."), MemoryError(), RuntimeError("CUDA out of memory")]
)
def test_a_run_out_of_memory_names_the_settings_to_lower_and_resumes(
    config, whole, tmp_path, capsys, monkeypatch, error
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(MLXEngine, "update", failing(MLXEngine.update, error, 4))
        message, _ = stopped(capsys, "train", str(config), f"--output={folder}")
    assert "memory ran out" in message
    assert "lower machine.micro_batch_tokens or machine.decode_rows" in message
    assert main(["train", f"--resume={folder}", "--allow=machine", "--machine.micro-batch-tokens=4096"]) == 0
    assert outcome(folder)["metrics"] == outcome(whole)["metrics"]  # of this size a micro-batch holds all, too


def test_any_other_runtime_error_is_passed_on(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"), resumable_errors(tmp_path):
        raise RuntimeError("a bug")


# ---- numbers


def test_a_gradient_that_is_not_finite_moves_nothing(tiny_engine):
    rng = np.random.default_rng(0)
    grpo = recipe("grpo")
    batch = grpo.credit(random_episodes(rng))
    tiny_engine.update(batch, grpo.surrogate, 1e-3)
    before = {k: np.array(v) for k, v in tiny_engine.weights().items()}
    taken = int(tiny_engine.optimizer.step)
    broken = replace(batch, advantages=np.where(batch.advantages != 0, np.float32(np.inf), batch.advantages))
    row = tiny_engine.update(broken, grpo.surrogate, 1e-3)
    assert (row["skipped"], row["updated"]) == (1.0, 0.0)
    assert all(np.isfinite(value) for value in row.values())
    assert all((np.array(v) == before[k]).all() for k, v in tiny_engine.weights().items())
    assert int(tiny_engine.optimizer.step) == taken


def nan_gradients(true, first, last):
    calls = []

    def gradients(self, batch, objective):
        calls.append(1)
        stats, grads = true(self, batch, objective)
        return ({**stats, "loss": math.nan} if first <= len(calls) <= last else stats), grads

    return gradients


def test_a_step_that_is_not_finite_is_skipped_and_counted(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(MLXEngine, "gradients", nan_gradients(MLXEngine.gradients, 3, 4))
    assert main(["train", str(config), f"--output={tmp_path / 'run'}"]) == 0
    assert [(row["skipped"], row["updated"]) for row in steps(tmp_path / "run")] == [(0, 2), (2, 0), (0, 2)]
    assert "In 1 of 3 steps a loss or gradient was not finite" in capsys.readouterr().out


def test_a_run_of_steps_that_are_not_finite_is_stopped(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(MLXEngine, "gradients", nan_gradients(MLXEngine.gradients, 1, math.inf))
    message, _ = stopped(capsys, "train", str(config), f"--output={tmp_path / 'run'}", "--optimizer.max-skipped=2")
    assert "the loss or gradient of the last 2 steps was not finite; lower optimizer.learning_rate" in message
    assert len(steps(tmp_path / "run")) == 2


def test_a_model_that_only_stops_trains_to_the_end(tmp_path, capsys):
    path = settings(tmp_path, steps=2)
    model = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**model, "eos_token_id": list(range(257))}))
    assert main(["train", str(path), f"--output={tmp_path / 'run'}"]) == 0
    assert [row["length_max"] for row in steps(tmp_path / "run")] == [1.0, 1.0]


# ---- rewards


def with_reward(monkeypatch, reward):
    monkeypatch.setitem(TASKS, "toy", lambda: replace(toy_task(), reward=reward))


def nan_of_many(prompt, completion, example):
    return math.nan if "a" in completion else letters(prompt, completion, example)


def none_of_many(prompt, completion, example):
    return None if "a" in completion else letters(prompt, completion, example)


@pytest.mark.parametrize("reward", [nan_of_many, none_of_many])
def test_completions_that_cannot_be_scored_are_not_trained_on_and_are_counted(config, tmp_path, monkeypatch, reward):
    with_reward(monkeypatch, reward)
    assert main(["train", str(config), f"--output={tmp_path / 'run'}"]) == 0
    assert any(row["unscorable"] > 0 for row in steps(tmp_path / "run"))


@pytest.mark.parametrize("size", [1e30, 1e200, 1e308])
def test_a_huge_reward_gives_finite_numbers_or_an_error_of_one_sentence(config, tmp_path, capsys, monkeypatch, size):
    with_reward(monkeypatch, lambda prompt, completion, example: (size * len(completion), len(completion) > 2))
    code = main(["train", str(config), f"--output={tmp_path / 'run'}"])
    error = capsys.readouterr().err
    assert (code, error) == (0, "") or (code == 2 and error.count("\n") == 1)
    for row in steps(tmp_path / "run") if (tmp_path / "run").exists() else ():
        assert all(math.isfinite(value) for key, value in row.items() if key != "kind")


def test_a_reward_that_raises_midway_keeps_the_finished_steps(config, whole, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        with_reward(patch, failing(letters, KeyError("score"), 60))
        message, before = stopped(capsys, "train", str(config), f"--output={folder}")
    assert "raised KeyError" in message
    assert f"resume with: textpolicy train --resume {folder}" in before
    assert main(["train", f"--resume={folder}"]) == 0
    assert outcome(folder) == outcome(whole)


def test_a_reward_that_hangs_costs_its_limit(config, tmp_path, monkeypatch):
    calls, over = itertools.count(), threading.Event()

    def slow(prompt, completion, example):
        if 20 <= next(calls) < 24:  # after the first evaluations
            over.wait(30)
            return 0.0  # a draw of a late thread would be another test's
        return letters(prompt, completion, example)

    with_reward(monkeypatch, Scorer(slow, time_limit=2, concurrency=16, on_failure="unscorable"))
    try:
        assert main(["train", str(config), f"--output={tmp_path / 'run'}"]) == 0
    finally:
        over.set()
    unscorable = [row["unscorable"] for row in steps(tmp_path / "run")]
    assert unscorable[0] > 0
    assert all(share < 1 for share in unscorable)


# ---- data


def with_questions(monkeypatch, questions):
    problems = tuple(Problem(q, "x") for q in questions)
    monkeypatch.setitem(TASKS, "toy", lambda: replace(toy_task(), train=problems))


@pytest.mark.parametrize(
    ("question", "sentence"),
    [
        ("", "prompt 0 is blank; give it some text"),
        (" \n\t", "prompt 0 is blank; give it some text"),
        ("word " * 400, "the longest prompt with what may follow it has 2006 tokens and the context of"),
        ("half a \ud83d smiley", "prompt 0 contains half a character"),
    ],
)
def test_a_prompt_that_cannot_be_trained_on_is_refused_before_anything_is_written(
    config, tmp_path, capsys, monkeypatch, question, sentence
):
    with_questions(monkeypatch, [question, "Type 1"])
    message, _ = stopped(capsys, "train", str(config), f"--output={tmp_path / 'run'}")
    assert sentence in message
    assert list(tmp_path.iterdir()) == []


def test_repeated_prompts_are_prompts_like_others(config, tmp_path, monkeypatch):
    with_questions(monkeypatch, ["Type 1"] * 8)
    assert main(["train", str(config), f"--output={tmp_path / 'run'}"]) == 0
    assert len(steps(tmp_path / "run")) == 3


def test_fewer_prompts_than_a_step_draws_are_repeated(config, tmp_path, monkeypatch):
    with_questions(monkeypatch, ["Type 1"])
    assert main(["train", str(config), f"--output={tmp_path / 'run'}"]) == 0


# ---- clocks and secrets


def test_a_clock_that_jumps_changes_nothing(config, whole, tmp_path, monkeypatch):
    true, jumps = time.time, iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: true() + (-1) ** next(jumps) * 1e9)
    assert main(["train", str(config), f"--output={tmp_path / 'run'}"]) == 0
    assert outcome(tmp_path / "run") == outcome(whole)
    assert 0 < json.loads((tmp_path / "run" / "summary.json").read_text())["train_seconds"] < 1e6


SECRETS = {
    name: f"planted-{name.lower()}-7f3a"
    for name in ("TINKER_API_KEY", "WANDB_API_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD")
}


def test_planted_secrets_are_in_nothing_a_run_prints_or_writes(config, tmp_path, capfd, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    assert main(["train", str(config), f"--output={tmp_path / 'run'}"]) == 0
    with_reward(monkeypatch, failing(letters, KeyError("score"), 60))
    assert main(["train", str(config), f"--output={tmp_path / 'broken'}"]) == 2
    printed = "".join(capfd.readouterr())
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert len(written) > 10_000
    for value in SECRETS.values():
        assert value not in printed
        assert value.encode() not in written


def test_a_run_name_cannot_leave_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from textpolicy.config.settings import Config

    for task in ("../../etc/x", "a/b", "..", "a\0b", "reasoning_gym:chain_sum"):
        made = run_module.claim_folder(Config().model_copy(update={"task": task}))
        assert made.resolve().parent == tmp_path / "runs"
    assert {p.name for p in tmp_path.iterdir()} == {"runs"}


def test_evaluation_of_a_split_without_verdicts_is_reported(config, tmp_path, capsys, monkeypatch):
    with_reward(monkeypatch, lambda prompt, completion, example: float(len(completion)))
    message, _ = stopped(capsys, "train", str(config), f"--output={tmp_path / 'run'}")
    assert "the reward never says whether a completion is correct" in message
    assert not (tmp_path / "run").exists()
