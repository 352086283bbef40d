"""reasoning-gym, the real library: data sets by name, composites, levels, its scorers, and two steps of training."""

import itertools
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from toy_tokenizers import Letters
from two_steps import two_steps

from textpolicy.environment import reasoning_gym_env
from textpolicy.environment.libraries.reasoning_gym import answer_of, make_dataset
from textpolicy.errors import UserError
from textpolicy.tasks import load_task

library = pytest.importorskip(
    "reasoning_gym", reason="reasoning-gym is an extra: pip install 'textpolicy[reasoning-gym]'"
)

LENIENT = {"coin_flip", "complex_arithmetic", "game_of_life_halting"}  # for nonsense, in reasoning-gym 0.1.25
RANDOM = ("ransom_note", "word_ladder", "polynomial_multiplication", "isomorphic_strings", "list_functions", "codeio")
TRAINED = ("chain_sum", "leg_counting", "basic_arithmetic", "letter_counting", "simple_equations")


def make(dataset="chain_sum", size=4, **settings):
    return reasoning_gym_env(dataset, size, tokenizer=Letters(), **settings)


def answer(env, i):
    return env.examples[i]["answer"]


def score(env, i, text):
    return env.score(i, [ord(c) for c in text], False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one data set leaves a file open
@pytest.mark.parametrize("name", sorted(set(library.factory.DATASETS) - {"composite"} - LENIENT))
def test_every_data_set_makes_prompts_and_scores_as_the_library_does(name):
    env = make(name, 1, seed=1)
    entry = env.examples[0]
    assert entry["question"] in env.prompt_text(0)
    text = str(entry["answer"] or "nothing")  # some data sets name no answer
    scored = score(env, 0, f"<answer>{text}</answer>")
    assert scored.reward == library.create_dataset(name, size=1, seed=1).score_answer(text.strip(), entry)
    assert scored.is_correct is (scored.reward >= 1)


@pytest.mark.parametrize("name", sorted(LENIENT))
def test_a_data_set_whose_scorer_gives_nonsense_full_marks_is_refused_by_name(name):
    for dataset in (name, {"chain_sum": 1.0, name: 2.0}):
        with pytest.raises(UserError, match=f"the scorer of reasoning-gym's {name} gives full marks to '"):
            make(dataset, 60)
    with pytest.raises(UserError, match=name if name != "coin_flip" else "only 260 of 650 problems differ"):
        load_task(f"reasoning_gym:{name}")


DRAW = """
import hashlib, random, sys
from textpolicy.environment.libraries.reasoning_gym import make_dataset
random.seed(None)
drawn = make_dataset({name!r}, 8, 7, None, {level})
print(hashlib.sha256(repr([(drawn[i]["question"], drawn[i]["answer"]) for i in range(8)]).encode()).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "level"), [*((name, None) for name in RANDOM), ("word_ladder", 2), (dict.fromkeys(RANDOM, 1.0), None)]
)
def test_every_process_draws_the_same_problems(name, level):
    code, digests = DRAW.format(name=name, level=level), set()
    for seed in ("1", "2", "random"):
        variables = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONWARNINGS": "ignore"}
        ran = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
        digests.add(ran.stdout)
    assert len(digests) == 1


def test_a_data_set_of_ones_own_is_drawn_in_this_process(monkeypatch):
    class Own(library.factory.ProceduralDataset):
        def __getitem__(self, i):
            return {"question": f"{i}?", "answer": str(i), "metadata": {}}

    class Config:
        def __init__(self, size, seed):
            self.size, self.seed = size, seed

        def validate(self):
            pass

    monkeypatch.setitem(library.factory.DATASETS, "own", (Own, Config))
    env = make("own", 3)
    assert [example["question"] for example in env.examples] == ["0?", "1?", "2?"]
    assert score(env, 2, "2").is_correct


@pytest.mark.parametrize(
    ("program", "what"),
    [
        (
            "import pickle, sys; sys.stdout.buffer.write(pickle.dumps('KeyError: x'))",
            r"cannot be drawn \(KeyError: x\)",
        ),
        ("import sys; sys.stdin.read(); sys.exit(3)", "the process that draws reasoning-gym's chain_sum died"),
        ("import os; os.abort()", "the process that draws reasoning-gym's chain_sum died"),
    ],
)
def test_drawing_that_fails_is_one_sentence(monkeypatch, program, what):
    monkeypatch.setattr("textpolicy.environment.libraries.reasoning_gym.CHILD", program)
    with pytest.raises(UserError, match=what):
        make("chain_sum")


def test_what_is_chosen_ends_the_drawing_and_the_process_that_draws(monkeypatch):
    started = []
    true = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: started.append(true(*args, **more)) or started[-1])
    drawn = make_dataset("chain_sum", 10**9, 1, choose=lambda entries: list(itertools.islice(entries, 5)))
    assert len(drawn) == len(drawn.entries) == 5
    assert [child.returncode is not None for child in started] == [True]


def test_the_problems_are_the_librarys_for_that_seed_and_config():
    env = make("chain_sum", 5, seed=7, config={"min_terms": 3, "max_terms": 3}, instructions="")
    theirs = library.create_dataset("chain_sum", size=5, seed=7, min_terms=3, max_terms=3)
    assert [env.prompt_text(i) for i in range(5)] == [entry["question"] for entry in theirs]
    assert score(env, 2, answer(env, 2)) == score(env, 2, f"I add.\n{answer(env, 2)}\n")
    assert score(env, 2, answer(env, 2)).is_correct
    assert not score(env, 2, "no idea").is_correct


def test_partial_scores_are_the_scorers_own():
    env = make("chain_sum")
    text = f"it is {answer(env, 0)}"
    assert score(env, 0, text).reward == pytest.approx(len(answer(env, 0)) / len(text))
    assert score(env, 0, text).is_correct is False


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a <answer>1</answer> b <answer> 2 </answer>", "2"),
        ("one\n two \n\n", "two"),
        ("", ""),
        ("<answer>1", "<answer>1"),
    ],
)
def test_the_answer_is_in_the_last_tag_or_else_the_last_line(text, found):
    assert answer_of(text) == found


def test_a_composite_mixes_data_sets_by_weight_and_each_scores_its_own():
    parts = {"chain_sum": 1.0, "leg_counting": {"weight": 3.0, "config": {"max_animals": 3}}}
    env = make(parts, 200, seed=3)
    sources = [example["metadata"]["source_dataset"] for example in env.examples]
    assert set(sources) == set(parts)
    assert 0.6 < sources.count("leg_counting") / 200 < 0.9
    assert all(score(env, i, answer(env, i)).is_correct for i in range(20))


def test_several_levels_have_problems_of_their_own_each():
    env = make("chain_sum", 3, level=[0, 2])
    assert [example["level"] for example in env.examples] == [0] * 3 + [2] * 3
    assert all(
        env.score(i, [ord(x) for x in example["answer"]], False).is_correct for i, example in enumerate(env.examples)
    )


def test_levels_of_a_curriculum_get_harder():
    lengths = [np.mean([len(e["question"]) for e in make("chain_sum", 50, level=n).examples]) for n in (0, 2, 4)]
    assert lengths[0] < lengths[1] < lengths[2]
    top = [e["question"] for e in make("chain_sum", 5, level=99).examples]
    assert top == [e["question"] for e in make("chain_sum", 5, level=98).examples]


def test_a_scorer_that_raises_gives_0_and_logs_one_warning(caplog):
    env = make("prime_factorization")
    assert [score(env, 0, text).reward for text in ("x", "y", "((")] == [0.0] * 3
    assert caplog.text.count("prime_factorization: ValueError") == 1


def test_a_time_limit_holds_against_an_answer_without_end():
    env = make("countdown", 2, seed=1, time_limit=3.0)
    started = time.perf_counter()
    good, endless = score(env, 0, env.examples[0]["metadata"]["expression"]), score(env, 1, "9**9**9**9")
    assert good.is_correct
    assert np.isnan(endless.reward)
    assert time.perf_counter() - started < 120  # of which 3 s are the limit, and the rest the start of processes


@pytest.mark.parametrize(
    ("dataset", "settings", "sentence"),
    [
        ("chain_sums", {}, "did you mean 'chain_sum'"),
        ({"chain_sums": 1.0}, {}, "did you mean 'chain_sum'"),
        ({}, {}, "a composite has no data sets"),
        ("chain_sum", {"config": {"min_terms": -1}}, "chain_sum cannot be made with"),
        ("chain_sum", {"config": {"terms": 3}}, "chain_sum cannot be made with"),
        ("chain_sum", {"level": -1}, "level is -1"),
        ("chain_sum", {"level": 1, "config": {"min_terms": 2}}, "level is given with config"),
        ({"chain_sum": 1.0}, {"level": 1}, "level is given with config or a composite"),
        ("chain_sum", {"size": 0}, "size is 0"),
    ],
)
def test_a_data_set_that_the_library_cannot_make_is_one_sentence(dataset, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        make(dataset, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_the_embedded_model_trains_two_steps(name, fresh_smollm_engine):
    engine, tokenizer = fresh_smollm_engine
    env = reasoning_gym_env(name, 6, tokenizer=tokenizer, seed=1)
    steps = two_steps(engine, env, 24)
    assert all(0 <= e.reward <= 1 for _, episodes in steps for e in episodes)
    assert all(row["logprob_gap_max"] < 1e-3 for row, _ in steps if row["updated"])
