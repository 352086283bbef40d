"""Tasks of one's own: from a Python file, from rows; what is refused, and a run of one that is resumed."""

import json
import re
import sys

import numpy as np
import pandas as pd
import pytest
from toy_run import metrics, quickly, settings
from toy_tokenizers import Letters

from textpolicy.cli.main import main
from textpolicy.environment import env_from_rows
from textpolicy.errors import UserError
from textpolicy.rewards import Scorer
from textpolicy.rewards.basic import accuracy_reward
from textpolicy.rewards.correctness import f1_score_reward, math_accuracy_reward
from textpolicy.rewards.scoring import call_reward
from textpolicy.tasks import Problem, load_task, task_from_rows
from textpolicy.tasks.own import short_name
from textpolicy.tasks.splits import question_key

ROWS = [{"question": f"q{i}", "answer": i, "level": i % 3} for i in range(40)]


def level(prompt, completion, example, **kwargs):
    return float(example["level"])


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a file in an empty folder that is the current one, and forgets what was imported of it."""
    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), set(sys.modules)

    def write(text, name="my_task.py"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    yield write
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in sys.modules[name].__file__:
            del sys.modules[name]


LETTERS = """
from helpers import COUNT
from textpolicy.tasks import task_from_rows

def letters(prompt, completion, example, **kwargs):
    return sum(c.isalpha() for c in completion) / 6

def task():
    return task_from_rows([{"question": f"Type {n}"} for n in range(COUNT)], letters, max_tokens=6)

def other():
    return "no task"

def broken():
    raise KeyError("x")

def leaky():
    from dataclasses import replace
    whole = task()
    return replace(whole, test=whole.train[:1])

def spelt():
    from dataclasses import replace
    whole = task()
    return replace(whole, test=(replace(whole.train[0], question=whole.train[0].question.lower() + "\\u00a0."),))
"""


@pytest.fixture
def letters(own):
    own("COUNT = 30", "helpers.py")
    return own(LETTERS)


# ---- rows


def test_rows_are_split_once_and_for_all_and_reach_the_reward_whole():
    task = task_from_rows([*ROWS, {"question": "q3", "answer": "another"}], level)
    assert (len(task.test), len(task.validation), len(task.train)) == (8, 4, 28)
    assert {p.question for p in (*task.test, *task.validation, *task.train)} == {r["question"] for r in ROWS}
    assert task.train == task_from_rows(ROWS, level).train
    third = next(p for p in (*task.test, *task.validation, *task.train) if p.question == "q3")
    assert third.example == {"question": "q3", "answer": 3, "level": 0}
    assert third.answer == 3
    assert task.prompt("q3") == [{"role": "user", "content": "q3"}]


def test_rows_of_a_file_with_columns_of_other_names(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"ask": r["question"], "level": 1}) + "\n" for r in ROWS))
    task = task_from_rows(path, level, question="ask", prompt=lambda q: [{"role": "system", "content": q}])
    assert len(task.train) == 28
    assert task.train[0].answer == ""
    assert task.prompt("x") == [{"role": "system", "content": "x"}]
    with pytest.raises(UserError, match=rf"no column in row 1 of {path} called 'question'; choose one of ask, level"):
        task_from_rows(path, level)
    with pytest.raises(UserError, match=rf"no column of answers in {path} called 'levels'; did you mean 'level'"):
        task_from_rows(path, level, question="ask", answer="levels")


def everything(task):
    return [*task.train, *task.validation, *task.test]


@pytest.mark.parametrize("cell", [None, float("nan"), np.float32("nan"), np.datetime64("NaT"), pd.NA, pd.NaT])
def test_a_missing_cell_is_no_answer_and_no_question(cell):
    task = task_from_rows([{**ROWS[0], "answer": cell}, *ROWS[1:]], level)
    assert [p.example["answer"] for p in everything(task) if p.question == "q0"] == [""]
    with pytest.raises(UserError, match=r"^row 2 of the rows has nothing in its column 'question'; fill it in"):
        task_from_rows([ROWS[1], {**ROWS[0], "question": cell}, *ROWS], level)


@pytest.mark.parametrize("final", ["final", "label", "ground_truth"])
@pytest.mark.parametrize("grade", [math_accuracy_reward, accuracy_reward, f1_score_reward])
def test_the_named_columns_are_the_question_and_the_answer_whatever_others_are_called(final, grade):
    wrong = {"question": "id", "answer": "a long way", "label": "easy", "ground_truth": "none", "level": 2}
    rows = [{**wrong, "ask": f"{i}?", final: i} for i in range(9)] + [{**wrong, "ask": "9?", final: None}]
    task = task_from_rows(rows, level, question="ask", answer=final)
    for problem in everything(task):
        row = rows[int(problem.question[:-1])]
        solution = "" if row[final] is None else row[final]
        kept = {"level": 2, "ask": row["ask"], final: row[final]}
        assert problem.example == {**kept, "question": row["ask"], "answer": solution, "row": row}
        if solution == "":
            with pytest.raises(UserError, match="has no correct answer"):
                grade("?", r"\boxed{easy}", problem.example)
        else:
            said = rf"\boxed{{{solution}}}" if grade is math_accuracy_reward else f"{solution}"
            assert call_reward(grade, "?", said, problem.example).reward == 1.0
    assert Problem("asked", "right", {"answer": "wrong", "question": "wrong"}).example == {
        "question": "asked",
        "answer": "right",
    }


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_messages_in_a_column_are_asked_as_messages(kind):
    chats = [[{"role": "system", "content": "Count."}, {"role": "user", "content": f"{i} + 1?"}] for i in range(9)]
    task = task_from_rows([{"prompt": kind(chat), "answer": 1} for chat in chats], level, question="prompt")
    asked = [task.prompt(p.question) for p in everything(task)]
    assert sorted(asked, key=str) == sorted(chats, key=str)


@pytest.mark.parametrize(
    ("cell", "what"),
    [
        (b"2+2?", "holds a bytes"),
        ({"text": "2+2?"}, "holds a dict"),
        (["2+2?", "3+3?"], "holds a list"),
        ({"2+2?"}, "holds a set"),
        (True, "holds a bool"),
        ([{"content": "2+2?"}], "holds a list"),
        (pd.Timestamp(0), "holds a Timestamp"),
        (np.array(["2+2?"]), "holds a list"),
        ("[{'role': 'user', 'content': '2+2?'}]", "holds chat messages that were written as text"),
        ('[{"content": "2+2?",\n "role": "user"}]', "holds chat messages that were written as text"),
        ("({'role': 'user', 'content': '2+2?'},)", "holds chat messages that were written as text"),
        ('{"role": "user", "content": "2+2?"}', "holds chat messages that were written as text"),
        ('[{"from": "human", "value": "2+2?"}]', "holds chat messages that were written as text"),
        (" \n", "has nothing"),
        ([], "has nothing"),
    ],
)
def test_what_is_no_text_and_no_messages_is_not_asked(cell, what):
    rows = [*ROWS, {"question": cell}]
    with pytest.raises(UserError, match=f"question.*row 41 of the rows {what}|row 41 of the rows {what}.*'question'"):
        task_from_rows(rows, level)
    with pytest.raises(UserError, match=what):
        env_from_rows(rows, level, tokenizer=Letters(), prompt="question")


SPELLINGS = [
    "What  is\t{} caf\u00e9?\n",
    "what is {} cafe\u0301",
    "What is\u00a0{} caf\u00e9 ?",
    "\ufeffWhat is {} caf\u00e9?!",
    "\uff37\uff48\uff41\uff54 is {} caf\u00e9\uff1f",
    "Wh\u200bat is {} caf\u00e9...",
    "WHAT IS {} CAF\u00c9\u3002",
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_one_question_are_in_one_split(spelling):
    rows = [{"question": text.format(i)} for text in ("What is {} caf\u00e9?", spelling) for i in range(30)]
    task = task_from_rows(rows, level)
    splits = [{question_key(p.question) for p in split} for split in (task.train, task.validation, task.test)]
    assert [len(split) for split in splits] == [21, 3, 6]
    assert len({key for split in splits for key in split}) == 30
    assert len(everything(task)) == 60  # both spellings are kept


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("5\u00b2?", "52?"),
        ("1\u00bd", "11/2"),
        ("a + b", "a - b"),
        ("()(", "())"),
        ("f(x)'", "f(x)"),
        ("?!", "?"),
        ("12", "1 2"),
    ],
)
def test_questions_that_differ_in_more_than_spelling_differ(one, other):
    assert question_key(one) != question_key(other)
    chats = [[{"role": "user", "content": text}, {"role": "user"}] for text in (one, one.upper() + " ", other)]
    assert question_key(chats[0]) == question_key(chats[1]) != question_key(chats[2])
    assert question_key((one, 2)) != question_key((other, 2))


def test_too_few_rows_are_refused():
    with pytest.raises(UserError, match="the number of different problems in the rows is 2; give 3 or more"):
        task_from_rows([*ROWS[:2], ROWS[0]], level)


# ---- files


class CutError(Exception):
    """Stands for the end of the process."""


def test_a_file_is_a_task_by_its_own_function_or_another(letters):
    assert len(load_task("my_task.py").train) == 21
    assert load_task(f"{letters}:task").test == load_task("my_task.py").test
    assert short_name("folder/my_task.py") == short_name("my_task.py:task") == "my_task"
    assert short_name("my_task.py:other") == "my_task-other"
    assert short_name("reasoning_gym:chain_sum") == "reasoning_gym:chain_sum"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.py", "there is no file nothing.py with the task; check the path"),
        ("my_task.py:tusk", "there is no function in my_task.py called 'tusk'; did you mean 'task'"),
        ("my_task.py:other", r"other\(\) of my_task.py returned a str; return a textpolicy.tasks.Task"),
        ("my_task.py:broken", r"broken\(\) of my_task.py raised KeyError in line 15 \('x'\); fix it"),
        ("my_task.py:leaky", r"'Type \d+' is in two splits of the task of my_task.py; keep it in one"),
        ("my_task.py:spelt", r"'type \d+.*' is in two splits of the task of my_task.py; keep it in one"),
        ("json.py", "the file json.py has the name of another module, json; rename it"),
        ("this.py", "the file this.py cannot be imported as 'this'; give it a name that no other module has"),
        ("wrong.py", r"wrong.py raised SyntaxError .*; fix it"),
        ("bad.py", r"bad.py raised ZeroDivisionError in line 2 \(division by zero\); fix it"),
    ],
)
def test_a_mistake_in_a_task_file_is_one_sentence(letters, own, name, message):
    own("", "json.py")
    own("", "this.py")
    own("def task(:", "wrong.py")
    own("\n1 / 0", "bad.py")
    with pytest.raises(UserError, match=message) as error:
        load_task(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags", [[], ["--rewards.processes"]])
def test_a_run_of_a_users_task_stores_its_file_and_reports_when_it_changed(letters, monkeypatch, capsys, flags):
    from textpolicy.run import training_run as run_module

    quickly(monkeypatch)
    config, folder = settings(letters.parent), letters.parent / "run"
    arguments = ["--task=my_task.py", "--rewards.correct-from=0.5", *flags]
    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, "finish", lambda *arguments: (_ for _ in ()).throw(CutError()))
        with pytest.raises(CutError):
            main(["train", str(config), f"--output={folder}", *arguments])
    assert (folder / "task.py").read_text() == LETTERS
    rows = [row for row in metrics(folder) if row["kind"] == "train"]
    assert 0 < sum(row["accuracy"] for row in rows) < len(rows)
    letters.write_text(LETTERS + "\n# another")
    assert main(["train", f"--resume={folder}"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "not the same code or platform as before (my_task.py " in output


def test_a_run_whose_questions_are_others_now_is_refused_unless_that_is_allowed(letters, monkeypatch, capsys):
    from textpolicy.run import training_run as run_module

    quickly(monkeypatch)
    config, folder = settings(letters.parent), letters.parent / "run"
    arguments = [f"--output={folder}", "--task=my_task.py", "--rewards.correct-from=0.5"]
    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, "finish", lambda *arguments: (_ for _ in ()).throw(CutError()))
        with pytest.raises(CutError):
            main(["train", str(config), *arguments])
    letters.write_text(LETTERS.replace("Type", "Write"))
    del sys.modules["my_task"]
    assert main(["train", f"--resume={folder}"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    changes = re.search(
        r"other settings \(task (.*)my_task.py with questions (\w+) -> (.*) with questions (\w+)\)", message
    )
    assert changes
    assert changes[3] == f"{changes[1]}my_task.py"
    assert changes[2] != changes[4]
    assert "--allow task" in message
    assert main(["train", f"--resume={folder}", "--allow=task"]) == 0


def test_a_run_continues_to_its_end_after_its_file_is_removed(letters, monkeypatch):
    from textpolicy.mlx.engine import MLXEngine

    true = MLXEngine.update

    def update(*arguments):
        letters.unlink(missing_ok=True)
        return true(*arguments)

    monkeypatch.setattr(MLXEngine, "update", update)
    quickly(monkeypatch)
    config, folder = settings(letters.parent), letters.parent / "run"
    assert main(["train", str(config), f"--output={folder}", "--task=my_task.py", "--rewards.correct-from=0.5"]) == 0
    assert (folder / "summary.json").exists()
    assert (folder / "task.py").read_text() == LETTERS


# ---- which completions are correct


@pytest.mark.parametrize(
    ("reward", "correct"), [(0.4, False), (0.5, True), (float("nan"), None), ((0.1, True), True), ((0.9, False), False)]
)
def test_a_reward_without_is_correct_is_evaluated_by_a_bound(reward, correct):
    scorer = Scorer(lambda prompt, completion, example: reward, correct_from=0.5)
    assert scorer("", "", {}).is_correct is correct
    assert Scorer(lambda prompt, completion, example: 0.4)("", "", {}).is_correct is None
