"""train_math against the real server: it trains, and what was cut off resumes to the very same numbers."""

import json

import numpy as np
import pytest

from textpolicy.tasks import TASKS, Problem, Task
from textpolicy.tinker.engine import TinkerEngine
from textpolicy.tinker.train_math import TrainMathArguments, main, train

pytest.importorskip("tinker", reason="the Tinker SDK is not installed: pip install 'textpolicy[tinker]'")

FOLDERS = ("whole", "cut")


@pytest.fixture
def letters(monkeypatch):
    """A task that a random model can be better or worse at: saying vowels."""

    def reward(prompt, completion, example, **kwargs):
        share = sum(letter in "aeiou" for letter in completion.lower()) / (1 + len(completion))
        return {"reward": share, "is_correct": share > 0.1}

    problems = tuple(Problem(f"Say {letter}.", letter) for letter in "abcdefgh")
    task = Task("letters", "vowels", problems[:6], problems[6:7], problems[7:], lambda q: [message(q)], reward)
    monkeypatch.setitem(TASKS, "letters", lambda: task)


def message(question):
    return {"role": "user", "content": question}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def failing(connect):
    """``TinkerEngine.connect`` with an engine that fails in the update of the fourth step."""

    def unfinished(*args, **settings):
        engine, updates = connect(*args, **settings), []

        def update(batch, surrogate, learning_rate):
            updates.append(batch)
            if len(updates) == 4:
                raise ConnectionError("the power is gone")
            return type(engine).update(engine, batch, surrogate, learning_rate)

        engine.update = update
        return engine

    return unfinished


@pytest.mark.slow
def test_a_run_that_was_cut_off_resumes_to_the_very_same_numbers(tinker_server, no_tinker_account, letters, tmp_path):
    args = {
        name: TrainMathArguments(
            model=tinker_server.name, base_url=tinker_server.url, lora_rank=4, task="letters",
            log_dir=tmp_path / name, max_steps=4, batch_size=2, group_size=4, max_tokens=16, lr=1e-3, temperature=1.0,
            save_every=2, eval_every=4, eval_problems=1, sepa_steps=2, sepa_delay_steps=0, sepa_correct_rate_gate=0,
        )
        for name in FOLDERS
    }  # fmt: skip
    train(args["whole"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TinkerEngine, "connect", failing(TinkerEngine.connect))
        with pytest.raises(ConnectionError):
            train(args["cut"])
    train(args["cut"].model_copy(update={"resume": True}))
    whole, cut = (lines(tmp_path / name / "metrics.jsonl") for name in FOLDERS)
    compared = ("step", "mean_reward", "correct_rate", "running_correct_rate", "sepa_lambda")
    assert [[row[key] for key in compared] for row in cut] == [[row[key] for key in compared] for row in whole]
    # the server keeps the resumed adapter in another place, sums in another order, and decodes what has come
    for key, tolerance in {"grad_norm": {"rtol": 1e-5}, "loss": {"atol": 1e-6}}.items():
        np.testing.assert_allclose([row[key] for row in cut], [row[key] for row in whole], **tolerance)
    assert any(row["updated"] for row in whole[:2])
    assert any(row["updated"] for row in whole[2:])  # else there would be nothing to restore exactly
    assert max(row["sampler_kl"] for row in whole if row["updated"]) < 1e-4
    output = [[g["tokens"] for g in lines(tmp_path / name / "emergence" / "generations.jsonl")] for name in FOLDERS]
    assert output[0] == output[1]
    assert all(
        line["state_path"].startswith("tinker://") for name in FOLDERS
        for line in lines(tmp_path / name / "checkpoints.jsonl")
    )  # fmt: skip


def test_a_model_that_the_server_does_not_have_is_refused_before_anything_is_written(
    tinker_server, no_tinker_account, tmp_path, capsys
):
    args = [f"--base-url={tinker_server.url}", "--model=nobodys/model", f"--log-dir={tmp_path / 'run'}"]
    assert main([*args, "--task=math_generated"]) == 2
    assert "there is no model on this Tinker server 'nobodys/model'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
