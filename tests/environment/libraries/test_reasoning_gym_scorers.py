"""What is made of the scores of reasoning-gym's scorers, with scorers of our own: lenient, broken, and good ones."""

import math

import pytest

from textpolicy.environment.libraries.reasoning_gym import EntryReward, answer_of, refuse_lenient
from textpolicy.errors import UserError

NUMBERS = [{"question": f"{n}?", "answer": str(n), "metadata": {"source_dataset": "sums"}} for n in range(2, 12)]
TRUTHS = [{**entry, "answer": str(n % 2 == 0)} for n, entry in enumerate(NUMBERS)]
PREFIXED = [*NUMBERS, *({**NUMBERS[0], "answer": f"0.{n}"} for n in range(1, 4))]
UNKNOWN = [{**entry, "answer": None} for entry in NUMBERS]


class Library:
    """The library's data set with a scorer ``(answer, entry) -> score``."""

    def __init__(self, scorer):
        self.score_answer = scorer


def exact(answer, entry):
    return float(answer.strip() == entry["answer"])


def number(answer, entry):
    return float(float(answer) == float(entry["answer"]))


def raises(answer, entry):
    raise KeyError(answer)


@pytest.mark.parametrize(
    ("scorer", "entries"),
    [
        (exact, NUMBERS),
        (number, NUMBERS),
        (number, [{**NUMBERS[0], "answer": text} for text in ("0", "0.0", "-0", "0e5")]),  # all the same answer
        (exact, [{**NUMBERS[0], "answer": text} for text in ("", "nan", "None", "[]", "nonsense", "0")]),
        (lambda a, e: float(a.casefold() == e["answer"].casefold()), TRUTHS),
        (lambda a, e: 0.9 if a != e["answer"] else 1.0, NUMBERS),  # much for nonsense, but less than for the answer
        (raises, NUMBERS),
        (raises, UNKNOWN),
        (lambda a, e: float(a.count("R") == 3), UNKNOWN),
        (lambda a, e: math.nan, NUMBERS),
    ],
)
def test_a_scorer_that_tells_answers_from_nonsense_is_taken(scorer, entries):
    refuse_lenient("sums", Library(scorer), entries)


@pytest.mark.parametrize(
    ("scorer", "entries"),
    [
        (lambda a, e: 1.0, NUMBERS),
        (lambda a, e: 1.0, UNKNOWN),
        (lambda a, e: float(bool(a) == bool(e["answer"])), NUMBERS),
        (lambda a, e: float(bool(a) == (e["answer"] == "True")), TRUTHS),
        (lambda a, e: float(a in ("True", "False")), TRUTHS),
        (lambda a, e: min(1.0, math.exp(-abs(float(a) - float(e["answer"])))), NUMBERS),  # min(1, nan) is 1
        (lambda a, e: float(e["answer"].startswith(a)) if a.strip() else 0.0, PREFIXED),
        (lambda a, e: float(a != ""), NUMBERS),
        (lambda a, e: 0.5, NUMBERS),  # no more for the answer itself
        (lambda a, e: float(set(a) <= set("0123456789")), NUMBERS),
        (lambda a, e: int("?" in a), UNKNOWN),
        (lambda a, e: not a.strip(), NUMBERS),
    ],
)  # fmt: skip
def test_a_scorer_that_gives_nonsense_full_marks_is_refused_by_name(scorer, entries):
    with pytest.raises(UserError, match=r"the scorer of reasoning-gym's sums gives full marks to '.*' where"):
        refuse_lenient("sums", Library(scorer), entries)


@pytest.mark.parametrize("score", [math.nan, math.inf, -0.5, 1.5, None, "much", [0.5]])
def test_a_score_that_is_no_number_from_0_to_1_is_none(score, caplog):
    reward = EntryReward({None: Library(lambda answer, entry: score)}, str)
    assert reward("?", "2", NUMBERS[0]) == {"reward": 0.0, "is_correct": False}
    assert reward("?", "3", NUMBERS[0]) == {"reward": 0.0, "is_correct": False}
    assert caplog.text.count("sums:") == 1


@pytest.mark.parametrize(
    ("completion", "more", "reward"),
    [
        ("2", {}, 1.0),
        ("<think>2</think>3", {}, 0.0),
        ("<think>3</think>2", {}, 1.0),
        ("2", {"thinking": "<think>"}, 0.0),
        ("3</think>2", {"thinking": "<think>"}, 1.0),
        ("<think>2", {"truncated": True}, 0.0),
    ],
)
def test_only_what_stands_after_the_thought_is_scored(completion, more, reward):
    assert EntryReward({None: Library(exact)}, str)("?", completion, NUMBERS[0], **more)["reward"] == reward


def test_a_last_line_that_was_cut_off_is_no_answer_and_a_closed_tag_is_one():
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is an extra: pip install 'textpolicy[reasoning-gym]'")
    reward = EntryReward({None: Library(exact)}, answer_of)
    for completion, score in {"I say 2 or\n2": 0.0, "<answer>2</answer> as": 1.0, "<answer>2": 0.0}.items():
        assert reward("?", completion, NUMBERS[0], truncated=True)["reward"] == score
    assert reward("?", "so\n2", NUMBERS[0])["reward"] == 1.0
