"""Settings, durations and names as people write them."""

import pytest

from textpolicy.report.words import duration, folder_names, in_points, natural, setting, title_of


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"), (0.44, "0.4 s"), (9.96, "10 s"), (45, "45 s"), (59.6, "1 min"), (61, "1 min 1 s"),
        (283, "4 min 43 s"), (599.7, "10 min"), (1504, "25 min"), (3599, "1 h"), (3725, "1 h 2 min"),
        (86_399, "1 d"), (200_000, "2 d 8 h"), (float("nan"), "unknown"), (float("inf"), "unknown"),
    ],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_numbers_are_in_order_in_names_and_alone():
    assert sorted(["r10", "r2", "r1", "r02b", "a"], key=natural) == ["a", "r1", "r2", "r02b", "r10"]
    assert sorted([10, 2, None, "x10", "x9", 1e-5, False], key=natural) == [None, False, 1e-5, 2, 10, "x9", "x10"]
    long = ["a" + "9" * 5000, "a1" + "0" * 5000, "a", 10**400, "a0", "a0012", "a7"]
    assert sorted(long, key=natural) == [10**400, "a", "a0", "a7", "a0012", "a" + "9" * 5000, "a1" + "0" * 5000]


@pytest.mark.parametrize(
    ("name", "value", "among", "text"),
    [
        ("algorithm.name", "gspo", (), "gspo"),
        ("optimizer.learning_rate", 1e-4, (), "learning rate 0.0001"),
        ("optimizer.learning_rate", None, (), "learning rate by default"),
        ("adapter.rank_stabilised", True, (), "rank stabilised on"),
        ("adapter.modules", ["q", "v"], (), "modules q, v"),
        ("adapter.modules", [], (), "modules none"),
        ("rollout.group_size", 8, ("rollout.group_size", "adapter.group_size"), "rollout group size 8"),
        ("task", None, (), "task by default"),
    ],
)
def test_settings(name, value, among, text):
    assert setting(name, value, among) == text


def test_titles_name_three_arms_and_count_more():
    assert title_of([{"task": "largest"}] * 2, ["grpo", "gspo"]) == "grpo and gspo on largest"
    assert title_of([{"task": "largest"}, {"task": "addition"}], ["largest", "addition"]) == "largest and addition"
    assert title_of([{}] * 4, list("abcd")) == "4 settings compared"


def test_folders_are_told_apart_by_as_little_as_is_needed(tmp_path):
    folders = [tmp_path / a / b for a in ("x", "y") for b in ("1", "2")]
    assert folder_names(folders) == ["x/1", "x/2", "y/1", "y/2"]
    assert folder_names(folders[:2]) == ["1", "2"]
    assert folder_names([folders[0], folders[0]]) == ["1", "1"]


@pytest.mark.parametrize(
    ("shares", "sign", "texts"),
    [
        ((0.1, 0.105), "+", ["+10.0", "+10.5"]),
        ((0.1, 0.1001), "+", ["+10.00", "+10.01"]),
        ((-1e-9, 1e-9), "+", ["-0.0000001", "+0.0000001"]),
        ((-0.0, 0.0), "+", ["+0.0", "+0.0"]),
        ((-0.0,), "", ["0.0"]),
        ((1e-5,), "", ["0.001"]),
        ((-0.2, 0.3), "+", ["-20.0", "+30.0"]),
    ],
)
def test_points_that_differ_look_different_and_nothing_is_minus_nothing(shares, sign, texts):
    assert in_points(*shares, sign=sign) == texts
