"""The examples on adapters run end to end, with a small budget, and what they print is what happened."""

import json
import re

import mlx.core as mx
import pytest
from running import ROOT, run_script


def run(script, folder, *arguments):
    return run_script(script, folder, *arguments).stdout


@pytest.mark.slow
def test_example_11_learns_reloads_and_merges(tmp_path):
    output = run("examples/11_lora_qlora.py", tmp_path)
    by_step = [[float(x) for x in line.split(", ")] for line in re.findall(r"reward by step: (.*)", output)]
    assert [len(rewards) for rewards in by_step] == [5, 2]
    assert by_step[0][-1] > by_step[0][0] + 0.1
    reloaded, merged = re.search(r"differ by (\S+) at most", output)[1], re.search(r"weights: by (\S+)", output)[1]
    assert float(reloaded) == 0
    assert float(merged) < 1e-3
    before, after = re.findall(r"model (\d+) MB before, (\d+) MB with adapters", output)
    assert int(before[0]) > 4 * int(after[0])  # the second is as stored, in 4 bits
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_example_12_trains_thirteen_numbers_and_keeps_them(tmp_path):
    small = ["--steps=2", "--num-problems=4", "--episodes-per-step=16", "--max-tokens=8"]
    output = run("experiments/countdown_reasoning_lora.py", tmp_path, "--output=out", *small)
    learned = json.loads(re.search(r"learned: (\[.*\])", output)[1])
    [v] = [a for name, a in mx.load(str(tmp_path / "out/adapter/adapters.safetensors")).items() if name.endswith(".v")]
    assert learned == [round(x, 3) for x in v.reshape(-1).tolist()]
    assert len(learned) == 13
    assert any(learned)
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    assert "reward on 4 held-out problems" in output
    assert json.loads((tmp_path / "out/config.json").read_text())["parameters"] == 13


def test_the_table_of_the_page_is_the_rows_of_the_benchmark():
    rows = [json.loads(line) for line in (ROOT / "benchmarks/results/adapters.jsonl").read_text().splitlines()]
    latest = {row["kind"]: row for row in rows}
    page = (ROOT / "docs/10_lora_qlora.md").read_text().splitlines()
    for kind, row in latest.items():
        [line] = [line for line in page if line.startswith(f"| `{kind}` | ") and line.count("|") == 8]
        shown = [float(cell.replace(",", "")) for cell in line.split("|")[2:8]]
        sizes = [row[f"{name}_bytes"] / 1e6 for name in ("model", "saved", "update_peak")]
        exact = [row["trainable_parameters"], row["trained_bytes"] / 1e3, *sizes, row["update_seconds"]]
        assert shown == pytest.approx(exact, abs=0.051)
    assert len(latest) == 6
