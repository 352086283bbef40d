"""A small run on the built-in model: the files it writes, and its report when it cannot learn."""

import gc
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.compute as pc
import pytest
from toy_run import make_model, quickly, toy_task

from textpolicy.analysis import load_run
from textpolicy.cli.main import main
from textpolicy.config.settings import Config
from textpolicy.errors import UserError
from textpolicy.run.assembly import claim_folder, with_max_tokens
from textpolicy.tasks import TASKS, load_task

SMALL = [
    "--steps=2",
    "--optimizer.warmup-steps=1",
    "--rollout.prompts-per-step=2",
    "--rollout.group-size=8",
    "--evaluation.every=1",
    "--evaluation.problems=3",
    "--adapter.rank=2",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert main(["train", f"--output={folder}", *SMALL]) == 0
    return folder


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_its_settings_metrics_report_and_adapter(trained):
    assert {p.name for p in trained.iterdir()} == {
        "config.json",
        "versions.json",
        "metrics.jsonl",
        "summary.json",
        "adapter",
        "rollouts",
        "evals",
        "report.html",
        "log.txt",
        "checkpoints",
        ".lock",
    }
    assert json.loads((trained / "config.json").read_text())["adapter"]["rank"] == 2
    assert json.loads((trained / "versions.json").read_text())["mlx"]


def test_every_completion_of_training_and_of_every_evaluation_is_kept(trained):
    run = load_run(trained)
    for step in (0, 1):
        sampled = run.rollouts.filter(pc.field("step") == step)
        assert sampled.num_rows == 2 * 8
        row = run.metrics.slice(step, 1).to_pylist()[0]
        assert sum(sampled["length"].to_pylist()) == row["sampled_tokens"]
        assert np.mean(sampled["reward"].to_pylist()) == pytest.approx(row["reward_mean"])
        assert "".join(sampled["pieces"][0].as_py()).strip() == sampled["text"][0].as_py()
    for evaluation in run.evaluations.to_pylist():
        same = (pc.field("step") == evaluation["step"]) & (pc.field("split") == evaluation["split"])
        correct = run.evals.filter(same)["is_correct"].to_pylist()
        assert (len(correct), np.mean(correct)) == (3, evaluation["accuracy"])


def test_metrics_have_a_row_for_every_step_and_every_evaluation(trained):
    assert [r["step"] for r in rows(trained) if r["kind"] == "train"] == [0, 1]
    looks = [(r["split"], r["step"]) for r in rows(trained) if r["kind"] == "eval"]
    assert looks[:4] == [("test", 0), ("validation", 0), ("validation", 1), ("validation", 2)]
    assert looks[4][0] == "test"
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["test_problems"] == 3
    assert summary["kept_step"] == looks[4][1]


def test_sampled_and_scored_logprobs_agree_on_the_real_model(trained):
    gaps = [r["logprob_gap_max"] for r in rows(trained) if r["kind"] == "train" and r["updated"]]
    assert gaps
    assert max(gaps) < 1e-3


def test_the_kept_adapter_answers_as_the_run_measured(trained, capsys):
    assert main(["eval", f"--run={trained}", "--problems=3", "--show=2"]) == 0
    printed = capsys.readouterr().out
    summary = json.loads((trained / "summary.json").read_text())
    assert f"largest, test: {summary['test_after']:.1%}" in printed
    assert printed.count("->") == 2


def test_a_run_can_be_judged_by_many_samples(trained, capsys):
    args = ["--problems=2", "--samples=4", "--temperature=1", "--pass-at=2", "--pass-at=4", "--show=0"]
    assert main(["eval", f"--run={trained}", *args]) == 0
    average, two, four = capsys.readouterr().out.splitlines()
    assert average.startswith("largest, test: avg@4 ")
    assert average.endswith("] over 2 problems, sampled at temperature 1 (95% interval)")
    shares = [float(line.split("@")[1].split()[1].rstrip("%")) for line in (average, two, four)]
    assert shares == sorted(shares)


@pytest.mark.usefixtures("small_built_in")
def test_a_run_with_tools_a_curriculum_and_sampled_validation(tmp_path):
    flags = ["--task=countdown_tool", "--rollout.curriculum=pass_rate", "--rollout.max-turns=2", "--steps=2"]
    small = ["--rollout.prompts-per-step=2", "--rollout.group-size=2", "--rollout.max-tokens=8", "--adapter.rank=2"]
    judged = ["--evaluation.problems=1", "--evaluation.samples=2", "--evaluation.every=2"]
    done = main(["train", f"--output={tmp_path / 'run'}", "--optimizer.warmup-steps=1", *flags, *small, *judged])
    assert done == 0
    kinds = rows(tmp_path / "run")
    steps = [r for r in kinds if r["kind"] == "train"]
    assert [r["curriculum_seen"] for r in steps] == [2 / 1000, pytest.approx(4 / 1000, abs=1e-3)]
    sampled = [r for r in kinds if r["kind"] == "eval_sampled"]
    assert [r["step"] for r in sampled] == [0, 2]
    assert all(0 <= r["avg@2"] <= r["pass@2"] <= 1 and r["problems"] == 1 for r in sampled)


def test_a_task_sets_the_longest_completion_unless_the_run_does():
    task = load_task("countdown")
    assert with_max_tokens(Config(task="countdown"), task).rollout.max_tokens == task.max_tokens == 64
    said = Config(task="countdown", rollout={"max_tokens": 9, "group_size": 4})
    assert with_max_tokens(said, task) is said
    assert with_max_tokens(Config(rollout={"group_size": 4}), load_task("largest")).rollout.max_tokens == 8
    assert with_max_tokens(Config(task="countdown", rollout={"group_size": 4}), task).rollout.group_size == 4


def test_a_trained_run_completes_prompts(trained, capsys):
    assert main(["generate", f"--run={trained}", "--max-tokens=8", "Largest of 14, 62, 7, 35, 58?"]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["generate", "--model=smollm2-135m", "--max-tokens=8", "What is the capital of France?"]) == 0
    assert "Paris" in capsys.readouterr().out


def test_the_adapter_of_a_run_can_be_attached_to_the_model_by_hand(trained, capsys):
    args = ["--max-tokens=8", "--plain", "The capital of France is"]
    assert main(["generate", "--model=smollm2-135m", f"--adapter={trained / 'adapter'}", *args]) == 0
    by_hand = capsys.readouterr().out
    assert main(["generate", f"--run={trained}", *args]) == 0
    assert capsys.readouterr().out == by_hand


def test_the_adapter_of_a_run_is_used_with_its_model_and_its_prompts(trained, capsys):
    args = ["--max-tokens=8", "Largest of 14, 62, 7, 35, 58?"]
    said = []
    for source in (f"--run={trained}", f"--adapter={trained}", f"--adapter={trained / 'adapter'}"):
        assert main(["generate", source, *args]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2]


def test_an_adapter_without_a_run_needs_its_model_named(trained, tmp_path, capsys):
    shutil.copytree(trained / "adapter", tmp_path / "alone")
    assert main(["generate", f"--adapter={tmp_path / 'alone'}", "hello"]) == 2
    assert "is not part of a run, so its base is unknown; give it with --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args", [["train", "--machine.threads=3"], ["generate", "--model=smollm2-135m", "--threads=3", "hello"]]
)
def test_the_number_of_threads_reaches_the_blas(args, monkeypatch, capsys):
    def refuse(n):
        raise UserError(f"asked for {n} threads")

    monkeypatch.setattr("textpolicy.mlx.blas.set_blas_threads", refuse)
    assert main(args) == 2
    assert "asked for 3 threads" in capsys.readouterr().err


@pytest.fixture
def elsewhere():
    """GB of MLX arrays that other tests hold; what this one limits is put back."""
    import mlx.core as mx

    before = mx.set_memory_limit(2**40)
    gc.collect()
    yield mx.get_active_memory() / 1e9
    mx.set_memory_limit(before)


def test_a_model_that_does_not_fit_is_refused_in_one_sentence_before_anything_is_written(tmp_path, capsys, elsewhere):
    limit = f"--machine.memory-limit-gb={elsewhere + 0.4}"
    assert main(["train", f"--output={tmp_path / 'run'}", limit, *SMALL]) == 2
    said = capsys.readouterr().err
    assert re.match(
        r"textpolicy: an update needs about 0\.\d+ GB for one completion of 8 tokens after a prompt of", said
    )
    assert "0.40 GB may be used; lower rollout.max_tokens, " in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("small_built_in")
def test_a_run_that_is_short_of_memory_reports_it_once_and_stays_within_it(tmp_path, capsys, elsewhere):
    folder, limit = tmp_path / "run", elsewhere + 0.06
    fewer = ["--steps=1", "--rollout.group-size=4", "--evaluation.problems=1"]
    assert main(["train", f"--output={folder}", f"--machine.memory-limit-gb={limit}", *SMALL, *fewer]) == 0
    said = capsys.readouterr().out
    assert said.count("made smaller to fit into memory, without effect on results: an update needs about") == 1
    assert "0.06 GB may be used" in said
    assert max(row["peak_memory_bytes"] for row in rows(folder) if row["kind"] == "train") < 1e9 * limit


def test_runs_without_a_name_get_the_first_free_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [str(claim_folder(Config())) for _ in range(3)] == [
        "runs/largest-grpo-seed0",
        "runs/largest-grpo-seed0-2",
        "runs/largest-grpo-seed0-3",
    ]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot make the output folder"):
        claim_folder(Config(output=tmp_path / "file" / "run"))


@pytest.fixture
def train_toy(tmp_path, monkeypatch):
    """Return a function that trains a tiny model with another reward, into the folder "run" of ``tmp_path``."""
    model = make_model(tmp_path / "model")
    quickly(monkeypatch)

    def train(reward):
        monkeypatch.setitem(TASKS, "toy", lambda: replace(toy_task(), reward=reward))
        return main(["train", "--task=toy", f"--model={model}", f"--output={tmp_path / 'run'}", *SMALL])

    return train


def test_a_constant_reward_moves_nothing_and_the_run_reports_it(tmp_path, train_toy, capsys):
    assert train_toy(lambda prompt, completion, example: (0.25, False)) == 0
    train = [r for r in rows(tmp_path / "run") if r["kind"] == "train"]
    assert [r["updated"] for r in train] == [0, 0]
    assert [r["grad_norm"] for r in train] == [0, 0]
    assert [r["frac_reward_zero_std"] for r in train] == [1, 1]
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "The adapter did not move: in 2 of 2 steps the rewards within every group were equal (mean always 0.25)" in said
    )

    import mlx.core as mx

    adapter = mx.load(str(tmp_path / "run" / "adapter" / "adapters.safetensors"))
    assert all(not value.any() for name, value in adapter.items() if name.endswith("lora_b"))


def test_a_reward_that_raises_stops_in_one_sentence_and_leaves_no_folder(tmp_path, train_toy, capsys):
    def broken(prompt, completion, example):
        raise KeyError("score")

    assert train_toy(broken) == 2
    err = capsys.readouterr().err
    assert err.startswith("textpolicy: reward 'broken' raised KeyError")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_reward_that_returns_text_is_named(tmp_path, train_toy, capsys):
    assert train_toy(says_good) == 2
    assert "reward 'says_good' returned 'good'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def says_good(prompt, completion, example):
    return "good"
