"""Every example runs end to end in some test; here those on rollouts, lengths, adapters' vectors and own algorithms."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT, run_script

EXAMPLES = sorted([*(ROOT / "examples").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")])
NOTEBOOKS = sorted((ROOT / "examples").rglob("*.ipynb"))
RUNNERS = ("run", "run_script", "run_notebook", "printed")  # what the tests run an example with


def run(script, folder, *arguments):
    return run_script(f"examples/{script}", folder, *arguments).stdout


def run_by_a_test(path):
    """The file names that the test functions of ``path`` hand to one of RUNNERS."""
    tests = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    calls = [node for test in tests for node in ast.walk(test) if isinstance(node, ast.Call)]
    called = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id in RUNNERS and c.args]
    return {Path(c.args[0].value).name for c in called if isinstance(c.args[0], ast.Constant)}


def test_every_example_is_run_by_a_test_and_named_in_the_table():
    run_by_tests = set().union(*map(run_by_a_test, (ROOT / "tests").rglob("test_*examples*.py")))
    table = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    for path in [*EXAMPLES, *NOTEBOOKS]:
        assert path.name in run_by_tests, f"write a test that runs {path.name}"
        if path.is_relative_to(ROOT / "examples"):
            assert f"({path.relative_to(ROOT / 'examples')})" in table, path.name


def test_every_example_has_fewer_than_80_lines():
    assert EXAMPLES
    assert [path.name for path in EXAMPLES if len(path.read_text(encoding="utf-8").splitlines()) >= 80] == []


def test_every_row_of_the_table_is_a_file():
    named = re.findall(r"\]\(([^)]+)\)", (ROOT / "examples/README.md").read_text(encoding="utf-8"))
    assert named
    assert [name for name in named if not (ROOT / "examples" / name).exists()] == []


@pytest.mark.slow
def test_example_08_trains_on_groups_that_differ_and_empties_its_buffer(tmp_path):
    output = run("08_grpo_rollout_buffer.py", tmp_path, "--steps=2")
    steps = re.findall(r"step +(\d+)  reward (\d\.\d\d)  groups that differ (\d) of 4", output)
    assert [step for step, _, _ in steps] == ["1", "2"]
    assert all(0 < float(reward) < 1 and int(kept) > 0 for _, reward, kept in steps)
    assert "the trainer emptied the buffer: 0 episodes are left" in output


@pytest.mark.usefixtures("small_built_in")
def test_example_09_asks_before_and_after_on_held_out_questions(tmp_path):
    output = run("09_length_reduction_grpo.py", tmp_path, "--steps=1", "--prompts=2", "--test=1")
    lengths = re.findall(r"(?:before|after): (\S+) tokens on average", output)
    assert len(lengths) == 2
    assert f"mean length on 1 held-out questions: {lengths[0]} -> {lengths[1]} tokens" in output
    assert output.count("step ") == 1


@pytest.mark.usefixtures("small_built_in")
def test_example_10_shows_what_gspo_clips(tmp_path):
    output = run("10_length_reduction_gspo.py", tmp_path, "--steps=1", "--prompts=2", "--test=1")
    lengths = re.findall(r"(?:before|after): (\S+) tokens on average", output)
    assert f"mean length on 1 held-out questions: {lengths[0]} -> {lengths[1]} tokens" in output
    assert re.search(r"step  1  reward \d\.\d\d  correct +\d+%  length .* clipped \d+%", output)


LASTS = pytest.mark.skipif(
    "TEXTPOLICY_WHOLE_EXAMPLES" not in os.environ,
    reason="takes minutes; TEXTPOLICY_WHOLE_EXAMPLES=1 runs the examples on lengths with their own budgets",
)


@LASTS
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("script", ["09_length_reduction_grpo.py", "10_length_reduction_gspo.py"])
def test_lengths_fall_by_a_third_on_held_out_questions(script, tmp_path):
    output = run(script, tmp_path)
    before, after = map(float, re.search(r"held-out questions: (\S+) -> (\S+) tokens", output).groups())
    assert after < before * 2 / 3


@pytest.mark.usefixtures("small_built_in")
def test_example_12_reads_its_thirteen_numbers_back(tmp_path):
    small = ["--steps=1", "--num-problems=2", "--episodes-per-step=8", "--max-tokens=6"]
    output = run("12_tinylora_countdown.py", tmp_path, *small)
    learned, read = (json.loads(found) for found in re.findall(r"(?:learned|safetensors): (\[.*\])", output))
    assert learned == read
    assert len(read) == 13
    assert {path.name for path in (tmp_path / "results/tinylora_countdown").iterdir()} == {
        "adapter", "config.json", "metrics.jsonl",
    }  # fmt: skip


@pytest.mark.usefixtures("small_built_in")
def test_example_14_trains_with_an_advantage_and_a_stage_of_its_own(tmp_path):
    output = run("14_own_algorithm.py", tmp_path, "--steps=2", "--prompts=3", "--test=4")
    assert "ranks of the rewards 1, 0.1, 0.1, 0: [1.0, 0.0, 0.0, -1.0]" in output
    assert len(re.findall(r"step +\d+  reward \d\.\d\d", output)) == 2
    assert re.findall(r"(before|after): \d+\.\d% \[", output) == ["before", "after"]


@pytest.mark.usefixtures("small_built_in")
def test_example_16_trains_on_a_task_of_its_own(tmp_path):
    output = run("16_own_task.py", tmp_path, "1")
    assert re.search(r"reward: 0\.\d\d in the first step, \d\.\d\d in the last", output)
    assert (tmp_path / "runs" / "16_own_task-grpo-seed0" / "task.py").is_file()


@pytest.mark.usefixtures("small_built_in")
def test_example_18_teaches_and_then_reinforces(tmp_path):
    output = run("18_sft_then_rl.py", tmp_path, "1", "1", "2")
    assert re.search(r"before training \d+% of the test problems right, after it \d+%", output)
    assert re.findall(r"after (sft|rl): \d+% of the validation problems right, pass@4 \d+%", output) == ["sft", "rl"]


@pytest.mark.usefixtures("small_built_in")
def test_example_19_learns_from_a_run(tmp_path):
    output = run("19_distil.py", tmp_path, "1", "2")
    assert re.search(r"divergence from the teacher: \d\.\d\d nats per token in the first step, \d\.\d\d in", output)
    assert re.search(r"right of the test problems: teacher \d+%, student \d+% before and \d+% after", output)


def test_the_algorithm_of_example_14_fits_in_30_lines():
    lines = (ROOT / "examples/14_own_algorithm.py").read_text(encoding="utf-8").splitlines()
    [last] = [n for n, line in enumerate(lines) if line.startswith("MINE = ")]
    assert last - lines.index("@dataclass(frozen=True)") < 30


# ---- the notebook, whose code cells run in order in one namespace: a Jupyter kernel would be dozens of packages more


def run_notebook(name, folder, **settings):
    """What the cells print; ``settings`` are environment variables."""
    cells = json.loads((ROOT / "examples" / "notebooks" / name).read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    (folder / "cells.json").write_text(json.dumps(code))
    in_order = (
        "import json, matplotlib; matplotlib.use('agg'); space = {'__name__': '__main__'}\n"
        "for n, cell in enumerate(json.load(open('cells.json'))): exec(compile(cell, f'cell {n}', 'exec'), space)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", in_order],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder), **settings},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("small_built_in")
def test_the_notebook_goes_from_zero_to_an_adapter_that_loads_again(tmp_path):
    output = run_notebook("zero_to_adapter.ipynb", tmp_path, STEPS="2", HELD_OUT="4")
    assert len(re.findall(r"step +\d+  reward \d\.\d\d", output)) == 2
    assert "'adapters.safetensors'" in output
    assert "the reloaded model says the same: True" in output


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_stores_no_outputs_and_is_well_formed(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    linked = re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8"))
    assert [link for link in linked if not (path.parent / link).exists()] == []
