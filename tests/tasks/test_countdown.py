"""Countdown: exact arithmetic, what counts as the answer, scores worked by hand, hostile text."""

import random
import time
from fractions import Fraction

import pytest

from textpolicy.errors import UserError
from textpolicy.tasks.countdown import (
    MAX_DEPTH,
    MAX_LENGTH,
    TINYZERO_RULES,
    CountdownRules,
    EvalResult,
    ExpressionError,
    countdown_reward,
    countdown_reward_with_info,
    evaluate_expression,
    extract_answer_tag,
    extract_expression_from_completion,
    format_countdown_prompt,
    generate_countdown_problems,
    is_solvable,
    score_countdown,
)

HOSTILE = [
    "(" * 10_000,
    "(" * 400 + "1" + ")" * 400,
    "9" * 5000,
    "9" * 400,
    "-" * 100_000 + "1",
    "1+" * 100_000 + "1",
    "1/" * 400 + "0",
    "<answer>" * 100_000,
    "<answer></answer>" * 50_000,
    "1.1+" * 100_000,
    "1 +" * 100_000,
    "1+x\n" * 50_000,
    "`" * 100_000,
    "*" * 100_000,
    "\\left" * 50_000,
    "1+٣",
    "²+1",
    "1+\x00",
    "__import__('os')",
    "9**9**9**9",
]


# ---- expressions


@pytest.mark.parametrize(
    ("expr", "value"),
    [
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("2-3-4", -5),
        ("24/4/3", 2),
        ("24/(4/3)", 18),
        ("8/(3-8/3)", 24),
        ("1/3*3", 1),
        ("-(2+3)", -5),
        ("2*-3", -6),
        ("2--3", 5),
        ("+-+7", -7),
        (" 1 + 2 ", 3),
        ("007", 7),
    ],
)
def test_expressions_have_their_schoolbook_value(expr, value):
    assert evaluate_expression(expr).value == value


def test_values_are_exact():
    assert evaluate_expression("1/3+1/3+1/3").value == 1
    assert evaluate_expression("10000000000000001/10000000000000000").value != 1


def random_expression(rng, depth):
    """A text with the value that building it gave."""
    if depth == 0 or rng.random() < 0.2:
        n = rng.randint(0, 30)
        return str(n), Fraction(n), [n]
    (a, x, used), (b, y, also) = random_expression(rng, depth - 1), random_expression(rng, depth - 1)
    sign = rng.choice("+-*/") if y else rng.choice("+-*")
    value = {"+": lambda: x + y, "-": lambda: x - y, "*": lambda: x * y, "/": lambda: x / y}[sign]()
    if rng.random() < 0.3:
        return f"-({a}) {sign} ({b})", {"+": y - x, "-": -x - y}.get(sign, -value), used + also
    return f"({a}){sign}( {b})", value, used + also


def test_random_expressions_evaluate_to_what_they_were_built_from():
    rng = random.Random(0)
    for _ in range(300):
        text, value, used = random_expression(rng, 4)
        assert evaluate_expression(text) == EvalResult(value, tuple(used))


@pytest.mark.parametrize(
    "expr",
    ["", " ", "abc", "1+", "+", "()", "(1+2", "1+2)", ")1(", "3(4)", "(3)(4)", "1 2", "2**3", "7//2", "2^3", "1.5+2",
     "1,000", "1e3", "4/0", "4/(2-2)", "1_0", "1+2=3", "3\u00d74", "1\n+2", "x", "*3"],
)  # fmt: skip
def test_everything_else_is_not_an_expression(expr):
    with pytest.raises(ExpressionError):
        evaluate_expression(expr)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:12])
def test_hostile_text_is_an_ordinary_invalid_expression(text):
    start = time.process_time()
    with pytest.raises(ExpressionError) as raised:
        evaluate_expression(text, [3, 4, 5])
    assert countdown_reward("p", text, {"numbers": [3, 4, 5], "target": 27}) == -0.5
    assert time.process_time() - start < 2  # seconds; the length is what takes it, not the square of it
    assert len(str(raised.value)) < 300


def test_the_limits_themselves_are_allowed():
    assert evaluate_expression("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH).value == 1
    assert evaluate_expression("9" * MAX_LENGTH).value == 10**MAX_LENGTH - 1
    assert evaluate_expression("1" + "+(1)" * 200).value == 201  # parentheses side by side are not deep


def test_each_given_number_may_be_used_once():
    assert evaluate_expression("3*(4+5)", [3, 4, 5]).numbers_used == (3, 4, 5)
    assert evaluate_expression("3+4", [3, 4, 5]).value == 7
    assert evaluate_expression("3+3", [3, 3]).value == 6
    for expr in ("3+3", "6", "34"):
        with pytest.raises(ExpressionError, match="at most once"):
            evaluate_expression(expr, [3, 4, 5])


# ---- what a completion answers


@pytest.mark.parametrize(
    ("completion", "expr"),
    [
        ("Multiply first.\n3*(4+5)", "3*(4+5)"),
        ("1+2\n3*(4+5)", "3*(4+5)"),
        ("1+2\n3*(4+5)\nThat is it: 9+9", "9+9"),
        ("3+4+5 is 12, no. So 3*(4+5) it is.", "3*(4+5)"),
        ("3*(4+5)\nNo: my answer is 3*4*5!", "3*4*5"),
        ("- 3*(4+5)", "3*(4+5)"),
        ("Steps:\n* 4+5\n* **3*(4+5)**", "3*(4+5)"),
        ("+ `3*(4+5)`", "3*(4+5)"),
        ("\u2022 3*(4+5)", "3*(4+5)"),
        ("2. 3*(4+5)", "3*(4+5)"),
        ("(2) 3*(4+5)", "3*(4+5)"),
        ("**Answer:** 3*(4+5)", "3*(4+5)"),
        ("Answer - 3*(4+5) - uses all", "3*(4+5)"),
        ("3*(4+5) (uses all)", "3*(4+5)"),
        ("x=3*(4+5)", "3*(4+5)"),
        ("-3*(-4-5)", "-3*(-4-5)"),
        ("3*[4+5]", "3*(4+5)"),
        ("{3*[(4)+5]}", "(3*((4)+5))"),
        (r"3 \cdot \left[4+5\right]", "3 * (4+5)"),
        (r"\(3\times\{4+5\}\)", "3*(4+5)"),
        ("3*(4+5]", "3*(4+5]"),
        (r"\dfrac{3*(4+5)}{\frac{4}{4}}", "((3*(4+5))/(((4)/(4))))"),
        (r"So \boxed{27 = 3*(4+5)}, as 4+5 = 9.", "3*(4+5)"),
        ("3*(4+5)\nCheck: 4+5 = 9, 3*9 = 27.", "3*(4+5)"),
        ("It is 3*(4+5) = 27, because (4+5) = 9 and 27 = 9*3.", "3*(4+5)"),
        ("3*(4+5), which is right since 9*3 = 27.", "3*(4+5)"),
        ("((8-2)*3)+1 works: 18+1 = 19", "((8-2)*3)+1"),
        ("3*4+5*3, so 12+15 = 27", "3*4+5*3"),
        ("3*(4+5), which is 3*9 = 28", "3*9"),
        ("3*(4+5)-2 is not it, but 3*9 = 27", "3*9"),
        ("9-(4+5)+27 is it, or 9*3 = 27", "9*3"),
        ("a) 3*(4+5)", "3*(4+5)"),
        ("(b) (4+5)*3", "(4+5)*3"),
        ("- [x] 3*(4+5)", "3*(4+5)"),
        ("\uff13\u2219\uff084\uff0b5\uff09\uff1d27", "3*(4+5)"),
        (r"3 \* (4+5)", "3 * (4+5)"),
        ("It is 3*(4+5). 4+5 = 9. No: 3*4+5", "3*4+5"),
        ("It is 3*(4+5) = 27. No, it is 4+5", "4+5"),
        ("It is 3*(14+52), as 4+5 = 9", "4+5"),
        ("4+5 = 9, so 9*(5-2) = 27", "9*(5-2)"),
        ("3 x (4+5)", "3*(4+5)"),
        ("3\u2022(4+5)", "3*(4+5)"),
        ("<think>3*(4+5)</think>", ""),
        ("<think>3*(4+5)</think>3*4", "3*4"),
        ("<think>3*(4+5)", ""),
        ("2^(4+5)", ""),
        ("(4+5) ^ 2", ""),
        ("3*(4+5) % 7", ""),
        ("x * 3*(4+5)", ""),
        ("4! + 3", ""),
        (r"\sqrt{4+5}*3", ""),
        ("3*(4+5) /", "3*(4+5) /"),
        ("3*(4+5)\n27", "3*(4+5)"),
        ("3*(4+5)\n= 27", "3*(4+5)"),
        ("<answer>3*(4+5)</answer>\n1+1", "3*(4+5)"),
        ("<answer>1+1</answer> no, <answer> 3*(4+5) </answer>", "3*(4+5)"),
        ("<answer>27 = 3*(4+5)</answer>", "3*(4+5)"),
        ("<answer>3*(4+5)", "3*(4+5)"),
        ("<answer>I give up</answer>", "I give up"),
        ("27 = 3*(4+5)", "3*(4+5)"),
        ("3*(4+5) = 27", "3*(4+5)"),
        ("x = 3*(4+5) = 3*9 = 27", "3*(4+5)"),
        ("4+5 = 9\n3*9 = 27", "3*9"),
        ("The answer is 3*(4+5).", "3*(4+5)"),
        ("Answer:3*(4+5)", "3*(4+5)"),
        ("Using 3, 4 and 5 we get 3*(4+5)", "3*(4+5)"),
        ("3\u00d7(4+5)", "3*(4+5)"),
        ("9\u22124", "9-4"),
        ("8\u00f74", "8/4"),
        (r"$3 \times \left(4+5\right)$", "3 * (4+5)"),
        ("**3*(4+5)**", "3*(4+5)"),
        ("`3*(4+5)`", "3*(4+5)"),
        ("27", "27"),
        ("3**4", "3**4"),
        ("2(3+4)", "2(3+4)"),
        ("it is 1.5+2", ""),
        ("it is 2+1.5", ""),
        ("it is 3^2+1", ""),
        ("a3+4b", ""),
        ("no idea", ""),
        ("well-known, 3", ""),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_the_last_expression_is_the_answer(completion, expr):
    assert extract_expression_from_completion(completion) == expr


def test_an_answer_tag_needs_both_ends():
    assert extract_answer_tag("<answer>1</answer>") == "1"
    assert extract_answer_tag("<answer>1</answer><answer>2") == "1"
    assert extract_answer_tag("1</answer>") is None
    assert extract_answer_tag("<answer>1</answer>\n", last_line_only=True) is None
    assert extract_answer_tag("x\n<answer>1</answer>", last_line_only=True) == "1"


# ---- scores

NUMBERS, TARGET = [3, 4, 5], 27


@pytest.mark.parametrize(
    ("completion", "default", "all_used", "tinyzero"),
    [
        ("<answer>3*(4+5)</answer>", 1.0, 1.0, 1.0),
        ("3*(4+5)", 1.0, 1.0, 0.0),
        ("3+4\n3*(4+5)", 1.0, 1.0, 0.0),
        ("<answer>3*4+5</answer>", 0.0, 0.0, 0.1),
        ("<answer>4+5</answer>", 0.0, -0.5, 0.1),
        ("<answer>27</answer>", -0.5, -0.5, 0.1),
        ("<answer>3*(4+5)+3-3</answer>", -0.5, -0.5, 0.1),
        ("<answer>banana</answer>", -0.5, -0.5, 0.1),
        ("<answer></answer>", -0.5, -0.5, 0.1),
        ("", -0.5, -0.5, 0.0),
    ],
)
def test_scores_by_the_three_sets_of_rules(completion, default, all_used, tinyzero):
    example = {"numbers": NUMBERS, "target": TARGET}
    assert countdown_reward("p", completion, example) == default
    assert countdown_reward("p", completion, example, use_all=True) == all_used
    assert score_countdown(completion, NUMBERS, TARGET, TINYZERO_RULES).reward == tinyzero


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("3*(4+5)", -0.5),
        ("It is 3*(4+5), because", -0.5),
        ("<answer>3*(4+5)", -0.5),
        ("<answer>3*(4+5)</answer> is", 1.0),
        (r"\boxed{3*(4+5)} is", 1.0),
        ("<think><answer>3*(4+5)</answer>", -0.5),
    ],
)
def test_what_was_cut_off_is_an_answer_only_in_a_tag_or_box(completion, reward):
    example = {"numbers": NUMBERS, "target": TARGET}
    assert countdown_reward("p", completion, example, truncated=True) == reward
    assert countdown_reward_with_info("p", completion, example, thinking="<think>")["reward"] == -0.5


def test_numbers_below_zero_are_used_as_they_are_called_solvable():
    for numbers, target, expr in (([-3, 5], 2, "-3+5"), ([-3, 5], -15, "(-3)*5"), ([-3, -5], 8, "-(-3)-(-5)")):
        assert is_solvable(numbers, target)
        assert evaluate_expression(expr, numbers).value == target
        assert score_countdown(expr, numbers, target).is_correct
    with pytest.raises(ExpressionError, match="at most once"):
        evaluate_expression("-3-3", [-3, 5])


def test_is_correct_is_reported_beside_the_reward():
    example = {"numbers": NUMBERS, "target": TARGET}
    assert countdown_reward_with_info("p", "3*(4+5)", example) == {"reward": 1.0, "is_correct": True}
    assert countdown_reward_with_info("p", "3*4*5", example) == {"reward": 0.0, "is_correct": False}
    assert countdown_reward_with_info("p", "?", example, invalid=0) == {"reward": 0.0, "is_correct": False}
    assert score_countdown("3*(4+5)", NUMBERS, TARGET, CountdownRules(correct=0.0)).is_correct


def test_nearly_right_is_wrong():
    assert countdown_reward("p", "100000000001/100000000000", {"numbers": [100000000001, 10**11], "target": 1}) == 0.0


@pytest.mark.parametrize(
    "example",
    [{}, {"numbers": [1, 2]}, {"target": 3}, {"numbers": "1 2", "target": 3}, {"numbers": [1], "target": "1"},
     {"numbers": None, "target": 3}, {"numbers": [1.5], "target": 3}],
)  # fmt: skip
def test_an_example_without_a_problem_is_refused(example):
    with pytest.raises(UserError, match="countdown example"):
        countdown_reward("p", "1+2", example)


# ---- problems


def reachable(values, target, use_all):
    """By trying every pair of numbers, in every order: slow, and without any table."""
    if (len(values) == 1 or not use_all) and target in values:
        return True
    for i, a in enumerate(values):
        for j, b in enumerate(values):
            if i != j:
                rest = [v for k, v in enumerate(values) if k not in (i, j)]
                results = [a + b, a - b, a * b, *([a / b] if b else [])]
                if any(reachable([*rest, r], target, use_all) for r in results):
                    return True
    return False


@pytest.mark.parametrize("use_all", [False, True])
def test_solvable_means_that_some_order_of_operations_gets_there(use_all):
    rng = random.Random(1)
    verdicts = []
    for _ in range(60):
        numbers, target = [rng.randint(0, 9) for _ in range(rng.randint(1, 3))], rng.randint(0, 40)
        verdicts.append(is_solvable(numbers, target, use_all))
        assert verdicts[-1] == reachable([Fraction(n) for n in numbers], target, use_all), (numbers, target)
    assert any(verdicts)
    assert not all(verdicts)


def test_fractions_on_the_way_count():
    assert is_solvable([3, 3, 8, 8], 24, use_all=True)  # 8 / (3 - 8 / 3)
    assert is_solvable([5, 5, 5, 1], 24, use_all=True)  # 5 (5 - 1 / 5)
    assert not is_solvable([1, 1, 1, 1], 24)


def test_using_all_numbers_is_harder():
    assert is_solvable([7, 50], 7)
    assert not is_solvable([7, 50], 7, use_all=True)
    assert not is_solvable([], 0)


def test_a_search_that_would_not_end_is_refused():
    with pytest.raises(UserError, match="at most 6"):
        is_solvable([1] * 7, 5)


def test_problems_depend_on_the_seed_alone():
    state = random.getstate()
    first = generate_countdown_problems(5, seed=3)
    assert random.getstate() == state
    assert first == generate_countdown_problems(5, seed=3)
    assert first != generate_countdown_problems(5, seed=4)


def test_problems_keep_to_their_ranges_and_can_be_solved():
    problems = generate_countdown_problems(20, num_numbers=3, number_range=(2, 6), target_range=(8, 12), seed=0)
    assert len(problems) == 20
    for problem in problems:
        assert len(problem["numbers"]) == 3
        assert all(2 <= n <= 6 for n in problem["numbers"])
        assert 8 <= problem["target"] <= 12
        assert is_solvable(problem["numbers"], problem["target"])


def test_unsolvable_problems_are_kept_on_request():
    one = generate_countdown_problems(
        1, num_numbers=1, number_range=(1, 1), target_range=(9, 9), ensure_solvable=False, seed=0
    )
    assert one == [{"target": 9, "numbers": [1]}]


def test_ranges_without_solutions_are_reported():
    with pytest.raises(UserError, match="only 0 of 2"):
        generate_countdown_problems(2, num_numbers=1, number_range=(1, 1), target_range=(9, 9), seed=0)
    with pytest.raises(UserError, match="number_range"):
        generate_countdown_problems(1, number_range=(5, 1))


def test_the_prompt_states_the_problem_and_the_rules():
    prompt = format_countdown_prompt(24, [3, 3, 8, 8])
    assert "24" in prompt
    assert "3, 3, 8, 8" in prompt
    assert "at most once" in prompt
    assert "exactly once" in format_countdown_prompt(24, [3, 3, 8, 8], use_all=True)
    assert countdown_reward("p", prompt, {"numbers": [3, 3, 8, 8], "target": 24}) < 1  # it does not answer itself
