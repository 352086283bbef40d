"""The examples on rewards, training and tools run end to end, with a small budget, and print what happened."""

import re

import pytest
from running import run_script


def run(script, folder, *arguments):
    return run_script(f"examples/{script}", folder, *arguments).stdout


def test_example_03_sums_two_rewards_over_a_batch(tmp_path):
    output = run("03_batch_processing.py", tmp_path)
    short, clear, stilted = (float(x) for x in re.findall(r"^(\d\.\d{3}) ", output, re.MULTILINE))
    assert clear > short > stilted
    assert "10 more: the best is number " in output


def test_example_04_lets_a_verifier_veto(tmp_path):
    output = run("04_multiple_rewards.py", tmp_path)
    scores = {label: float(value) for label, value in re.findall(r"^ *([a-z ]+): +(-?\d\.\d\d) ", output, re.MULTILINE)}
    assert scores["good"] == 1.5
    assert scores["repetitive"] == min(scores.values())
    assert "on_topic -0.50" in output


@pytest.mark.usefixtures("small_built_in")
def test_example_05_makes_better_completions_likelier(tmp_path):
    output = run("05_textpolicy_essence.py", tmp_path)
    assert output.count("reward ") == 8
    assert output.strip().endswith("what was better than its group became likelier: yes")


@pytest.mark.slow
def test_example_06_learns_to_be_short(tmp_path):
    output = run("06_minimal_training.py", tmp_path, "--steps=4")
    first, last = map(float, re.search(r"first steps (\S+), of the last ones (\S+)", output).groups())
    assert last > first + 0.2
    assert re.search(r"essays after: \d\.\d\d \([+-]\d\.\d\d\)", output)


@pytest.mark.slow
def test_example_13_calls_its_calculator(tmp_path):
    output = run("13_tool_environment.py", tmp_path, "--steps=1", "--prompts=2", "--test=4")
    assert [float(x) for x in re.findall(r"reward (\d\.\d\d)", output)]
    percent = [int(x) for x in re.findall(r"calculator asked in (\d+)%", output)]
    assert len(percent) == 2
    assert max(percent) > 0
    assert "[assistant] " in output
