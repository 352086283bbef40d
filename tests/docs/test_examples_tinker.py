"""The script that trains on either engine does, on a Tinker server that it starts itself."""

import pytest
from running import run_script


@pytest.mark.slow
@pytest.mark.usefixtures("small_built_in")
@pytest.mark.parametrize("engine", [["--engine", "mlx"], ["--engine", "tinker", "--serve"]])
def test_one_script_trains_on_both_engines(engine, tmp_path):
    pytest.importorskip("tinker", reason="the Tinker SDK is not installed (textpolicy[tinker])")
    small = ["--steps", "1", "--prompts", "1", "--test", "2"]
    done = run_script("examples/15_tinker.py", tmp_path, *engine, *small, warnings="default")
    printed = done.stdout.splitlines()
    assert [line.split()[0] for line in printed if line[:4] in ("befo", "step", "afte")] == [
        "before:",
        "step",
        "after:",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("small_built_in")
def test_a_script_of_the_sdk_trains_on_the_server_that_it_starts(tmp_path):
    pytest.importorskip("tinker", reason="the Tinker SDK is not installed (textpolicy[tinker])")
    small = ["--serve", "--steps", "1", "--prompts", "1", "--group", "2"]
    printed = run_script("examples/17_tinker_sdk.py", tmp_path, *small, warnings="default").stdout.splitlines()
    assert printed[0].startswith("step 1  right ")
    assert printed[1].startswith("saved: tinker://")
