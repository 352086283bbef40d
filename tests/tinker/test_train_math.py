r"""The command train_math, against a stand-in for the server: its flags, files, money, and how it resumes."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fake_remote import FakeRemote, Server

from textpolicy.algorithms import algorithm
from textpolicy.cli.main import main as textpolicy
from textpolicy.errors import ServiceError, UserError
from textpolicy.losses import ImportanceSampling, Surrogate
from textpolicy.record.reader import load_run
from textpolicy.tasks import load_task
from textpolicy.tinker.engine import TinkerEngine
from textpolicy.tinker.train_math import TrainMathArguments, dry_run, grams_of, load_key, main, recipe_of, train

DOCUMENTED = {
    "model": "Qwen/Qwen3-4B-Instruct-2507", "base_url": None, "lora_rank": 32, "algorithm": None, "max_steps": 500,
    "batch_size": 8, "group_size": 16, "max_tokens": 2048, "temperature": 0.7, "lr": 4e-5, "weight_decay": 0.0,
    "max_examples": None, "save_every": 20, "gtpo_beta": 0.1, "hicra_alpha": 0.2, "sepa_steps": 500,
    "sepa_schedule": "linear", "sepa_delay_steps": 50, "sepa_correct_rate_gate": 0.1, "strategic_grams": None,
    "log_dir": Path("logs/tinker_math"),
}  # fmt: skip
METRICS = [
    "step",
    "algorithm",
    "advantage_mode",
    "transform_mode",
    "condition",
    "loss",
    "mean_reward",
    "correct_rate",
    "running_correct_rate",
    "sepa_lambda",
    "sepa_gate_open",
    "num_datums",
    "max_token_hit_rate",
    "step_time_s",
    "exec_entropy_mean",
    "exec_entropy_var",
    "plan_entropy_mean",
    "plan_entropy_var",
]
KEY = "tml-planted-key-that-must-never-be-written"


@pytest.fixture
def problems(tmp_path):
    """Thirty sums, each with its answer."""
    path = tmp_path / "sums.jsonl"
    rows = [{"problem": f"{a} + {b}?", "answer": a + b} for a in range(1, 7) for b in range(1, 6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(problems, folder, **other):
    small = {"max_steps": 6, "batch_size": 4, "group_size": 4, "max_tokens": 64, "lr": 1.0, "save_every": 2,
             "eval_every": 3, "eval_problems": 3, "sepa_steps": 2, "sepa_delay_steps": 0}  # fmt: skip
    return TrainMathArguments(data=problems, log_dir=folder, **{**small, **other})


def run(args, server=None, make=FakeRemote, **remote):
    """Train against a stand-in for the server; returns the server."""
    server = server or Server()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TinkerEngine, "connect", lambda *_, **__: make(server, **remote))
        train(args)
    return server


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_flags_have_their_documented_defaults():
    args = TrainMathArguments()
    assert {name: getattr(args, name) for name in DOCUMENTED} == DOCUMENTED


def test_help_needs_neither_the_sdk_nor_a_key():
    done = subprocess.run(
        [sys.executable, "-m", "textpolicy.tinker.train_math", "--help"], capture_output=True, text=True, check=True
    )
    assert "python -m textpolicy.tinker.train_math" in done.stdout
    assert all(f"--{name.replace('_', '-')}" in done.stdout for name in DOCUMENTED)


def test_a_mistyped_flag_is_one_sentence(capsys):
    assert main(["--group-sise", "4"]) == 2
    assert "did you mean --group-size?" in capsys.readouterr().err
    assert main(["--max-steps"]) == 2
    assert "did you mean" not in capsys.readouterr().err


def test_full_is_the_recipe_full_under_importance_sampling():
    args = TrainMathArguments(max_tokens=9)
    how, full = recipe_of(args), algorithm("full")
    same = replace(full, surrogate=Surrogate(ImportanceSampling()), length=9.0, summary="", paper="")
    assert how == same
    assert args.modes == ("maxrl", "gtpo_sepa_hicra")


def test_the_old_mix_is_reached_by_its_transform_mode():
    names = [type(stage).__name__ for stage in recipe_of(TrainMathArguments(transform_mode="gtpo_sepa")).stages]
    assert names == ["WeightByUncertainty"]
    assert TrainMathArguments(transform_mode="gtpo_sepa").modes == ("maxrl", "gtpo_sepa")
    assert TrainMathArguments(advantage_mode="grpo").modes == ("grpo", "gtpo_sepa")


def test_settings_reach_the_parts_of_the_recipe():
    how = recipe_of(TrainMathArguments(gtpo_beta=0.3, hicra_alpha=0.4, sepa_steps=7, strategic_grams='["so then"]'))
    weighing, amplifying = how.stages
    assert (weighing.entropy_beta, amplifying.hicra_alpha, how.pooling.sepa_steps) == (0.3, 0.4, 7)
    assert how.grams.phrases == ("so then",)


@pytest.mark.parametrize("text", ['["a", 1]', "[broken"])
def test_grams_that_are_no_list_of_strings_are_refused(text):
    with pytest.raises(UserError, match="strategic_grams is"):
        grams_of(text)


def test_grams_may_stand_in_a_file(tmp_path):
    path = tmp_path / "grams.json"
    path.write_text('["let me check", "so then"]')
    assert recipe_of(TrainMathArguments(strategic_grams=str(path))).grams.phrases == ("let me check", "so then")


def test_problems_come_from_a_file_or_a_task_and_not_from_both(problems, capsys):
    assert main([f"--data={problems}", "--task=addition"]) == 2
    assert "sums.jsonl and task is addition; leave one of them out" in capsys.readouterr().err


def test_a_task_with_tools_is_refused_before_anything_is_sent(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("textpolicy.run.train_math.load_task", lambda name: replace(load_task(name), tools=(len,)))
    assert main(["--task=addition", f"--log-dir={tmp_path / 'run'}"]) == 2
    assert "has tools, which this command does not support; use 'textpolicy train'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_algorithm_and_modes_exclude_each_other(capsys):
    assert main(["--algorithm", "grpo", "--advantage-mode", "maxrl"]) == 2
    assert "leave one of them out" in capsys.readouterr().err


def test_a_run_writes_every_step_with_the_documented_keys(problems, tmp_path):
    run(settings(problems, tmp_path / "run"))
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(6))
    assert all(set(METRICS) <= set(row) for row in rows)
    assert {row["condition"] for row in rows} == {"maxrl+gtpo_sepa_hicra"}
    assert {row["algorithm"] for row in rows} == {"full"}
    judged = [row["correct_rate"] for row in rows]
    assert [row["running_correct_rate"] for row in rows] == pytest.approx(
        [sum(judged[: i + 1]) / (i + 1) for i in range(6)]
    )


def test_steps_and_groups_without_signal_are_logged(problems, tmp_path):
    """The skill is such that every completion is right: no group disagrees, nothing is sent, all is written."""
    server = Server(states={"good": 100.0})
    args = settings(problems, tmp_path / "run", max_steps=2)
    run(args, server, resume="good")
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["num_datums"] for row in rows] == [0, 0]
    assert [row["correct_rate"] for row in rows] == [1.0, 1.0]
    assert len(lines(tmp_path / "run" / "emergence" / "generations.jsonl")) == 2 * 4 * 4
    assert lines(tmp_path / "run" / "checkpoints.jsonl")


def test_held_out_problems_are_evaluated_before_between_and_after(problems, tmp_path):
    run(settings(problems, tmp_path / "run"))
    looks = lines(tmp_path / "run" / "evals.jsonl")
    assert [evaluation["step"] for evaluation in looks] == [0, 3, 6]
    assert all(
        evaluation["low"] <= evaluation["accuracy"] <= evaluation["high"] and evaluation["problems"] == 3
        for evaluation in looks
    )


def test_no_problem_is_both_trained_on_and_evaluated(problems, tmp_path):
    args = settings(problems, tmp_path / "run", max_steps=12, eval_problems=0)
    seen = set()

    class Watching(FakeRemote):
        def sample(self, prompts, n, sampling):
            for p in prompts:
                seen.add((sampling.temperature > 0, tuple(p)))
            return super().sample(prompts, n, sampling)

    run(args, make=Watching)
    trained, judged = ({p for kind, p in seen if kind is which} for which in (True, False))
    assert trained
    assert judged
    assert not trained & judged


def test_another_seed_draws_the_problems_in_another_order(problems, tmp_path):
    for seed in (0, 1):
        run(settings(problems, tmp_path / str(seed), seed=seed, max_steps=2))
    first, second = ([g["prompt"] for g in lines(tmp_path / s / "emergence" / "generations.jsonl")] for s in "01")
    assert first != second


def test_the_skill_of_the_stand_in_rises_with_either_algorithm(problems, tmp_path):
    for name in ("grpo", "full"):
        run(settings(problems, tmp_path / name, algorithm=name, max_steps=12))
        looks = lines(tmp_path / name / "evals.jsonl")
        assert looks[0]["accuracy"] == 0.0
        assert looks[-1]["accuracy"] == 1.0


# ---- the folder is one of a run


def test_doctor_report_and_viewer_read_its_folder(problems, tmp_path, capsys):
    from starlette.testclient import TestClient

    from textpolicy.report.view.server import make_app

    folder = tmp_path / "run"
    run(settings(problems, folder))
    capsys.readouterr()
    assert textpolicy(["doctor", str(folder), "--json"]) in (0, 1)
    assert json.loads(capsys.readouterr().out)["steps"] == 6
    assert textpolicy(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "not finished" not in page
    assert "100.0%" in page
    client = TestClient(make_app([folder], "token"), base_url="http://127.0.0.1")
    page = client.get("/token/")
    assert page.status_code == 200
    assert "let me check" in page.text


def test_recorded_rows_read_back_as_numbers_and_evaluations(problems, tmp_path):
    run(settings(problems, tmp_path / "run"))
    recorded = load_run(tmp_path / "run")
    assert recorded.metrics["step"].to_pylist() == list(range(6))
    assert recorded.metrics["mean_reward"].to_pylist() == recorded.metrics["reward_mean"].to_pylist()
    assert recorded.evaluations["step"].to_pylist() == [0, 3, 6]
    assert recorded.rollouts.num_rows == 6 * 16
    assert recorded.evals.num_rows == 3 * 3
    assert recorded.summary["steps"] == 6
    assert {"adapter", "report.html", "log.txt", "versions.json", "train_math.json"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }


def test_a_step_without_a_scorable_completion_is_read(tmp_path):
    row = {"kind": "train", "step": 0, "algorithm": None, "condition": "maxrl+none", "correct_rate": None, "loss": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert load_run(tmp_path).rows == [{"kind": "train", "step": 0, "loss": 0.5}]


# ---- resuming


def test_the_same_command_again_resumes_a_run_that_was_cut_off(problems, tmp_path, monkeypatch, capsys):
    server = Server()
    with pytest.raises(RuntimeError, match="gone"):
        run(settings(problems, tmp_path / "run"), server, fail_at=5)
    run(settings(problems, tmp_path / "run"), server)
    assert [row["step"] for row in lines(tmp_path / "run" / "metrics.jsonl")] == list(range(6))
    assert [row["step"] for row in lines(tmp_path / "run" / "metrics.cut.jsonl")] == [4]


def test_resume_needs_only_the_folder_and_takes_new_flags(problems, tmp_path, monkeypatch, capsys):
    server, folder = run(settings(problems, tmp_path / "run")), tmp_path / "run"
    monkeypatch.setattr(TinkerEngine, "connect", lambda *_, **__: FakeRemote(server))
    assert main(["--resume", f"--log-dir={folder}", "--max-steps=7"]) == 0
    assert [row["step"] for row in lines(folder / "metrics.jsonl")] == list(range(7))
    assert main(["--resume", f"--log-dir={folder}"]) == 2
    assert "is finished, with 7 steps; raise --max-steps to train it further" in capsys.readouterr().err
    assert main(["--resume", f"--log-dir={folder}", "--max-steps=8", "--lr=0.5"]) == 2
    assert "lr was 1.0 and is 0.5" in capsys.readouterr().err
    assert textpolicy(["train", f"--resume={folder}"]) == 2
    assert f"resume it with: python -m textpolicy.tinker.train_math --resume --log-dir {folder}" in (
        capsys.readouterr().err
    )


def test_a_signal_ends_a_run_where_it_can_be_resumed(problems, tmp_path, monkeypatch, capsys):
    class Signalled(FakeRemote):
        def update(self, batch, surrogate, learning_rate):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().update(batch, surrogate, learning_rate)

    server = Server()
    monkeypatch.setattr(TinkerEngine, "connect", lambda *_, **__: Signalled(server))
    small = ["--max-steps=3", "--max-tokens=64", "--eval-every=0", "--batch-size=2", "--group-size=2"]
    assert main([f"--data={problems}", f"--log-dir={tmp_path / 'run'}", *small]) == 143
    output = capsys.readouterr().err
    assert "after 1 of 3 steps" in output
    assert "python -m textpolicy.tinker.train_math --resume" in output
    assert server.closed == ["interrupted"]


def same_rows(a, b):
    """Without what is measured in seconds."""
    timed = ("seconds", "time", "per_second")
    return [
        [{k: v for k, v in row.items() if not any(t in k for t in timed)} for row in rows] for rows in (a, b)
    ]  # fmt: skip


def test_an_interrupted_run_resumes_to_the_same_files(problems, tmp_path):
    whole = run(settings(problems, tmp_path / "whole"))
    server = Server()
    with pytest.raises(RuntimeError, match="gone"):
        run(settings(problems, tmp_path / "cut"), server, fail_at=5)
    run(settings(problems, tmp_path / "cut", resume=True), server)
    rows = same_rows(*(lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut")))
    for row in (*rows[0], *rows[1]):
        row.pop("tokens_spent")
    assert rows[0] == rows[1]
    assert list(whole.states.values()) == list(server.states.values())
    assert [evaluation["accuracy"] for evaluation in lines(tmp_path / "whole" / "evals.jsonl")] == [
        evaluation["accuracy"] for evaluation in lines(tmp_path / "cut" / "evals.jsonl")
    ]
    for name in ("steps", "generations"):
        a, b = (lines(tmp_path / run / "emergence" / f"{name}.jsonl") for run in ("whole", "cut"))
        for row in (*a, *b):
            row.pop("logging_overhead_ms", None)
        assert a == b


def test_a_run_that_is_killed_while_it_writes_resumes_to_the_same_files(problems, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def facts(folder):
        metrics, _ = same_rows(lines(folder / "metrics.jsonl"), [])
        for row in metrics:
            row.pop("tokens_spent")
        evaluations = [(row["step"], row["accuracy"]) for row in lines(folder / "evals.jsonl")]
        sampled = [(row["step"], row["tokens"]) for row in lines(folder / "emergence" / "generations.jsonl")]
        kept = [(row["name"], row["step"], row["correct"]) for row in lines(folder / "checkpoints.jsonl")]
        return metrics, evaluations, sampled, kept

    small = {"max_steps": 3, "batch_size": 2, "eval_every": 2}
    writes, limit, fsync = [], [10**9], os.fsync

    def counted(file):
        writes.append(file)
        if len(writes) == limit[0]:
            raise Killed
        fsync(file)

    monkeypatch.setattr(os, "fsync", counted)
    run(settings(problems, tmp_path / "whole", **small))
    for limit[0] in range(3, len(writes), 15):
        writes.clear()
        folder, server = tmp_path / f"killed{limit[0]}", Server()
        with pytest.raises(Killed):
            run(settings(problems, folder, **small), server)
        run(settings(problems, folder, **small), server)
        assert facts(folder) == facts(tmp_path / "whole"), f"killed at write {limit[0]}"


def test_sampled_completions_are_on_the_disk_before_the_update_that_fails(problems, tmp_path):
    with pytest.raises(RuntimeError, match="gone"):
        run(settings(problems, tmp_path / "run"), fail_at=0)
    assert len(lines(tmp_path / "run" / "emergence" / "generations.jsonl")) == 16
    [entry] = [line for line in lines(tmp_path / "run" / "ledger.jsonl") if line["spent"]["sampled"]][-1:]
    assert entry["spent"]["sampled"] > 0


def test_rows_that_a_resume_cuts_off_are_kept_aside_and_still_count_as_spent(problems, tmp_path):
    server = Server()
    with pytest.raises(RuntimeError, match="gone"):
        run(settings(problems, tmp_path / "run"), server, fail_at=5)
    before = lines(tmp_path / "run" / "ledger.jsonl")[-1]["spent"]["sampled"]
    run(settings(problems, tmp_path / "run", resume=True), server)
    aside = lines(tmp_path / "run" / "emergence" / "generations.cut.jsonl")
    assert {row["step"] for row in aside} == {4, 5}
    assert lines(tmp_path / "run" / "ledger.jsonl")[-1]["spent"]["sampled"] > before


def test_checkpoints_name_the_path_on_the_server(problems, tmp_path):
    server = run(settings(problems, tmp_path / "run"))
    kept = lines(tmp_path / "run" / "checkpoints.jsonl")
    assert [(line["name"], line["step"]) for line in kept] == [
        ("checkpoint_step_2", 2), ("checkpoint_step_4", 4), ("final", 6),
    ]  # fmt: skip
    assert all(line["state_path"].endswith(f"/{line['name']}") for line in kept)
    assert {line["state_path"] for line in kept} <= set(server.states)


def test_a_folder_with_a_finished_run_is_refused_without_resume(problems, tmp_path):
    run(settings(problems, tmp_path / "run"))
    with pytest.raises(UserError, match="holds a run; add --resume"):
        run(settings(problems, tmp_path / "run"))
    with pytest.raises(UserError, match="no run in"):
        run(settings(problems, tmp_path / "other", resume=True))


def test_a_run_resumes_only_with_the_settings_it_began_with(problems, tmp_path):
    server = run(settings(problems, tmp_path / "run"))
    with pytest.raises(UserError, match=r"lr was 1\.0 and is 0\.5"):
        run(settings(problems, tmp_path / "run", lr=0.5, resume=True), server)
    run(settings(problems, tmp_path / "run", max_steps=8, resume=True), server)
    assert [row["step"] for row in lines(tmp_path / "run" / "metrics.jsonl")] == list(range(8))


def test_half_a_line_that_a_crash_left_in_any_file_is_no_obstacle(problems, tmp_path):
    server = Server()
    with pytest.raises(RuntimeError, match="gone"):
        run(settings(problems, tmp_path / "run"), server, fail_at=3)
    for name in ("metrics", "evals", "checkpoints", "ledger", "emergence/steps", "emergence/generations"):
        with (tmp_path / "run" / f"{name}.jsonl").open("a") as file:
            file.write('{"step": 3, "na')
    for steps in (6, 7):
        run(settings(problems, tmp_path / "run", resume=True, max_steps=steps), server)
    assert [row["step"] for row in lines(tmp_path / "run" / "metrics.jsonl")] == list(range(7))


def test_a_folder_in_which_another_process_is_at_work_is_left_alone(problems, tmp_path):
    server = run(settings(problems, tmp_path / "run"))
    other = "import sys; from pathlib import Path; from textpolicy._system.lock import RunLock\n"
    other += "with RunLock(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", other, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(UserError, match="is using the run"):
            run(settings(problems, tmp_path / "run", resume=True, max_steps=8), server)
        process.stdin.close()
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 6


def test_a_disk_that_is_full_is_one_sentence(problems, tmp_path, monkeypatch, capsys):
    def full(self, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    monkeypatch.setattr("textpolicy.record.metrics_file.MetricsFile.write", full)
    monkeypatch.setattr(TinkerEngine, "connect", lambda *_, **__: FakeRemote(Server()))
    small = ["--max-steps=2", "--max-tokens=64", "--eval-every=0", "--batch-size=2", "--group-size=2"]
    assert main([f"--data={problems}", f"--log-dir={tmp_path / 'run'}", *small]) == 2
    output = capsys.readouterr().err
    assert "(No space left on device: metrics.jsonl)" in output
    assert f"python -m textpolicy.tinker.train_math --resume --log-dir {tmp_path / 'run'}" in output


def test_a_session_is_closed_by_how_it_ended(problems, tmp_path):
    assert run(settings(problems, tmp_path / "good")).closed == ["success"]
    for error, status in ((RuntimeError("gone"), "errored"), (KeyboardInterrupt(), "interrupted")):
        server = Server()
        with pytest.raises(type(error)):
            run(settings(problems, tmp_path / status), server, fail_at=1, error=error)
        assert server.closed == [status]


def test_ctrl_c_prints_how_to_resume(problems, tmp_path, monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("textpolicy.run.train_math.train", interrupted)
    assert main([f"--data={problems}", f"--log-dir={tmp_path / 'run'}"]) == 130
    assert capsys.readouterr().err == ("train_math: stopped by Ctrl-C; --resume continues from the last checkpoint\n")


def test_a_learner_whose_log_probs_differ_from_the_samplers_stops_the_run_before_it_begins(problems, tmp_path):
    class Shifted(FakeRemote):
        def __init__(self, server):
            super().__init__(server)
            self.gap = 3.0

    with pytest.raises(ServiceError, match="differ by 3 nats"):
        run(settings(problems, tmp_path / "run"), make=Shifted)
    assert not (tmp_path / "run").exists()


# ---- money


def test_a_dry_run_prices_the_worst_case_and_an_expected_one(problems, tmp_path):
    args = settings(
        problems, tmp_path, max_steps=10, eval_every=0, price_prefill=1.0, price_sample=10.0, price_train=100.0,
        expected_tokens=6,
    )  # fmt: skip
    text = "\n".join(dry_run(args))
    longest = len("6 + 5?\nPut the final answer in \\boxed{}.") // 3 + 30
    prefill, sampled, trained = 10 * 4 * longest, 10 * 16 * 64, 10 * 16 * (longest + 64)
    prefill, sampled = prefill + 2 * longest + 16, sampled + 16  # before the first step a few tokens go there and back
    cost = (prefill + 10 * sampled + 100 * trained) / 1e6
    assert f"{prefill + sampled + trained:,} tokens ({prefill:,} prefill, {sampled:,} sampled, {trained:,} tr" in text
    assert f"{cost:,.2f}" in text
    assert f"with 6 tokens each: {prefill - 10 + 10 * 16 * 6 + 6 + 10 * 16 * (longest + 6):,}" in text
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_dry_run_needs_no_server_and_reports_missing_prices(problems, capsys):
    assert main(["--dry-run", "--data", str(problems)]) == 0
    assert "no prices are given" in capsys.readouterr().out


def test_a_limit_on_tokens_ends_a_run_in_order_and_is_never_passed(problems, tmp_path):
    args = settings(problems, tmp_path / "run", max_steps=50, max_tokens_total=40_000)
    run(args)
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert 1 < len(rows) < 50
    assert lines(tmp_path / "run" / "ledger.jsonl")[-1]["spent"].keys() == {"prefill", "sampled", "trained"}
    assert max(sum(line["spent"].values()) for line in lines(tmp_path / "run" / "ledger.jsonl")) <= 40_000
    assert rows[-1]["tokens_spent"] <= 40_000
    assert lines(tmp_path / "run" / "checkpoints.jsonl")[-1]["name"] == "final"


def test_an_evaluation_that_could_pass_a_limit_is_skipped_and_reported(problems, tmp_path, capsys):
    few = {"max_steps": 1, "batch_size": 1, "group_size": 2, "eval_every": 1, "eval_problems": 6, "max_tokens": 512}
    run(settings(problems, tmp_path / "run", max_tokens_total=3600, **few))  # a look may take 6 x (41 + 512)
    assert [row["step"] for row in lines(tmp_path / "run" / "evals.jsonl")] == [0]
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 1
    assert "problems are not evaluated after 1 step: " in capsys.readouterr().out


def test_a_limit_on_cost_counts_what_was_spent_before_a_resume(problems, tmp_path):
    prices = {"price_sample": 1000.0, "price_train": 1000.0}
    server = Server()
    run(settings(problems, tmp_path / "run", max_steps=50, max_cost=15.0, **prices), server)
    done = len(lines(tmp_path / "run" / "metrics.jsonl"))
    with pytest.raises(UserError, match="could pass max_cost"):
        run(settings(problems, tmp_path / "run", max_steps=50, max_cost=15.0, resume=True, **prices), server)
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == done
    run(settings(problems, tmp_path / "run", max_steps=50, max_cost=25.0, resume=True, **prices), server)
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) > done
    assert rows[-1]["cost"] <= 25


def test_a_limit_on_cost_without_prices_is_refused():
    with pytest.raises(ValueError, match="no price is given"):
        TrainMathArguments(max_cost=3.0)


def test_tokens_are_counted_as_they_were_sent(problems, tmp_path):
    """Prompts once, completions as sampled, and of what is learned from the positions that are predicted from."""
    counted = {"prefill": 0, "sampled": 0, "trained": 0}

    class Counting(FakeRemote):
        def sample(self, prompts, n, sampling):
            out = super().sample(prompts, n, sampling)
            counted["prefill"] += sum(len(p) for p in prompts)
            counted["sampled"] += sum(len(c.tokens) for group in out for c in group)
            return out

        def score(self, batch, *, reference=False):
            counted["prefill"] += sum(int((row != 0).nonzero()[0][-1]) + 1 for row in batch.weights)
            return super().score(batch, reference=reference)

        def update(self, batch, surrogate, learning_rate):
            for row, advantages in zip(batch.weights, batch.advantages, strict=True):
                if advantages.any():
                    counted["trained"] += int((row != 0).nonzero()[0][-1]) + 1
            return super().update(batch, surrogate, learning_rate)

    run(settings(problems, tmp_path / "run", eval_every=0), make=Counting)
    assert lines(tmp_path / "run" / "checkpoints.jsonl")[-1]["spent"] == counted


# ---- the key


def test_the_key_is_read_from_a_file_and_written_nowhere(problems, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text(f"TINKER_API_KEY={KEY}\nOTHER=1\n")
    monkeypatch.setenv("TINKER_API_KEY", "")  # so that it is put back after the test
    monkeypatch.delenv("TINKER_API_KEY")
    with pytest.raises(RuntimeError, match="gone"):
        run(settings(problems, tmp_path / "run"), fail_at=3)
    assert os.environ["TINKER_API_KEY"] == KEY
    written = [p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert written
    assert not any(KEY.encode() in content for content in written)
    assert not any(KEY in text for text in capsys.readouterr())


def test_the_environment_goes_before_the_file(tmp_path, monkeypatch):
    (tmp_path / ".env").write_text("TINKER_API_KEY=tml-of-the-file\n")
    monkeypatch.setenv("TINKER_API_KEY", "tml-of-the-environment")
    load_key(tmp_path / ".env")
    assert os.environ["TINKER_API_KEY"] == "tml-of-the-environment"


# ---- problems of one's own


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([{"problem": "1 + 1?"}], "row 1 of .* lacks an answer"),
        ([{"problem": "1 + 1?", "answer": float("nan"), "solution": None}], "row 1 of .* lacks an answer"),
        ([{"answer": 2}], "no column in row 1 of .* called 'question'"),
        ([{"problem": None, "answer": 2}], "no column in row 1 of .* called 'question'"),
        ([{"problem": "1 + 1?", "answer": 2}], "different problems in .* is 1; give 3 or more"),
    ],
)
def test_a_file_without_problems_and_answers_is_refused(rows, what, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=what):
        dry_run(TrainMathArguments(data=path))


def test_the_answer_may_stand_in_the_box_of_a_solution(tmp_path):
    from textpolicy.tasks.mathematics import math_task_of

    path = tmp_path / "solved.jsonl"
    rows = [{"question": f"{n} + {n}?", "solution": f"so \\boxed{{{2 * n}}}"} for n in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = math_task_of(path)
    together = (*task.train, *task.validation, *task.test)
    assert {p.question: p.answer for p in together} == {f"{n} + {n}?": str(2 * n) for n in range(10)}
    assert (len(task.test), len(task.validation)) == (2, 1)
    assert "\\boxed{}" in task.prompt("1 + 1?")[0]["content"]
    chat = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1?"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]}]
    path.write_text("".join(json.dumps({"problem": asked, "answer": 2}) + "\n" for asked in (chat, parts, "2?")))
    asked = [math_task_of(path).prompt(messages) for messages in (chat, parts)]
    assert asked[0] == [chat[0], {"role": "user", "content": "1 + 1?\nPut the final answer in \\boxed{}."}]
    assert asked[1][0]["content"][1]["text"] == "\nPut the final answer in \\boxed{}."


def test_more_training_examples_leave_the_held_out_ones_as_they_are(problems, tmp_path):
    from textpolicy.tinker.train_math import task_of

    few, all_ = (task_of(TrainMathArguments(data=problems, max_examples=n)) for n in (5, None))
    assert few.test == all_.test
    assert few.train == all_.train[:5]


def test_the_reward_is_that_of_equal_answers_and_a_missing_box_is_wrong(problems):
    from textpolicy.tinker.train_math import task_of

    task = task_of(TrainMathArguments(data=problems))
    grade = lambda output: task.reward("", output, {"answer": "1/2"})["is_correct"]  # noqa: E731
    assert grade(r"\boxed{0.5}")
    assert grade(r"so \boxed{\frac{2}{4}}")
    assert not grade("0.5")
    assert not grade(r"\boxed{")
    assert math.isclose(task.reward("", r"\boxed{0.5}", {"answer": "1/2"})["reward"], 1.0)


@pytest.mark.parametrize(
    ("key", "what"),
    [("sk-planted-key-of-someone-else", "is not a Tinker key"), (KEY, "no Tinker server answers at")],
)
def test_an_error_before_a_run_begins_is_one_sentence_without_the_key(
    key, what, problems, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("TINKER_API_KEY", key)
    args = [f"--data={problems}", f"--log-dir={tmp_path / 'run'}", "--base-url=http://127.0.0.1:9"]
    assert main(args) == 2
    output = capsys.readouterr().err
    assert what in output
    assert key not in output
    assert len(output.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_without_the_sdk_the_command_prints_how_to_install_it(problems, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    monkeypatch.delenv("TINKER_BASE_URL", raising=False)
    monkeypatch.setitem(sys.modules, "tinker", None)
    assert main([f"--data={problems}", f"--log-dir={tmp_path / 'run'}"]) == 2
    assert "pip install 'textpolicy[tinker]'" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"lr": Infinity}', b'{"a": [' * 9000])
def test_settings_of_a_run_that_are_damaged_are_one_sentence(tmp_path, capsys, content):
    (tmp_path / "train_math.json").write_bytes(content)
    assert main(["--log-dir", str(tmp_path), "--resume"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "train_math.json is not" in said
    assert "restore it, or choose another --log-dir" in said


def test_weights_on_a_server_whose_path_is_damaged_are_one_sentence(tmp_path):
    engine = object.__new__(TinkerEngine)
    engine.write_weights("tinker://a/b", tmp_path)
    [path] = tmp_path.iterdir()
    assert engine.read_weights(tmp_path) == "tinker://a/b"
    for content in (b"", b"[1]", b"{}", b'{"path": 7}', b'{"path": ["tinker://a"]}'):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{path.name} .*; remove "):
            engine.read_weights(tmp_path)
