"""Every argument of generate, eval and export is looked at before a model is loaded; each task has its own limits."""

import json
import shutil

import pytest
from tiny_folder import SMALL, write_tiny_model

from textpolicy.cli.main import main
from textpolicy.config.settings import Config
from textpolicy.errors import UserError
from textpolicy.run.training_run import run

OWN = """
from dataclasses import replace

from textpolicy.tasks import task_from_rows

def length(prompt, completion, example, **_):
    return len(completion) / 9

def task():
    return task_from_rows([{"question": f"{i}?"} for i in range(30)], length, max_tokens=4)

def few():
    return replace(task(), validation=())

def broken():
    raise OSError("no disk")

def bare():
    return task_from_rows([{"question": f"{i}?"} for i in range(30)], length)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a model, a run of it, one whose task is gone, and a file of tasks."""
    root = tmp_path_factory.mktemp("work")
    write_tiny_model(root / "model", mkdir=True)
    (root / "own.py").write_text(OWN)
    values = {**SMALL, "optimizer": {}, "model": str(root / "model"), "output": root / "run", "quiet": True}
    run(Config.model_validate(values))  # of two steps, in which the default warm-up of three ends
    (root / "gone").mkdir()
    config = json.loads((root / "run" / "config.json").read_text()) | {"task": str(root / "deleted.py")}
    (root / "gone" / "config.json").write_text(json.dumps(config))
    return root


def refused(capsys, words):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


RUN, MODEL = ["--run", "run"], ["--model", "model"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["generate", *RUN, "--temperature", "nan", "hi"], "temperature is nan"),
        (["generate", *MODEL, "--top-p", "inf", "hi"], "top_p is inf"),
        (["generate", *MODEL, "--min-p=-0.1", "hi"], "min_p is -0.1"),
        (["generate", *MODEL, "--top-k", "-1", "hi"], "top_k is -1"),
        (["generate", *MODEL, "--repetition-penalty=nan", "hi"], "repetition_penalty is nan"),
        (["generate", *MODEL, "--seed", "-1", "hi"], "seed is -1"),
        (["generate", *MODEL, "--seed=99999999999999999999", "hi"], "seed is 99999999999999999999"),
        (["generate", *MODEL, "--max-tokens", "4097", "hi"], "max_tokens is 4097 and the longest prompt has"),
        (["generate", *RUN, "--max-tokens", "2000000000", "hi"], "the context of"),
        (["generate", *MODEL, "x" * 5000], "lower --max-tokens, or shorten the prompts"),
        (["generate", *MODEL, "--threads=-1", "hi"], "threads is -1"),
        (["generate", *MODEL, "--template-args=enable_thinking=true", "hi"], "does not read 'enable_thinking'"),
        (["generate", "--run", "gone", "hi"], "deleted.py"),
        (["generate", "--adapter", "own.py", "--model", "model", "hi"], "own.py"),
        (["generate", "--adapter=model", "--model=model", "hi"], "has no adapter_config.json"),
        (["generate", "--run", "n" * 300, "hi"], "nnn is not a run folder"),
        (["generate", "--adapter", "n" * 300, "hi"], "cannot be used (File name too long)"),
        (["eval", *RUN, "--pass-at", "2"], "pass_at is 2 and samples 1"),
        (["eval", *RUN, "--samples", "4", "--temperature=1", "--pass-at=1", "8"], "pass_at is 8 and samples 4"),
        (["eval", *RUN, "--samples=0"], "samples is 0"),
        (["eval", *RUN, "--temperature=inf"], "temperature is inf"),
        (["eval", *RUN, "--max-tokens", "4097"], "max_tokens is 4097"),
        (["eval", *RUN, "--seed", "-3"], "seed is -3"),
        (["eval", *RUN, "--split", "tests"], "split is tests"),
        (["eval", *RUN, "--task", "own.py:none"], "none"),
        (["eval", *RUN, "--task", "own.py:broken"], "no disk"),
        (["eval", *MODEL, "--task", "own.py:few", "--split", "validation"], "no problems in its validation split"),
        (["eval", *MODEL, "--task", "own.py", "--rewards.time-limit=-1"], "rewards.time_limit is -1"),
        (["eval", *MODEL, "--task", "own.py", "--rewards.correct-from", "nan"], "rewards.correct_from is nan"),
        (["eval", *MODEL, "--task", "largest", "--template-args=a=1"], "does not read 'a'"),
        (["eval", "--run", "gone"], "deleted.py"),
        (["export", "run", "--to", "gguf", "--dtype", "float16"], "--dtype float16 does not apply"),
        (["export", "run", "--to", "peft", "--base", "nowhere"], "neither a folder nor a hub id"),
        (["export", "--model", "model", "--to", "peft", "--out", "o"], "no adapter for --to peft"),
        (["export", "run", "--to", "hf", "--out", "own.py/x"], "own.py is not a folder to write to"),
        (["export", "run", "--to", "mlx", "--out", "o" * 300], "cannot write ooo"),
        (["export", "run", "--to", "mlx", "--out", "model"], "model exists"),
        (["export", "run", "--to", "mlx", "--threads", "-2"], "threads is -2"),
        (["export", "run", "--adapter=run", "--to=mlx"], "--adapter run is given with a run, which has its own"),
        (["export", "gone", "--to", "gguf"], "has no adapter"),
    ],
)
def test_no_model_is_loaded_for_arguments_that_cannot_work(trained, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(trained)
    monkeypatch.setattr("textpolicy.mlx.models.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    before = sorted(trained.rglob("*"))
    assert sentence in refused(capsys, words)
    assert sorted(trained.rglob("*")) == before


def test_an_answer_ends_where_the_context_does_unless_a_length_was_asked_for(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    config = json.loads((trained / "model" / "config.json").read_text())
    short = trained / "short"
    short.mkdir()
    for file in (trained / "model").iterdir():
        (short / file.name).write_bytes(file.read_bytes())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    assert main(["generate", "--model", "short", "a" * 10]) == 0
    assert len(capsys.readouterr().out) <= 40
    assert "max_tokens is 39" in refused(capsys, ["generate", "--model=short", "--max-tokens=39", "a" * 10])


@pytest.mark.parametrize(
    ("words", "tokens"),
    [
        (RUN, 3),  # the run's own
        ([*RUN, "--task", "largest"], 3),
        ([*RUN, "--task", "countdown"], 64),
        ([*RUN, "--task", "own.py", "--rewards.correct-from=1"], 4),
        ([*RUN, "--task", "own.py:bare", "--rewards.correct-from=1"], 3),  # a task without a length of its own
        ([*RUN, "--task", "countdown", "--max-tokens", "7"], 7),
        ([*MODEL, "--task", "countdown"], 64),
    ],
)
def test_another_task_has_its_own_length(trained, monkeypatch, words, tokens):
    monkeypatch.chdir(trained)
    seen = []

    def measured(engine, env, sampling, samples):
        seen.append((sampling.max_tokens, env.max_tokens))
        raise UserError("measured")

    monkeypatch.setattr("textpolicy.run.inference.evaluate_engine", measured)
    assert main(["eval", *words, "--problems=2"]) == 2
    assert seen == [(tokens, tokens)]


def test_what_is_correct_can_be_said_where_the_reward_does_not_say_it(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    own = ["eval", *MODEL, "--task", "own.py", "--show=0"]
    assert "correct_from" in refused(capsys, own)
    for limit, right in (("-1", "100.0%"), ("2", "0.0%")):
        assert main([*own, f"--rewards.correct-from={limit}"]) == 0
        assert f"test: {right}" in capsys.readouterr().out


@pytest.mark.parametrize("values", [{"steps": 2, "warmup": 3}, {"steps": 1, "warmup": 2}, {"steps": 5, "warmup": 500}])
def test_a_warm_up_longer_than_the_run_is_refused_before_the_model_loads(tmp_path, capsys, values):
    config, campaign = tmp_path / "c.toml", tmp_path / "arms.toml"
    steps, warmup = f"steps = {values['steps']}\n", f"warmup_steps = {values['warmup']}\n"
    config.write_text(f"{steps}model = './none'\n[optimizer]\n{warmup}")
    campaign.write_text(f"[base]\n{steps}[arms.a]\n[arms.b.optimizer]\n{warmup}")
    sentence = f"optimizer.warmup_steps is {values['warmup']} and steps {values['steps']}"
    assert sentence in refused(capsys, ["train", str(config)])
    assert sentence in refused(capsys, ["campaign", "plan", str(campaign)])


def test_a_run_shorter_than_the_default_warm_up_is_resumed(trained, tmp_path):
    written = json.loads((trained / "run" / "config.json").read_text())
    assert written["optimizer"]["warmup_steps"] > written["steps"]
    shutil.copytree(trained / "run", tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    assert main(["train", "--resume", str(tmp_path / "run"), "--quiet"]) == 0
    assert (tmp_path / "run" / "summary.json").exists()
