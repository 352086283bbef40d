"""textpolicy train --engine tinker and money: a quote, limits that end a run in order, a ledger; without a server."""

import json
from dataclasses import asdict, replace

import pytest
from fake_remote import FakeRemote, Server

from textpolicy.cli.main import main
from textpolicy.config.recipe import configure
from textpolicy.config.settings import check_config
from textpolicy.errors import ServiceError, UserError
from textpolicy.run.training_run import run
from textpolicy.tasks import TASKS, Problem, Task
from textpolicy.tinker.engine import TinkerEngine
from textpolicy.tinker.spending import RunWork, read_lines

STEPS = 5
WORDS = len("let me check. \\boxed{10}") + 1  # tokens of the longest answer


@pytest.fixture
def engines(monkeypatch):
    """The engines that runs have connected to, on one server, and a task for them."""
    made, server = [], Server()

    def connect(*_, **__):
        made.append(FakeRemote(server))
        return made[-1]

    def reward(prompt, completion, example, **kwargs):
        right = f"\\boxed{{{example['answer']}}}" in completion
        return {"reward": float(right), "is_correct": right}

    problems = [Problem(f"{a} + {b}?", str(a + b)) for a in range(2, 6) for b in range(1, 6)]
    parts = (tuple(problems[:12]), tuple(problems[12:15]), tuple(problems[15:]))
    task = Task("sums", "adding", *parts, lambda q: [{"role": "user", "content": q}], reward)
    monkeypatch.setitem(TASKS, "sums", lambda: task)
    monkeypatch.setattr(TinkerEngine, "connect", connect)
    monkeypatch.setattr("textpolicy.report.page.write_report", lambda *_: None)
    return made


def settings(folder, **tinker):
    return check_config(
        {
            "engine": "tinker",
            "model": "any",
            "task": "sums",
            "steps": STEPS,
            "output": folder,
            "rollout": {"prompts_per_step": 2, "group_size": 4, "max_tokens": WORDS},
            "optimizer": {"warmup_steps": 0},
            "evaluation": {"every": 2},
            "checkpoint": {"every": 1},
            "on_policy": {"every": 3},
            "tinker": tinker,
        },
        "here",
    )


def work_of(folder):
    config = settings(folder)
    return RunWork(config, configure(config), TASKS["sums"](), len("4 + 3?\n"), WORDS)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def ledger(folder):
    return [line["spent"] for line in lines(folder / "ledger.jsonl")]


def steps_of(folder):
    return [row["step"] for row in lines(folder / "metrics.jsonl") if row["kind"] == "train"]


def test_tokens_are_counted_as_they_were_sent_and_stay_below_the_quote(engines, tmp_path):
    run(settings(tmp_path / "run", price_sample=2.0))
    [engine] = engines
    assert ledger(tmp_path / "run")[-1] == engine.sent
    bound = work_of(tmp_path).run
    assert all(engine.sent[kind] <= most for kind, most in asdict(bound).items())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["tokens_spent"] == sum(engine.sent.values())
    assert summary["cost"] == pytest.approx(2e-6 * engine.sent["sampled"])


def test_the_quote_is_the_tokens_that_a_run_sends_when_all_completions_have_full_length(engines, tmp_path, monkeypatch):
    """Every prompt has the same length, no answer ends early, and the completions of a group differ in reward."""
    turns = iter(range(10_000))
    problem = [Problem(f"1 + {b}?", str(1 + b)) for b in range(1, 9)]
    same = replace(
        TASKS["sums"](),
        train=tuple(problem[:4]),
        validation=tuple(problem[4:6]),
        test=tuple(problem[6:]),
        reward=lambda prompt, completion, example, **_: (next(turns) % 2, True),
    )
    monkeypatch.setitem(TASKS, "sums", lambda: same)
    config = settings(tmp_path / "run")
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_tokens": 9})})
    run(config)
    work = RunWork(config, configure(config), same, len("1 + 1?\n"), 9)
    sent, most = engines[0].sent, asdict(work.run)
    # the last token of a sequence predicts nothing: in the preflight, two checks before and after an update, updates
    assert sent == {
        "prefill": most["prefill"] - 1 - 2 * 2 * 8,
        "sampled": most["sampled"],
        "trained": most["trained"] - STEPS * 8,
    }


def test_a_limit_ends_a_run_in_order_and_is_never_passed(engines, tmp_path, capsys):
    work, folder = work_of(tmp_path), tmp_path / "run"
    limit = (work.opening + work.step(0) + work.step(1) + work.closing).total + 40
    run(settings(folder, max_tokens_total=limit))
    done = steps_of(folder)
    assert done
    assert len(done) < STEPS
    assert sum(ledger(folder)[-1].values()) <= limit
    assert {"adapter", "summary.json"} <= {p.name for p in folder.iterdir()}
    output = capsys.readouterr().out
    assert (
        f"could pass max_tokens_total ({limit:,}); with a higher limit it resumes: textpolicy train --resume" in output
    )


def test_a_run_that_a_limit_ended_resumes_with_a_higher_one_and_earlier_spending_counts(engines, tmp_path, capsys):
    work, folder = work_of(tmp_path), tmp_path / "run"
    limit = (work.opening + work.step(0) + work.closing).total + 40
    run(settings(folder, max_tokens_total=limit))
    before, done = ledger(folder)[-1], steps_of(folder)
    assert main(["train", f"--resume={folder}"]) == 2
    assert "could pass max_tokens_total" in capsys.readouterr().err
    assert engines[-1].sent["sampled"] == 0
    assert (ledger(folder)[-1], steps_of(folder)) == (before, done)
    assert main(["train", f"--resume={folder}", "--tinker.max-tokens-total=100000"]) == 0
    assert steps_of(folder) == list(range(STEPS))
    assert ledger(folder)[-1] == {kind: before[kind] + n for kind, n in engines[-1].sent.items()}


def test_steps_lost_in_a_crash_still_count_as_spent(engines, tmp_path):
    folder = tmp_path / "run"
    connect = TinkerEngine.connect

    def failing(*_, **__):
        engine = connect()
        engine.fail_at, engine.error = 3, ServiceError("the server is gone")
        return engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TinkerEngine, "connect", failing)
        with pytest.raises(ServiceError):
            run(settings(folder))
    with (folder / "ledger.jsonl").open("a") as file:
        file.write('{"step": 3, "spe')  # the power went
    run(settings(folder))
    both = {kind: sum(engine.sent[kind] for engine in engines) for kind in engines[0].sent}
    assert engines[0].sent["sampled"] > 0
    assert ledger(folder)[-1]["sampled"] == both["sampled"]


def test_a_run_that_died_before_its_first_checkpoint_starts_again_and_its_spending_counts(
    engines, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(FakeRemote, "write_state", lambda self, folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(settings(folder))
    run(settings(folder))
    assert engines[0].sent["sampled"] > 0
    assert ledger(folder)[-1] == {kind: n + engines[1].sent[kind] for kind, n in engines[0].sent.items()}


def test_a_limit_without_room_for_a_step_is_refused_before_anything_is_spent(engines, tmp_path):
    for limit in ({"max_tokens_total": 500}, {"max_cost": 1e-6, "price_sample": 1.0}):
        with pytest.raises(UserError, match="raise it, or make the run smaller"):
            run(settings(tmp_path / "run", **limit))
        assert not any(engines[-1].sent.values())
    assert not (tmp_path / "run").exists()


def test_a_learner_whose_log_probs_differ_from_the_samplers_ends_a_run_after_a_few_tokens(
    engines, tmp_path, monkeypatch
):
    monkeypatch.setattr(FakeRemote, "score", lambda self, batch, reference=False: batch.logprobs - 3)
    with pytest.raises(ServiceError, match="differ by 3 nats"):
        run(settings(tmp_path / "run"))
    assert engines[-1].sent["sampled"] <= 16
    assert not (tmp_path / "run").exists()


def test_a_step_of_a_task_with_tools_reads_every_turn_and_a_kl_in_the_reward_scores_every_row():
    config = check_config(
        {
            "engine": "tinker",
            "algorithm": {"resample": 1, "kl": {"coefficient": 0.1, "place": "reward"}},
            "rollout": {"prompts_per_step": 2, "group_size": 3, "max_tokens": 10, "max_turns": 4},
            "on_policy": {"every": 0},
        },
        "here",
    )
    task = replace(TASKS["addition"](), tools=(len,))
    work = RunWork(config, configure(config), task, prompt_tokens=100, completion_tokens=40)
    step = work.step(0)
    assert step.trained == 6 * 140
    assert step.sampled == 2 * 6 * 40
    assert step.prefill == 2 * (2 * 100 + 6 * 3 * 140) + 6 * 140


# ---- the command


def test_a_dry_run_prices_a_run_without_a_server_or_a_key(no_tinker_account, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["train", "--engine=tinker", "--model=any", "--steps=3", "--dry-run", "--tinker.price-sample=1000"]
    assert main([*args, "--expected-tokens=2"]) == 0
    output = capsys.readouterr().out
    assert "3 steps of 16 prompts x 8 completions, 100 validation and 200 test problems" in output
    sampled = 3 * 128 * 8 + 2 * 300 * 8 + 8
    assert f"{sampled:,} sampled" in output
    assert f": {sampled / 1000:,.2f}" in output
    assert "with 2 tokens each" in output
    assert not list(tmp_path.iterdir())


def test_a_dry_run_refuses_settings_that_the_run_would_refuse(capsys):
    assert main(["train", "--engine=tinker", "--dry-run", "--adapter.kind=dora"]) == 2
    assert "adapter.kind is dora" in capsys.readouterr().err
    assert main(["train", "--dry-run"]) == 2
    assert "dry_run is for engine tinker" in capsys.readouterr().err


def test_a_limit_on_cost_needs_a_price(capsys):
    assert main(["train", "--engine=tinker", "--tinker.max-cost=3"]) == 2
    assert "max_cost is 3 and no price is given" in capsys.readouterr().err


def test_a_dry_run_without_prices_names_the_flags_that_set_them(no_tinker_account, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--engine=tinker", "--model=any", "--dry-run"]) == 0
    assert "no prices are given; pass --tinker.price-prefill" in capsys.readouterr().out


@pytest.mark.parametrize("line", [b"{", b"7", b"[1, 2]", b"\xff", b'{"a": ' * 9000])
def test_a_line_of_a_ledger_that_is_no_object_is_named(tmp_path, line):
    (tmp_path / "spent.jsonl").write_bytes(b'{"step": 0}\n' + line + b"\n")
    with pytest.raises(UserError, match=r"^line 2 of .*spent\.jsonl is not a JSON object; restore it"):
        read_lines(tmp_path / "spent.jsonl")
    (tmp_path / "spent.jsonl").write_bytes(b'{"step": 0}\n' + line)
    assert read_lines(tmp_path / "spent.jsonl") == [{"step": 0}]  # the last is still being written
