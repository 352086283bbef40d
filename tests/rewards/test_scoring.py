"""Several rewards together: the sum, what does not apply, batched and async functions, limits, failures, workers."""

import asyncio
import logging
import math
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection

import numpy as np
import pytest
from toy_tokenizers import Letters

from textpolicy.engine import Sampling
from textpolicy.environment.single_turn import TextGenerationEnv
from textpolicy.errors import RewardError, UserError
from textpolicy.loop.collect import Rollouts, collect
from textpolicy.loop.metrics import summarize
from textpolicy.rewards import (
    REWARD_REGISTRY,
    Request,
    RewardConfig,
    Scored,
    Scorer,
    call_reward,
    create_configured_reward_function,
    create_mlx_optimized_batch_processor,
    get_reward_function,
    reward,
    verifier,
)
from textpolicy.rewards.background import in_time
from textpolicy.rewards.workers import Workers
from textpolicy.types import Completion, Episode

pytestmark = pytest.mark.usefixtures("registries")


def letters(prompt, completion, example):
    return len(completion)


def in_capitals(prompt, completion, example):
    return {"reward": float(completion.isupper()), "is_correct": completion.isupper()}


def for_mathematics(prompt, completion, example):
    return 1.0 if example.get("field") == "mathematics" else None


async def slow_letters(prompt, completion, example):
    await asyncio.sleep(0.05)
    return len(completion)


def many_letters(prompts, completions, examples, truncated, scale=1.0):
    return [scale * len(c) - t for c, t in zip(completions, truncated, strict=True)]


async def many_slow_letters(prompts, completions, examples):
    await asyncio.sleep(0)
    return np.array([len(c) for c in completions])


def requests(*completions, **example):
    return [Request("p", completion, example) for completion in completions]


def rewards(scorer, *completions, **example):
    return [s.reward for s in Scorer.of(scorer).score(requests(*completions, **example))]


# ---- the sum


def test_the_reward_is_the_weighted_sum_and_each_score_is_kept():
    reward(name="letters")(letters)
    scorer = Scorer([RewardConfig("letters", weight=0.5), in_capitals])
    assert scorer.score(requests("ABC", "ab")) == [
        Scored(2.5, True, {"letters": 3, "in_capitals": 1}),
        Scored(1.0, False, {"letters": 2, "in_capitals": 0}),
    ]


def test_a_reward_that_does_not_apply_is_left_out_of_the_sum():
    scorer = Scorer([letters, for_mathematics])
    [mathematics] = scorer.score(requests("ab", field="mathematics"))
    [poetry] = scorer.score(requests("ab", field="poetry"))
    assert (mathematics.reward, poetry.reward) == (3, 2)
    assert poetry.scores == {"letters": 2}


def test_where_no_reward_applies_or_one_cannot_score_there_is_no_reward():
    unsure = lambda prompt, completion, example: math.nan  # noqa: E731
    assert np.isnan(rewards([for_mathematics], "ab"))
    assert np.isnan(rewards([letters, unsure], "ab"))


def test_a_reward_of_weight_0_is_reported_and_moves_nothing():
    reward(name="unsure")(lambda prompt, completion, example: math.nan)
    [scored] = Scorer([letters, RewardConfig("unsure", weight=0)]).score(requests("ab"))
    assert scored.reward == 2
    assert np.isnan(scored.scores["unsure"])


@pytest.mark.parametrize(
    ("verdicts", "expected"), [((True, True), True), ((True, False), False), ((None, True), True), ((None, None), None)]
)
def test_a_completion_is_correct_unless_a_reward_denies_it(verdicts, expected):
    parts = [lambda prompt, completion, example, v=v: (1.0, v) for v in verdicts]
    assert Scorer(parts)("p", "c", {}).is_correct is expected


def test_rewards_of_one_name_get_numbers():
    scorer = Scorer([RewardConfig("keyword_reward", params={"keywords": [k]}) for k in ("sun", "moon")])
    assert scorer("p", "the moon", {}).scores == {"keyword_reward": 0.0, "keyword_reward_2": 1.0}


def test_the_penalty_stands_in_for_the_reward_and_is_weighted_like_it():
    scored = []
    reward(name="recorded")(lambda prompt, completion, example: scored.append(completion) or 1.0)
    config = RewardConfig("recorded", weight=2, verifiers=["no_empty_response"], verifier_penalty=-0.5)
    assert rewards(config, "text", " ") == [2.0, -1.0]
    assert scored == ["text"]


def test_a_penalty_that_a_weight_of_0_silences_is_pointed_out(caplog):
    RewardConfig("length_reward", weight=0, verifier_penalty=-1)
    assert "'length_reward' has weight 0, so its verifier_penalty never counts" in caplog.text


def test_a_composite_is_the_reward_function_of_an_environment():
    env = TextGenerationEnv(["p", "q"], Scorer([letters, slow_letters]), tokenizer=Letters())
    env.reset()
    assert env.step("abc")["reward"] == 6
    assert env.score(1, [97, 98], truncated=False).scores == {"letters": 2, "slow_letters": 2}
    assert [env.score(0, [97], False).reward, env.score(1, [97, 98], True).reward] == [2, 4]


def test_a_step_scores_all_its_completions_at_once():
    sizes = []

    def counted(prompts, completions, examples):
        sizes.append(len(completions))
        return [float(c) for c in completions]

    class Digits:
        def encode(self, text):
            return [int(c) for c in text]

        def decode(self, ids):
            return "".join(map(str, ids))

    class Engine:
        def sample(self, prompts, n, sampling):
            return [[completion(10 * prompt[0] + k) for k in range(n)] for prompt in prompts]

    def completion(number):
        tokens = np.array(Digits().encode(str(number)), np.int32)
        return Completion(tokens, np.zeros(len(tokens), np.float32))

    env = TextGenerationEnv(["3", "7"], Scorer([counted, letters]), tokenizer=Digits())
    episodes = collect(Engine(), env, [1, 0], 3, Sampling(max_tokens=4))
    assert [e.scores["counted"] for e in episodes] == [70, 71, 72, 30, 31, 32]
    assert [e.reward for e in episodes] == [72, 73, 74, 32, 33, 34]
    assert sizes == [6]


def test_a_sum_of_one_sum_keeps_its_scores():
    inner = Scorer([letters, in_capitals])
    assert (
        call_reward(inner, "p", "AB", {})
        == Scorer([inner])("p", "AB", {})
        == Scored(3, True, inner("p", "AB", {}).scores)
    )


def test_the_mean_and_deviation_of_each_reward_are_in_the_row_of_a_step():
    completion = Completion(np.zeros(1, np.int32), np.zeros(1, np.float32))
    scores = [{"a": 1.0, "b": math.nan}, {"a": 3.0}, {"a": math.nan, "b": math.nan}]
    episodes = [Episode.from_completion([1], completion, reward=0.0, group=0, scores=s) for s in scores]
    row = summarize(Rollouts(episodes, episodes, 1, True), [{"updated": 1.0}], 1.0, 1.0)
    assert {k: v for k, v in row.items() if "/" in k} == {"reward_mean/a": 2.0, "reward_std/a": 1.0}


# ---- kinds of functions


@pytest.mark.parametrize("fn", [letters, slow_letters, many_letters, many_slow_letters])
@pytest.mark.parametrize("settings", [{}, {"concurrency": 3}, {"time_limit": 5.0}])
def test_plain_async_and_batched_functions_score_alike_and_in_order(fn, settings):
    texts = ["a" * n for n in (3, 1, 2, 5, 4, 0)]
    assert rewards(Scorer(fn, **settings), *texts) == [3, 1, 2, 5, 4, 0]
    assert Scorer(fn, **settings).score([]) == []
    assert call_reward(fn, "p", "four", {}) == Scored(4.0)


def test_a_batched_function_gets_truncated_flags_params_and_shared_keywords():
    seen = []

    @reward
    def curious(prompts, completions, examples, truncated, turns, tokenizer, scale):
        seen.append((prompts, completions, examples, truncated, turns, tokenizer))
        return [scale * t for t in truncated]

    wanted = [Request("p", "a", {"n": 1}, truncated=True), Request("q", "b", {"n": 2}, extra={"turns": 4})]
    scored = Scorer(RewardConfig("curious", params={"scale": 3})).score(wanted, tokenizer="T")
    assert [s.reward for s in scored] == [3, 0]
    assert seen == [(["p", "q"], ["a", "b"], [{"n": 1}, {"n": 2}], [True, False], [None, 4], "T")]


def test_a_batched_function_is_given_only_completions_that_the_verifiers_accept():
    seen = []

    @reward
    def curious(prompts, completions, examples):
        seen.append(completions)
        return [1.0] * len(completions)

    config = RewardConfig("curious", verifiers=["no_empty_response"], verifier_penalty=-1)
    assert rewards(config, "a", "", "b") == [1, -1, 1]
    assert rewards(config, "", "") == [-1, -1]
    assert seen == [["a", "b"]]


def test_async_calls_overlap_up_to_the_concurrency():
    running, most = 0, 0

    async def counted(prompt, completion, example):
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await asyncio.sleep(0.02)
        running -= 1
        return 1.0

    assert rewards(Scorer(counted, concurrency=4), *"abcdefgh") == [1.0] * 8
    assert most == 4


def test_async_rewards_keep_one_event_loop_and_work_where_one_runs_already():
    loops = set()

    async def where(prompt, completion, example):
        loops.add(asyncio.get_running_loop())
        return 1.0

    async def notebook_cell():
        return rewards(where, "a")

    assert rewards(where, "a", "b") == [1, 1]
    assert asyncio.run(notebook_cell()) == [1]
    assert len(loops) == 1


def test_without_settings_a_plain_function_runs_in_the_calling_thread():
    seen = []
    rewards(lambda prompt, completion, example: seen.append(threading.current_thread()) or 1, "a")
    assert seen == [threading.current_thread()]


# ---- failures


def test_a_reward_that_raises_shows_the_prompt_and_the_completion():
    def broken(prompt, completion, example):
        raise KeyError("label")

    async def broken_too(prompt, completion, example):
        raise KeyError("label")

    for fn in (broken, broken_too):
        with pytest.raises(RewardError, match=r"raised KeyError .* for prompt 'p' and completion 'c'") as caught:
            rewards(fn, "c")
        assert isinstance(caught.value.__cause__, KeyError)


def test_a_reward_error_raised_by_a_reward_is_passed_on():
    def strict(prompt, completion, example):
        raise RewardError("the example has no label; fix the data")

    with pytest.raises(RewardError) as caught:
        rewards(strict, "c")
    assert str(caught.value) == "the example has no label; fix the data"


def test_a_scorer_inside_an_async_reward_is_refused_where_it_would_wait_for_itself():
    async def nested(prompt, completion, example):
        return rewards(slow_letters, completion)[0]

    with pytest.raises(
        RewardError, match=r"^a Scorer was .*await that reward's own work instead \(reward 'nested' for prompt 'p' and"
    ) as caught:
        rewards(nested, "c")
    assert str(caught.value.__cause__).startswith("a Scorer was called inside an async reward;")
    assert rewards(slow_letters, "ab") == [2]  # the loop still runs


def test_an_async_reward_that_cancels_itself_is_a_failure_like_another():
    async def gives_up(prompt, completion, example):
        raise asyncio.CancelledError

    with pytest.raises(RewardError, match=r"raised RuntimeError \('it cancelled itself'\)"):
        rewards(gives_up, "c")
    assert np.isnan(rewards(Scorer(gives_up, on_failure="unscorable"), "a")).all()


def test_a_reward_that_is_no_longer_awaited_is_cancelled():
    seen = []

    async def endlessly():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    async def interrupted():
        waiting = asyncio.create_task(in_time(endlessly(), None))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(interrupted(), 30))
    assert seen == ["cancelled"]


def test_with_the_policy_unscorable_a_failure_is_nan_and_a_warning_and_the_others_are_scored(caplog):
    def picky(prompt, completion, example):
        return 1 / len(completion)

    def wordy(prompts, completions, examples):
        return "bad"

    with caplog.at_level(logging.WARNING):
        assert np.isnan(rewards(Scorer([picky, letters], on_failure="unscorable"), "", "ab")).tolist() == [True, False]
        assert np.isnan(rewards(Scorer(wordy, on_failure="unscorable"), "a", "b")).all()
    assert "counted as unscorable: reward 'picky' raised ZeroDivisionError" in caplog.text
    assert "returned 'bad', which is not 2 results for 2 completions" in caplog.text


@pytest.mark.parametrize("result", [[1.0], [1.0, 2.0, 3.0], 1.0, None, [1.0, "x"], [1.0, math.inf]])
def test_a_batched_function_that_does_not_return_a_number_for_each_is_an_error(result):
    def odd(prompts, completions, examples):
        return result

    with pytest.raises(RewardError, match=r"'odd' returned .* for 2 completions, the first prompt 'p'"):
        rewards(odd, "a", "b")


def test_a_verifier_that_raises_is_named():
    verifier(name="broken")(lambda prompt, completion, example: completion[9])
    with pytest.raises(RewardError, match=r"verifier '<lambda>' of reward 'length_reward' raised IndexError"):
        rewards(RewardConfig("length_reward", verifiers=["broken"]), "a")


def test_a_verifier_that_would_always_pass_is_refused():
    @verifier
    async def later(prompt, completion, example):
        return False

    with pytest.raises(UserError, match="verifier 'later' is async"):
        Scorer(RewardConfig("length_reward", verifiers=["later"]))


@pytest.mark.parametrize("fn", [many_letters, slow_letters])
def test_verifiers_stand_before_an_async_or_batched_function_in_a_scorer_only(fn):
    reward(name="other")(fn)
    config = RewardConfig("other", verifiers=["no_empty_response"])
    with pytest.raises(UserError, match="batched or async"):
        create_configured_reward_function(config)
    assert rewards(config, "ab", "") == [2, 0]


def test_exit_in_a_reward_is_an_error_and_does_not_end_the_loop():
    async def leaves(prompt, completion, example):
        raise SystemExit(1)

    with pytest.raises(RewardError, match="it raised SystemExit"):
        rewards(leaves, "a")
    assert rewards(slow_letters, "ab") == [2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rewards": []}, "no rewards"),
        ({"rewards": letters, "time_limit": 0}, "time_limit is 0"),
        ({"rewards": letters, "concurrency": 0}, "concurrency is 0"),
        ({"rewards": letters, "on_failure": "zero"}, "no on_failure 'zero'"),
        ({"rewards": [3]}, "3 is not a function"),
        ({"rewards": "lenght_reward"}, "did you mean 'length_reward'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Scorer(**settings)


@pytest.mark.parametrize("numbers", [{"weight": math.nan}, {"verifier_penalty": math.inf}])
def test_a_weight_or_penalty_that_is_not_finite_is_refused(numbers):
    with pytest.raises(UserError, match="give a finite number"):
        RewardConfig("length_reward", **numbers)


# ---- time limits


def late(prompt, completion, example):
    time.sleep(0.5 if completion == "late" else 0)
    return 1.0


async def late_and_deaf(prompt, completion, example):
    try:
        await asyncio.sleep(0.5 if completion == "late" else 0)
    except asyncio.CancelledError:
        await asyncio.sleep(0.2)
    return 1.0


@pytest.mark.parametrize("fn", [late, late_and_deaf])
def test_a_late_call_is_a_failure_when_its_limit_is_over(fn):
    started = time.perf_counter()
    with pytest.raises(RewardError, match="was too slow for prompt 'p' and completion 'late'; raise time_limit"):
        rewards(Scorer(fn, time_limit=0.1), "late")
    scored = rewards(Scorer(fn, time_limit=0.1, on_failure="unscorable"), "in time", "late")
    assert time.perf_counter() - started < 0.9
    assert np.isnan(scored).tolist() == [False, True]


# ---- worker processes


@pytest.fixture
def made():
    """Makes scorers with worker processes, which end with the test."""
    pytest.importorskip("cloudpickle")
    scorers = []

    def make(rewards, **settings):
        scorers.append(Scorer(rewards, processes=True, **settings))
        return scorers[-1]

    yield make
    for scorer in scorers:
        scorer.close()


def endless(prompt, completion, example):
    while completion == "endless":
        pass
    return os.getpid()


def test_functions_run_in_as_many_processes_as_calls_at_once(made):
    scorer = made(lambda prompt, completion, example: time.sleep(0.05) or os.getpid(), concurrency=2)
    pids = rewards(scorer, *"abcdef")
    assert set(pids) == set(scorer.worker_pids())
    assert len(set(pids)) == 2
    assert os.getpid() not in pids


def test_a_process_that_is_late_is_killed_and_the_next_call_has_another(made):
    scorer = made(endless, time_limit=0.3, on_failure="unscorable")
    first, never, last = rewards(scorer, "a", "endless", "b")
    assert np.isnan(never)
    assert first != last
    with pytest.raises(ProcessLookupError):
        os.kill(int(first), 0)


def test_a_killed_worker_is_replaced_and_its_call_repeated_within_seconds(made):
    scorer = made(lambda prompt, completion, example: time.sleep(float(completion)) or os.getpid())
    [idle] = rewards(scorer, "0")
    os.kill(int(idle), signal.SIGKILL)
    started = time.perf_counter()
    [at_work] = rewards(scorer, "0")
    killer = threading.Timer(0.3, os.kill, (int(at_work), signal.SIGKILL))
    killer.start()
    [after] = rewards(scorer, "0.6")
    assert time.perf_counter() - started < 30  # one second where nothing else runs
    assert len({idle, at_work, after}) == 3


def test_a_reward_that_kills_its_worker_every_time_is_a_clear_error_within_seconds(made):
    started = time.perf_counter()
    with pytest.raises(RewardError, match="ended its worker process, twice, for prompt 'p' and completion 'a'"):
        rewards(made(lambda prompt, completion, example: os.kill(os.getpid(), signal.SIGKILL)), "a")
    assert time.perf_counter() - started < 30  # one second where nothing else runs


def test_a_worker_that_cannot_start_is_an_error_that_points_to_its_output(made, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(
        RewardError, match="a worker process for rewards ended at its start; see why in what it wrote to"
    ):
        rewards(made(letters), "a")


def test_a_worker_that_leaves_a_process_with_its_pipe_is_noticed(made, tmp_path):
    def leaves(prompt, completion, example):
        if child := os.fork():
            (tmp_path / str(child)).touch()
        else:
            time.sleep(60)
        os._exit(0)

    with pytest.raises(RewardError, match="ended its worker process, twice"):
        rewards(made(leaves), "a")
    children = [int(path.name) for path in tmp_path.iterdir()]
    assert len(children) == 2
    for child in children:
        os.kill(child, signal.SIGKILL)  # which are still there


def test_an_interrupted_call_leaves_no_answer_to_the_next(monkeypatch):
    pytest.importorskip("cloudpickle")
    workers = Workers([lambda x: x], 1)
    poll = Connection.poll

    def interrupted(self, timeout=0.0):
        assert poll(self, 10)  # the answer is there, and is not read
        raise KeyboardInterrupt

    assert workers.call(0, {"x": 1}, 10) == 1
    with monkeypatch.context() as patch:
        patch.setattr(Connection, "poll", interrupted)
        with pytest.raises(KeyboardInterrupt):
            workers.call(0, {"x": 2}, 10)
    assert workers.call(0, {"x": 3}, 10) == 3
    workers.close()


def test_a_forked_process_leaves_the_workers_of_its_parent_running():
    pytest.importorskip("cloudpickle")
    workers = Workers([os.getpid], 1)
    before = workers.call(0, {}, 10)
    child = os.fork()
    if child == 0:
        workers.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert workers.call(0, {}, 10) == before
    workers.close()


def test_an_exception_in_a_worker_is_reported_with_its_traceback(made):
    def broken(prompt, completion, example):
        return example["label"]

    with pytest.raises(RewardError, match=r"'broken' raised KeyError .* for prompt 'p' and completion 'a'") as caught:
        rewards(made(broken), "a")
    assert "in broken" in str(caught.value.__cause__)


def test_a_worker_is_sent_shared_keywords_only_by_name(made):
    def greedy(prompt, completion, example, **kwargs):
        return len(kwargs)

    def curious(prompt, completion, example, tokenizer):
        return tokenizer

    scorer = made([greedy, curious])
    assert scorer.score(requests("a"), tokenizer=7)[0].scores == {"greedy": 1, "curious": 7}  # 1: truncated


def test_a_reward_that_cannot_be_pickled_is_refused_at_once(made):
    lock = threading.Lock()

    def held(prompt, completion, example):
        return float(lock.locked())

    with pytest.raises(UserError, match="held cannot be sent to a worker process"):
        rewards(made(held), "a")


def test_a_scorer_that_was_closed_starts_again(made):
    scorer = made(endless)
    [before] = rewards(scorer, "a")
    scorer.close()
    assert scorer.worker_pids() == []
    assert rewards(scorer, "a") != [before]


# ---- batches for MLX


def test_the_batch_processor_gives_the_weighted_sums_as_an_array():
    import mlx.core as mx

    reward(name="letters")(letters)
    process = create_mlx_optimized_batch_processor(
        [RewardConfig("letters", weight=0.5), RewardConfig("length_reward", params={"target_length": 1})]
    )
    scored = process(["p", "p"], ["abcd", "ab cd ef gh"], [{}, {}])
    assert scored.dtype == mx.float32
    assert list(map(float, scored)) == [3.0, 5.5]
    assert float(mx.mean(scored)) == 4.25


def test_the_batch_processor_heeds_replaced_rewards_verifiers_and_errors():
    reward(name="length_reward")(lambda prompt, completion, example: 1 / len(completion))
    config = RewardConfig("length_reward", verifiers=["contains_keywords"], verifier_penalty=-2)
    process = create_mlx_optimized_batch_processor([config])
    assert process(["p"], ["abcd"], [{}]).tolist() == [0.25]
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        process(["p"], [""], [{}])
    with pytest.raises(UserError, match="1 prompts, 2 completions and 1 examples"):
        process(["p"], ["a", "b"], [{}])


# ---- comparing answers


def test_the_names_documented_are_registered_in_order():
    known = ["length_reward", "keyword_reward", "perplexity_reward", "accuracy_reward", "math_accuracy", "f1_score"]
    assert [name for name in REWARD_REGISTRY if name in (*known, "countdown")] == [*known, "countdown"]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (r"so \boxed{\frac{1}{2}}", Scored(1.0, True)),
        (r"\boxed{0.5}", Scored(1.0, True)),
        (r"\boxed{2}", Scored(0.0, False)),
        ("0.5", Scored(-0.25, False)),
        (r"\boxed{0.5", Scored(-0.25, False)),
        ("", Scored(-0.25, False)),
    ],
)
def test_math_accuracy_reads_the_last_box(completion, expected):
    config = RewardConfig("math_accuracy", params={"format_penalty": 0.25})
    assert Scorer(config)("p", completion, {"answer": "1/2"}) == expected


def test_math_accuracy_can_read_the_whole_completion_and_needs_a_reference():
    fn = get_reward_function("math_accuracy")
    assert fn("p", "2x+x", {"label": "3x"}, extract_box=False)["is_correct"]
    for example in ({}, {"answer": None}, {"answer": " "}):
        with pytest.raises(UserError):
            fn("p", r"\boxed{}", example)


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [("the cat sat", "The cat", 0.8), ("a a b", "a b b", 2 / 3), ("", "x", 0), ("x", "y", 0), ("7", 7, 1)],
)
def test_f1_is_twice_the_shared_words_over_all_words(completion, answer, expected):
    assert get_reward_function("f1_score")("p", completion, {"answer": answer}) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("Paris.", "Paris"),
        ("\u201cParis\u201d!", "paris"),
        ("(PARIS)", "Paris."),
        ("**Paris**", "Paris"),
        ("The U.S.A.", "the USA"),
        ("It's well-known;", "its wellknown"),
        ("42.", 42),
        ("It is 1,000.", "it is 1000"),
        ("($5), 50%: 10:30!", "$5 50% 10:30"),
        ("-5,", "-5"),
        ("+", "+"),
    ],
)
def test_punctuation_belongs_to_no_word(completion, answer):
    assert Scorer("f1_score")("p", completion, {"answer": answer}).reward == 1
    assert Scorer("accuracy_reward")("p", completion, {"answer": answer}).reward == 1


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("-5", "5"),
        ("3.14", "314"),
        (".5", "5"),
        ("$5", "5%"),
        ("1/2", "12"),
        ("10:30", "1030"),
        ("1,5", "15"),
        ("+", "-"),
    ],
)
def test_marks_of_a_number_belong_to_it(completion, answer):
    assert Scorer("f1_score")("p", completion, {"answer": answer}).reward == 0


@pytest.mark.parametrize(
    ("completion", "truncated", "correct"),
    [
        (r"<think>Is it \boxed{4}?</think>So \boxed{5}", False, True),
        (r"Is it \boxed{4}?</think>So \boxed {5}", False, True),
        (r"So \boxed{5}. Or", True, True),
        (r"So \boxed{5}. Or \boxed{", True, False),
        (r"<think>So \boxed{5}", True, False),
        (r"<think>So \boxed{5}", False, False),
        (r"<think>So \boxed{5}</think>It is 5.", False, False),
        (r"[THINK]So \boxed{5}[/THINK]", False, False),
        (r"\boxed{5}<think>or \boxed{6}</think>", False, False),
    ],
)
def test_only_a_box_after_the_thought_is_an_answer(completion, truncated, correct):
    assert Scorer("math_accuracy")("p", completion, {"answer": "5"}, truncated).is_correct is correct


def test_without_a_box_the_answer_is_all_that_follows_the_thought():
    score = Scorer(RewardConfig("math_accuracy", params={"extract_box": False}))
    assert score("p", "<think>It is 4.</think>\n5", {"answer": "5"}).is_correct
    assert not score("p", "<think>5", {"answer": "5"}).is_correct
    assert not score("p", "5", {"answer": "5"}, truncated=True).is_correct


def test_countdown_is_a_reward_by_name():
    scorer = Scorer(RewardConfig("countdown", params={"invalid": 0.0}))
    example = {"numbers": [3, 4, 5], "target": 27}
    assert [scorer("p", c, example) for c in ("3*(4+5)", "3+4", "none")] == [
        Scored(1.0, True),
        Scored(0.0, False),
        Scored(0.0, False),
    ]
