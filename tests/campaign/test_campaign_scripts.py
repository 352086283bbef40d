"""The scripts for Tinker and SEPA: their plans, what they run, the files they leave. A stand-in trains."""

import json
import os
from itertools import product
from pathlib import Path

import pytest
from made_runs import write_run

from textpolicy.campaign.presets import lr_sweep, scripts
from textpolicy.campaign.presets import sepa as sepa_campaign
from textpolicy.campaign.presets import tinker_math as math_campaign
from textpolicy.campaign.presets.scripts import script

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def pretend(monkeypatch):
    """Runs are those of tests/campaign/pretended_math.py."""
    monkeypatch.setattr(scripts, "MODULE", "pretended_math")
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


def campaign(root, *words):
    return script("campaign", math_campaign.MathCampaignArguments, math_campaign.run,
                  [f"--campaign-root={root}", "--max-steps=3", *words])  # fmt: skip


def sweep(root, *words, execute=True):
    return script("sweep", lr_sweep.SweepArguments, lr_sweep.run,
                  [f"--sweep-root={root}", *words, *(["--execute"] if execute else [])])  # fmt: skip


def sepa(root, *words):
    return script("sepa", sepa_campaign.SEPACampaignArguments, sepa_campaign.run,
                  [f"--campaign-root={root}", *words])  # fmt: skip


def read(path):
    return json.loads(path.read_text())


# ---- tinker_campaign


def test_a_dry_run_writes_the_plan_and_starts_nothing(tmp_path, capsys):
    assert campaign(tmp_path / "c", "--candidate-lr=1e-4", "--sepa-delay-steps=7") == 0
    assert {p.name for p in (tmp_path / "c").iterdir()} == {"manifest.json", "run_commands.sh"}
    manifest = read(tmp_path / "c" / "manifest.json")
    assert manifest["arms"]["baseline"]["algorithm"] == "grpo"
    candidate = manifest["arms"]["candidate"]
    assert (candidate["algorithm"], candidate["lr"]) == ("full", 1e-4)
    assert candidate["log_dir"] == str(tmp_path / "c" / "candidate")
    assert candidate["command"][:3] == ["python", "-m", "pretended_math"]
    assert "--lr=0.0001" in candidate["command"]
    assert manifest["hyperparameters"]["sepa_delay_steps"] == 7
    assert manifest["hyperparameters"]["candidate_lr"] == 1e-4
    assert (manifest["model"], manifest["batch_size"], manifest["group_size"]) == ("Qwen/Qwen3-4B-Instruct-2507", 4, 8)
    assert (tmp_path / "c" / "run_commands.sh").read_text().count("--log-dir") == 2
    assert "nothing was run" in capsys.readouterr().out


def test_one_seed_is_run_and_its_report_states_what_it_cannot_conclude(tmp_path, capsys):
    assert campaign(tmp_path / "c", "--execute") == 0
    manifest = read(tmp_path / "c" / "manifest.json")
    assert manifest["status"] == "completed"
    assert [manifest["arms"][arm]["returncode"] for arm in ("baseline", "candidate")] == [0, 0]
    assert "One seed per arm cannot say" in manifest["comparison"]["verdict"]
    assert manifest["significance"]["recommendation"] == "insufficient_statistical_evidence"
    names = {"comparison.json", "comparison.md", "significance.json", "significance.md"}
    assert names <= {p.name for p in (tmp_path / "c" / "analysis").iterdir()}
    assert "completed" in capsys.readouterr().out


def test_six_seeds_of_a_better_arm_are_an_improvement_and_never_run_again(tmp_path):
    words = ["--execute", "--seeds", "1", "2", "3", "4", "5", "6", "--parallel=2"]
    assert campaign(tmp_path / "c", *words) == 0
    comparison = read(tmp_path / "c" / "analysis" / "comparison.json")
    assert comparison["recommendation"] == "statistically_significant_improvement"
    assert comparison["contrasts"][0]["comparison"]["difference"] == pytest.approx(0.2)
    assert comparison["arms"][0]["cost"]["trained_tokens"] == 6 * 3 * 300
    runs = read(tmp_path / "c" / "manifest.json")["arms"]["candidate"]["runs"]
    assert [run["seed"] for run in runs] == [1, 2, 3, 4, 5, 6]
    assert runs[2]["log_dir"] == str(tmp_path / "c" / "candidate" / "seed3")
    before = [p.stat().st_mtime_ns for p in sorted((tmp_path / "c").glob("*/seed*/calls.jsonl"))]
    assert campaign(tmp_path / "c", *words) == 0
    assert [p.stat().st_mtime_ns for p in sorted((tmp_path / "c").glob("*/seed*/calls.jsonl"))] == before


def test_a_baseline_that_fails_stops_the_campaign_and_the_same_command_resumes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PRETEND_TO_FAIL", "grpo0")
    assert campaign(tmp_path / "c", "--execute") == 1
    manifest = read(tmp_path / "c" / "manifest.json")
    assert (manifest["status"], manifest["arms"]["baseline"]["returncode"]) == ("failed", 1)
    assert not (tmp_path / "c" / "candidate").exists()
    assert campaign(tmp_path / "c", "--execute", "--continue-on-error") == 1
    assert read(tmp_path / "c" / "manifest.json")["status"] == "partial"
    monkeypatch.delenv("PRETEND_TO_FAIL")
    assert campaign(tmp_path / "c", "--execute") == 0


def test_a_run_that_was_cut_short_resumes_in_its_folder(tmp_path):
    assert campaign(tmp_path / "c", "--execute") == 0
    (tmp_path / "c" / "candidate" / "summary.json").unlink()
    assert campaign(tmp_path / "c", "--execute") == 0
    assert not (tmp_path / "c" / "candidate.unfinished1").exists()
    assert (tmp_path / "c" / "candidate" / "summary.json").exists()


def test_another_plan_in_the_same_folder_is_refused(tmp_path, capsys):
    assert campaign(tmp_path / "c") == 0
    assert campaign(tmp_path / "c", "--lr=1") == 2
    assert "whose lr differ" in capsys.readouterr().err
    assert campaign(tmp_path / "d", "--seeds", "1", "1") == 2
    assert "each once" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


# ---- tinker_lr_sweep


def test_a_sweep_chooses_by_held_out_accuracy_and_prints_the_command(tmp_path, capsys):
    assert sweep(tmp_path / "s", "--lr-values", "1e-5", "1.2e-5", "4e-5", "1e-4", "--algorithms", "grpo", "full") == 0
    found = read(tmp_path / "s" / "sweep_results.json")
    assert found["best_lr"] == {"grpo": 4e-5, "full": 4e-5}
    assert len(found["results"]) == 8
    output = capsys.readouterr().out
    heads = next(line for line in output.splitlines() if line.startswith("Algorithm")).split()
    assert heads == ["Algorithm", "LR", "Steps", "Datums", "Correct%", "Running%", "HeldOut%", "MeanLoss", "Status"]
    assert "scripts/tinker_campaign.py" in output
    assert "--baseline-lr=4e-05 --candidate-lr=4e-05" in output


@pytest.mark.parametrize("words", [[], ["--lr-values=1e-5,2e-5", "--seeds=3,4"], ["--algorithms=full", "--no-execute"]])
def test_a_sweep_spends_nothing_unless_it_is_told_to(words, tmp_path, capsys):
    root = tmp_path / "s"
    assert sweep(root, *words, execute=False) == 0
    assert [p.name for p in root.iterdir()] == ["run_commands.sh"]
    said = capsys.readouterr().out
    runs = len((root / "run_commands.sh").read_text().splitlines()) - 2
    assert said.startswith(f"{runs} runs of 20 steps")
    assert "nothing was run" in said


def test_rates_that_are_close_have_folders_of_their_own(tmp_path):
    assert [lr_sweep.label_of(lr) for lr in (1e-5, 1.2e-5, 4e-5, 1.6e-4)] == ["1e-05", "1.2e-05", "4e-05", "0.00016"]


def test_a_rate_that_fails_is_in_the_table_and_is_not_chosen(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PRETEND_TO_FAIL", "full0")
    assert sweep(tmp_path / "s", "--lr-values=4e-5") == 0
    assert read(tmp_path / "s" / "sweep_results.json")["best_lr"] == {"grpo": 4e-5}
    assert "failed" in capsys.readouterr().out
    monkeypatch.setenv("PRETEND_TO_FAIL", "full0 grpo0")
    assert sweep(tmp_path / "t", "--lr-values=4e-5") == 1


# ---- sepa_campaign


def test_a_sepa_campaign_plans_eight_seeds_of_both_arms(tmp_path):
    assert sepa(tmp_path / "c") == 0
    manifest = read(tmp_path / "c" / "manifest.json")
    assert manifest["seeds"] == list(range(101, 109))
    baseline, candidate = (run["config"] for run in manifest["runs"][:2])
    assert (baseline["algorithm"]["name"], baseline["algorithm"]["hicra_alpha"]) == ("hicra", 0.3)
    assert (candidate["algorithm"]["name"], candidate["algorithm"]["sepa"]["steps"]) == ("sepa", 8)
    assert (baseline["task"], baseline["steps"], baseline["rollout"]["temperature"]) == ("countdown", 12, 0.4)
    assert baseline["rollout"]["prompts_per_step"] * baseline["rollout"]["group_size"] == 8


def test_maxrl_compares_maxrl_with_the_full_recipe(tmp_path):
    assert sepa(tmp_path / "c", "--advantage-mode=maxrl", "--seeds", "1", "2") == 0
    names = [run["config"]["algorithm"]["name"] for run in read(tmp_path / "c" / "manifest.json")["runs"][:2]]
    assert names == ["maxrl", "full"]


def test_finished_runs_are_compared_in_all_three_ways(tmp_path):
    root = tmp_path / "c"
    assert sepa(root, "--seeds", "1", "2", "3") == 0
    for seed, arm in product((1, 2, 3), ("baseline", "candidate")):
        write_run(root / "runs" / arm / f"seed{seed}", [0.1, 0.3, 0.5 + (arm == "candidate") / 10])
    assert sepa(root, "--seeds", "1", "2", "3", "--execute") == 0
    pages = {f"{name}.{kind}" for name in ("litmus", "significance", "dynamics") for kind in ("json", "md")}
    assert pages <= {p.name for p in (root / "analysis").iterdir()}
    assert read(root / "analysis" / "litmus.json")["status"] == "INCONCLUSIVE"  # two steps, and no completions logged
    assert read(root / "analysis" / "dynamics.json")["candidate"][2]["mean"] == pytest.approx(0.6)
    assert read(root / "analysis" / "analysis.json")["recommendation"] == "insufficient_statistical_evidence"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "1", "1"], "seed 1 is given twice"),
        (["--episodes-per-step=6"], "episodes_per_step is 6 and group_size 4"),
        (["--litmus-profile=offical"], "did you mean 'official'"),
        (["--resamples=9"], "resamples is 9"),
    ],
)
def test_a_sepa_campaign_that_cannot_work_leaves_nothing(tmp_path, capsys, words, message):
    assert sepa(tmp_path / "c", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_an_unfinished_sepa_campaign_prints_that_the_same_command_resumes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scripts, "carry_out", lambda *_, **__: [])
    assert sepa(tmp_path / "c", "--seeds", "1", "2", "--execute") == 1
    assert capsys.readouterr().out == f"partial: {tmp_path / 'c'}; the same command resumes\n"
    assert read(tmp_path / "c" / "manifest.json")["status"] == "partial"
    assert not (tmp_path / "c" / "analysis").exists()


# ---- words


def test_ctrl_c_prints_how_to_resume(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(scripts, "carry_out", interrupted)
    assert sepa(tmp_path / "c", "--execute") == 130
    assert capsys.readouterr().err == "sepa: stopped by Ctrl-C; the same command resumes\n"


@pytest.mark.parametrize("words", [["--seeds", "1", "2", "--lr", "3"], ["--seeds=1", "2", "--lr=3"]])
def test_lists_may_stand_word_by_word(words):
    parsed = []
    assert script("x", math_campaign.MathCampaignArguments, lambda args: parsed.append(args) or 0, words) == 0
    assert (parsed[0].seeds, parsed[0].lr) == ((1, 2), 3.0)
