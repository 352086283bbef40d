"""Runs of several stages: one adapter, one folder, one resume, rows that name their stage, and one report."""

import json
import re

import pytest
from test_resume import CutError, cut_in, refused
from toy_run import make_model, metrics, outcome, quickly, settings

from textpolicy.cli.main import main
from textpolicy.config.settings import check_config, read_values
from textpolicy.mlx.engine import MLXEngine
from textpolicy.record.reader import load_run
from textpolicy.run.training_run import run

STAGES = """
[[stage]]
kind = "sft"
steps = 3
data = "{data}"
validation = "{data}"
[stage.optimizer]
learning_rate = 0.01

[[stage]]
kind = "rl"
steps = 3
"""


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    quickly(monkeypatch)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The toy run after three steps on demonstrations of typing letters."""
    folder = tmp_path_factory.mktemp("toy")
    path, data = settings(folder), folder / "rows.jsonl"
    data.write_text("".join(f'{{"prompt": "Type {n}", "completion": "{c * 6}"}}\n' for n, c in enumerate("abcdefgh")))
    path.write_text(path.read_text().replace("steps = 5\n", "", 1) + STAGES.format(data=data))
    return path


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run in one go."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        quickly(patch)
        assert main(["train", str(config), f"--output={folder}"]) == 0
    return folder


def test_the_rows_name_their_stage_and_number_their_steps_through(whole):
    steps = [row for row in metrics(whole) if row["kind"] == "train"]
    assert [(row["step"], row["stage"]) for row in steps] == [
        *((n, "sft") for n in range(3)),
        *((n, "rl") for n in (3, 4, 5)),
    ]
    assert all(row["updated"] == 2 for row in steps[:3])
    assert [row["learning_rate"] for row in steps[:3]] == pytest.approx([0.005, 0.01, 0.01])  # a warm-up of its own
    assert steps[3]["learning_rate"] == pytest.approx(0.01)
    assert "on_policy_gap_mean" in steps[3]  # the check looks at the first step of the stage
    assert load_run(whole).metrics.num_rows == 6


def test_the_loss_of_held_out_demonstrations_is_measured_in_their_stage(whole):
    losses = [row for row in metrics(whole) if row["kind"] == "eval_loss"]
    assert [row["step"] for row in losses] == [0, 2, 3]
    assert losses[-1]["loss"] < losses[0]["loss"]


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_run_cut_short_in_any_stage_ends_as_one_in_one_go(config, whole, tmp_path, step):
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        cut_in(patch, step)
        with pytest.raises(CutError):
            main(["train", str(config), f"--output={folder}"])
    assert main(["train", f"--resume={folder}"]) == 0
    assert outcome(folder) == outcome(whole)


def test_a_stage_alone_takes_the_same_steps_as_before_another(config, whole, tmp_path):
    values = read_values(config)
    values["stage"] = values["stage"][:1]
    run(check_config({**values, "output": str(tmp_path / "alone")}, "a test"))
    assert main(["doctor", str(tmp_path / "alone")]) in (0, 1)  # demonstrations alone are examined, and reported
    assert "after sft" in (tmp_path / "alone" / "report.html").read_text()
    rows = [[row for row in metrics(folder) if row["kind"] == "train"][:3] for folder in (tmp_path / "alone", whole)]
    assert rows[0] == rows[1]


def test_the_report_and_the_summary_have_the_held_out_accuracy_of_every_stage(whole):
    stages = json.loads((whole / "summary.json").read_text())["stages"]
    assert [(stage["stage"], stage["steps"]) for stage in stages] == [("sft", 3), ("rl", 3)]
    accuracy = {
        row["step"]: row["accuracy"] for row in metrics(whole) if row["kind"] == "eval" and row["split"] == "validation"
    }
    assert [stage["accuracy"] for stage in stages] == [accuracy[3], accuracy[6]]
    page = (whole / "report.html").read_text()
    assert page.count("after sft") == 1
    assert page.count("after rl") == 1


def test_the_start_gate_says_what_to_begin_with(whole, capsys):
    assert main(["eval", f"--run={whole}", "--start-gate", "--group-size=4", "--show=0"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"toy, test: avg@16 .* sampled at temperature 1", printed)
    assert re.search(r"toy, test: pass@16 \d+\.\d% \[", printed)
    assert re.search(r"toy, test: \d+\.\d% \[.*\] of groups of 4 would disagree", printed)
    assert re.search("begin with rl|teach first|little left to learn", printed)


def test_what_is_right_a_sibling_and_another_model_teach_in_one_run(config, tmp_path, capsys):
    """Also after it was cut short, by the same teachers alone, which leave nothing in a checkpoint."""
    model = make_model(tmp_path / "teacher", seed=1)
    stages = f"""
[[stage]]
kind = "rft"
steps = 1
cap = 2
[[stage]]
kind = "distill"
steps = 1
teacher = "self"
context = "sibling"
reward_weight = 0.5
[[stage]]
kind = "distill"
steps = 1
teacher = "{model}"
discount = 0.9
[[stage]]
kind = "distill"
steps = 2
teacher = "{model}"
beta = 0.5
optimizer.updates_per_step = 1
"""
    path = tmp_path / "three.toml"
    settings = config.read_text().partition("[[stage]]")[0].replace("warmup_steps = 2", "warmup_steps = 1")
    path.write_text(settings + stages)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["train", str(path), f"--output={whole}"]) == 0
    rows = [row for row in metrics(whole) if row["kind"] == "train"]
    assert [row["stage"] for row in rows] == ["rft", "distill-2", "distill-3", "distill-4", "distill-4"]
    assert ["teacher_kl" in row for row in rows] == [False, True, True, False, False]
    assert all(row["loss"] > 0 for row in rows[3:])  # divergences
    assert all(row["updated"] for row in rows)
    rollouts = load_run(whole).rollouts.to_pylist()
    kept = [r for r in rollouts if r["step"] == 0 and r["advantage"]]
    assert kept
    assert all(r["is_correct"] and r["advantage"] == 1 and set(r["credit"]) == {1.0} for r in kept)
    taught = [{c for r in rollouts if r["step"] == step for c in r["credit"]} for step in (1, 2)]
    assert all(len(credits) > 50 for credits in taught)  # one of its own for every token
    with pytest.MonkeyPatch.context() as patch:
        true, calls = MLXEngine.distil, []

        def distil(*arguments, **keywords):
            calls.append(1)
            if len(calls) == 2:
                raise CutError
            return true(*arguments, **keywords)

        patch.setattr(MLXEngine, "distil", distil)
        with pytest.raises(CutError):
            main(["train", str(path), f"--output={cut}"])
    weights = (model / "model.safetensors").read_bytes()
    make_model(model, seed=2)
    assert "with another teacher of stage 3, teacher of stage 4)" in refused(capsys, "train", f"--resume={cut}")
    (model / "model.safetensors").write_bytes(weights)
    assert main(["train", f"--resume={cut}"]) == 0
    assert outcome(cut) == outcome(whole)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"kind": "rl", "steps": 2, "data": "x.jsonl"}, "stage.data is set in a stage of the kind rl"),
        ({"kind": "rl", "steps": 2, "prompt": {"day": "2025-01-02"}}, "there is no setting 'stage.0.prompt'"),
        ({"kind": "rl", "steps": 2, "rollout": {"max_tokens": 3}}, "rollout.max_tokens is 3 in stage 1; it is one"),
        ({"kind": "rl"}, "stage.0.steps is missing"),
        ({"kind": "distill", "steps": 2, "teacher": "self"}, "nothing to learn from it"),
        ({"kind": "distill", "steps": 2, "beta": 1.0, "discount": 0.5}, "learns whole distributions, and discount is"),
        ({"kind": "distill", "steps": 2, "beta": 1.0}, "updates_per_step is 2 and a stage with a beta"),
        ({"kind": "distill", "steps": 2, "teacher": "nowhere"}, "nowhere"),
        ({"kind": "dpo", "steps": 2}, "stage.0.kind is dpo"),
        ({"kind": "sft", "steps": 2, "data": "nowhere.jsonl"}, "cannot read .*nowhere.jsonl"),
        ({"kind": "rl", "steps": 2, "optimizer": {"warmup_steps": 3}}, "the stage of rl would end before"),
    ],
)  # fmt: skip
def test_a_stage_that_does_not_fit_is_refused(change, why, config, tmp_path, capsys):
    toml = config.read_text().partition("[[stage]]")[0]
    sections = "".join(
        f"[stage.{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in value.items())
        for name, value in change.items()
        if isinstance(value, dict)
    )
    plain = "".join(f"{k} = {json.dumps(v)}\n" for k, v in change.items() if not isinstance(v, dict))
    path = tmp_path / "bad.toml"
    path.write_text(f"{toml}[[stage]]\n{plain}{sections}")
    assert re.search(why, refused(capsys, "train", str(path), f"--output={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()
