"""Examples 01 and 02 run as scripts and print what they promise."""

import re

from running import run_script


def printed(name, tmp_path):
    done = run_script(f"examples/{name}", tmp_path, warnings="error")
    assert done.stderr == ""
    return done.stdout


def test_the_first_example_scores_three_answers_by_their_words(tmp_path):
    scored = re.findall(r"(\d+) words -> (\d\.\d\d)", printed("01_hello_reward.py", tmp_path))
    assert scored == [("3", "0.30"), ("16", "1.00"), ("77", "0.46")]


def test_the_second_example_adds_rewards_up(tmp_path):
    lines = printed("02_reward_decorator.py", tmp_path).splitlines()
    assert "politeness" in lines[0]
    assert lines[1].endswith("1.0")
    read = [re.match(r" *(-?[\d.]+)  correct: (\w+)", line).groups() for line in lines[2:]]
    # 1 + 0.3 * 2/3; 1; the penalty, which says nothing of being correct; 0.3 * 1/3
    assert read == [("1.20", "True"), ("1.00", "True"), ("-1.00", "None"), ("0.10", "False")]
