"""The real SDK against a real server: the whole loop, what comes back, and resuming exactly."""

import json
from dataclasses import replace

import numpy as np
import pytest
from fixed_episodes import ANSWER, fixed_episodes

from textpolicy.algorithms import algorithm
from textpolicy.cli.main import main
from textpolicy.engine import Sampling
from textpolicy.errors import ServiceError, UserError
from textpolicy.losses import Surrogate
from textpolicy.record.reader import load_run
from textpolicy.tinker.engine import TinkerEngine
from textpolicy.types import Batch, Episode

PROMPTS = [e.tokens[~e.mask].tolist() for e in fixed_episodes()[::4]]
SAMPLING = Sampling(max_tokens=ANSWER, seed=5)


def rolled_out(engine, reward, sampling=SAMPLING):
    """Four scored completions of each prompt."""
    groups = engine.sample(PROMPTS, 4, sampling)
    return [
        Episode.from_completion(prompt, completion, reward=reward(completion.tokens), group=g)
        for g, (prompt, members) in enumerate(zip(PROMPTS, groups, strict=True))
        for completion in members
    ]


def flat(groups):
    return [completion for members in groups for completion in members]


def small_letters(tokens):
    return float(np.mean((tokens >= 97) & (tokens < 123)))


def scored(engine, episodes):
    return engine.score(Batch.pack(episodes, [np.zeros(len(e.tokens)) for e in episodes]))


def test_completions_come_in_order_with_their_log_probs_and_the_same_seed_draws_them_again(tinker):
    engine = tinker()
    first, again = (engine.sample(PROMPTS, 4, SAMPLING) for _ in range(2))
    other = engine.sample(PROMPTS, 4, replace(SAMPLING, seed=6))
    assert [len(members) for members in first] == [4, 4]
    for mine, same in zip(flat(first), flat(again), strict=True):
        np.testing.assert_array_equal(mine.tokens, same.tokens)
        assert mine.logprobs.dtype == np.float32
        assert mine.logprobs.shape == mine.tokens.shape
        assert mine.entropy is None
        assert mine.truncated == (mine.tokens[-1] not in engine.stop)
    assert any(
        (a.tokens != b.tokens).any()
        for a, b in zip(flat(first), flat(other), strict=True)
        if len(a.tokens) == len(b.tokens)
    )
    assert len({tuple(c.tokens.tolist()) for c in first[0]}) > 1


def test_on_policy_the_learner_gives_the_log_probs_that_were_sampled(tinker):
    engine = tinker()
    episodes = rolled_out(engine, small_letters)
    gap = scored(engine, episodes) - Batch.pack(episodes, [np.zeros(len(e.tokens)) for e in episodes]).logprobs
    assert np.abs(gap).max() < 1e-4


@pytest.mark.slow
def test_skyrl_gives_log_probs_at_temperature_1_whatever_it_samples_at(skyrl_server, connected):
    engine = connected(skyrl_server, untempered=True)
    episodes = rolled_out(engine, small_letters, replace(SAMPLING, temperature=0.5))
    batch = Batch.pack(episodes, [np.zeros(len(e.tokens)) for e in episodes])
    assert np.abs(engine.score(batch) - batch.logprobs).max() < 1e-4


def test_training_at_another_temperature_is_refused_unless_untempered_is_set(tinker):
    engine = tinker()
    episodes = rolled_out(engine, small_letters, replace(SAMPLING, temperature=0.5))
    batch = algorithm("grpo").credit(episodes)
    with pytest.raises(UserError, match=r"sampled at temperature 0\.5 and the Tinker service scores at 1"):
        engine.update(batch, Surrogate(), 1e-3)


def test_steps_of_the_loop_raise_rewarded_tokens_and_the_sampler_follows(tinker):
    engine, how = tinker(), algorithm("grpo")
    before = scored(engine, fixed_episodes())
    for step in range(3):
        episodes = rolled_out(engine, small_letters, replace(SAMPLING, seed=step))
        batch = how.credit(episodes)
        row = engine.update(batch, how.surrogate, 1e-2)
        assert row["updated"] == 1
        assert row["grad_norm"] > 0
        assert row["logprob_gap_max"] < 1e-4  # a sampler of old weights would be off by far more
        after = scored(engine, episodes)
        gain = ((after - batch.logprobs) * batch.advantages * batch.weights).sum()
        assert gain > 0
    assert np.abs(scored(engine, fixed_episodes()) - before).max() > 0.05


def test_a_batch_whose_groups_agree_sends_nothing_and_moves_nothing(tinker):
    engine = tinker()
    episodes = rolled_out(engine, lambda tokens: 1.0)
    before = scored(engine, episodes)
    assert engine.update(algorithm("grpo").credit(episodes), Surrogate(), 1e-2)["updated"] == 0
    np.testing.assert_array_equal(scored(engine, episodes), before)


def test_resuming_gives_the_same_log_probs_and_the_same_next_step(tinker):
    engine, how = tinker(), algorithm("grpo")
    batch = how.credit(fixed_episodes(1))
    engine.update(batch, how.surrogate, 1e-2)
    path = engine.save_state("middle")
    resumed = tinker(resume=path)
    np.testing.assert_array_equal(resumed.score(batch), engine.score(batch))
    for each in (engine, resumed):
        each.update(batch, how.surrogate, 1e-2)
    np.testing.assert_array_equal(resumed.score(batch), engine.score(batch))


def test_saved_weights_can_be_restored(tinker):
    engine, how = tinker(), algorithm("grpo")
    batch = how.credit(fixed_episodes(1))
    kept, before = engine.weights(), engine.score(batch)
    engine.update(batch, how.surrogate, 1e-2)
    assert np.abs(engine.score(batch) - before).max() > 1e-3
    engine.restore(kept)
    np.testing.assert_array_equal(engine.score(batch), before)


def test_the_reference_is_the_model_without_its_lora(tinker):
    engine, how = tinker(), algorithm("grpo")
    batch = how.credit(fixed_episodes(1))
    fresh = engine.score(batch)
    engine.update(batch, how.surrogate, 1e-2)
    np.testing.assert_allclose(engine.score(batch, reference=True), fresh, atol=1e-4)


# ---- what a server does not do


def test_a_model_that_the_server_lacks_is_named(tinker_server, no_tinker_account):
    with pytest.raises(UserError, match="there is no model on this Tinker server 'Qwen/Qwen3-4B'"):
        TinkerEngine.connect("Qwen/Qwen3-4B", base_url=tinker_server.url)


def test_a_state_that_does_not_exist_is_one_sentence(tinker):
    with pytest.raises(ServiceError, match="resuming tinker://nobody/weights/nothing failed"):
        tinker(resume="tinker://nobody/weights/nothing")


# ---- a whole run


RUN = [
    "--engine=tinker",
    "--checkpoint.every=1",
    "--steps=2",
    "--optimizer.warmup-steps=1",
    "--rollout.prompts-per-step=2",
    "--rollout.group-size=4",
    "--evaluation.every=2",
    "--evaluation.problems=2",
    "--adapter.rank=4",
]


KEPT = ("step-000001", "step-000002")


@pytest.mark.slow
def test_a_run_has_the_same_folder_and_its_model_answers_afterwards(tinker_server, no_tinker_account, tmp_path, capsys):
    run = tmp_path / "run"
    flags = [f"--tinker.base-url={tinker_server.url}", f"--model={tinker_server.name}", f"--output={run}"]
    assert main(["train", *RUN, *flags]) == 0
    names = {"config.json", "versions.json", "metrics.jsonl", "summary.json", "adapter"}
    assert {p.name for p in run.iterdir()} == names | {
        "rollouts", "evals", "checkpoints", "report.html", "log.txt", ".lock", "ledger.jsonl",
    }  # fmt: skip
    assert json.loads((run / "versions.json").read_text())["tinker"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in steps] == [0, 1]
    assert all(row["surprisal"] > 0 and "entropy" not in row for row in steps)
    assert steps[0]["on_policy_gap_max"] < 1e-4
    assert steps[0]["tokens_spent"] < steps[1]["tokens_spent"]
    kept = [json.loads((run / "checkpoints" / name / "server.json").read_text())["path"] for name in KEPT]
    assert all(path.startswith("tinker://") for path in kept)
    assert len(set(kept)) == 2
    assert json.loads((run / "adapter" / "tinker.json").read_text())["state"].startswith("tinker://")
    assert main(["train", f"--resume={run}", "--steps=3", "--allow=steps"]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [0, 1, 2]
    assert len(list((run / "rollouts").iterdir())) == 3
    assert main(["eval", f"--run={run}", "--problems=2"]) == 0
    assert "of 2 problems right" in capsys.readouterr().out
    assert main(["export", str(run), "--to=peft"]) == 2
    assert "is kept by its Tinker server" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_distils_from_the_model_itself_that_reads_the_answer(tinker_server, no_tinker_account, tmp_path):
    run, file = tmp_path / "run", tmp_path / "distil.toml"
    file.write_text('task = "addition"\n[[stage]]\nkind = "distill"\nsteps = 2\nteacher = "self"\ncontext = "answer"\n')
    flags = [f"--tinker.base-url={tinker_server.url}", f"--model={tinker_server.name}", f"--output={run}"]
    assert main(["train", str(file), *(flag for flag in RUN if "steps=2" not in flag), *flags]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "train"]
    assert [(row["stage"], row["updated"]) for row in steps] == [("distill", 1), ("distill", 1)]
    assert all(np.isfinite(row["teacher_kl"]) and row["teacher_kl"] != 0 for row in steps)
    drawn = load_run(run).rollouts.to_pylist()
    credits = [c for r in drawn if r["step"] == 0 for c in r["credit"]]
    assert steps[0]["teacher_kl"] == pytest.approx(-np.mean(credits), rel=1e-4)  # q - l of each token is its credit
    assert len({*credits}) > 10
