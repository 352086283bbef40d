"""Resumed runs: which checkpoint they start from, what they refuse, and that they end as an uninterrupted run does."""

import datetime
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file
from toy_run import make_tokenizer, make_weights, metrics, outcome, quickly, settings, toy_task
from transformers.utils import chat_template_utils

from textpolicy._system.lock import RunLock
from textpolicy._system.random_state import restore_streams, seed_streams, streams
from textpolicy.cli.main import main
from textpolicy.config.settings import check_config, read_values
from textpolicy.errors import UserError
from textpolicy.mlx import blas
from textpolicy.record.metrics_file import MetricsFile
from textpolicy.record.reader import load_run
from textpolicy.run import assembly
from textpolicy.run import training_run as run_module
from textpolicy.run.checkpoint import Checkpoints
from textpolicy.run.resume import changed_versions


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    quickly(monkeypatch)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return settings(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run in one go."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        quickly(patch)
        assert main(["train", str(config), f"--output={folder}"]) == 0
    return folder


class CutError(Exception):
    """Stands for the end of the process."""


def cut_in(monkeypatch, step):
    """Let the update of ``step``, counted from 0, never come back."""
    from textpolicy.mlx.engine import MLXEngine

    true, calls = MLXEngine.update, []

    def update(self, *arguments):
        calls.append(1)
        if len(calls) == 2 * step + 2:  # the second of the two updates, so that the first has moved the weights
            raise CutError
        return true(self, *arguments)

    monkeypatch.setattr(MLXEngine, "update", update)


def cut_short(config, folder, step, *flags):
    with pytest.MonkeyPatch.context() as patch:
        cut_in(patch, step)
        with pytest.raises(CutError):
            main(["train", str(config), f"--output={folder}", *flags])


def refused(capsys, *argv):
    capsys.readouterr()
    assert main(list(argv)) == 2
    output = capsys.readouterr().err
    assert output.startswith("textpolicy: ")
    assert output.count("\n") == 1
    return output


def test_the_toy_run_uses_everything_that_a_checkpoint_stores(whole):
    steps = [row for row in metrics(whole) if row["kind"] == "train"]
    assert len(steps) == 5
    assert sum(row["updated"] for row in steps) >= 5
    assert max(row["sepa_lambda"] for row in steps) > 0
    assert len({row["curriculum_pass_rate"] for row in steps}) == 5


@pytest.mark.parametrize("step", [0, 1, 4])
def test_a_resumed_run_ends_as_an_uninterrupted_one(config, whole, tmp_path, step):
    cut_short(config, tmp_path / "run", step)
    random.random()  # the streams of the new process are anywhere
    assert main(["train", str(config), f"--output={tmp_path / 'run'}"]) == 0
    assert outcome(tmp_path / "run") == outcome(whole)


def test_the_resume_flag_needs_neither_config_nor_flags(config, whole, tmp_path, capsys):
    cut_short(config, tmp_path / "run", 3)
    assert main(["train", f"--resume={tmp_path / 'run'}"]) == 0
    assert "after 3 of 5 steps" in capsys.readouterr().out
    assert outcome(tmp_path / "run") == outcome(whole)


def test_a_run_cut_short_twice_and_after_its_last_step_ends_as_one_in_one_go(config, whole, tmp_path, monkeypatch):
    cut_short(config, tmp_path / "run", 2)
    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, "finish", lambda *arguments: (_ for _ in ()).throw(CutError()))
        with pytest.raises(CutError):
            main(["train", f"--resume={tmp_path / 'run'}"])
    assert main(["train", f"--resume={tmp_path / 'run'}"]) == 0
    assert outcome(tmp_path / "run") == outcome(whole)


def test_a_run_cut_short_before_its_first_checkpoint_begins_again_in_its_folder(config, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, "checkpoint", lambda self: (_ for _ in ()).throw(CutError()))
        with pytest.raises(CutError):
            main(["train", str(config), f"--output={tmp_path / 'run'}"])
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size > 0
    assert main(["train", f"--resume={tmp_path / 'run'}"]) == 0
    assert outcome(tmp_path / "run") == outcome(whole)


def test_a_run_begins_in_a_folder_that_finder_has_looked_into(config, whole, tmp_path):
    (tmp_path / "run").mkdir()
    for name in (".DS_Store", "._config.json"):
        (tmp_path / "run" / name).write_text("x")
    assert main(["train", str(config), f"--output={tmp_path / 'run'}"]) == 0
    assert outcome(tmp_path / "run") == outcome(whole)


def test_rows_after_the_checkpoint_and_half_a_line_are_cut_off(config, whole, tmp_path):
    folder = tmp_path / "run"
    cut_short(config, folder, 3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 3}\n{"kind": "tra')
    assert main(["train", f"--resume={folder}"]) == 0
    assert metrics(folder) == metrics(whole)


@pytest.mark.parametrize("line", [b"{", b"7", b"[1, 2]", b'{"step": 0}', b"\xff\xfe"])
def test_a_metrics_file_with_a_line_that_is_no_row_is_damaged(line, tmp_path):
    rows = b'{"kind": "train", "step": 0, "loss": 0.5}\n'
    (tmp_path / "metrics.jsonl").write_bytes(rows + line + b"\n")
    metrics = MetricsFile(tmp_path / "metrics.jsonl", len(rows) + len(line) + 1)
    with pytest.raises(UserError, match=r"^line 2 of .*metrics\.jsonl .*; restore it, or start the run again"):
        metrics.rows("train")
    metrics.close()
    metrics = MetricsFile(tmp_path / "metrics.jsonl", len(rows))  # a checkpoint before it cuts it off
    assert metrics.rows("train") == [{"step": 0, "loss": 0.5}]
    metrics.close()


def test_only_changed_versions_are_reported():
    then = {"mlx": "0.30.0", "python": "3.12.1", "gone": "1"}
    assert changed_versions(then, dict(then)) is None
    assert "(gone 1 -> None, mlx 0.30.0 -> 0.31.0)" in changed_versions(then, {"mlx": "0.31.0", "python": "3.12.1"})


def test_lost_metrics_are_refused_and_not_made_up(config, tmp_path, capsys):
    folder = tmp_path / "run"
    cut_short(config, folder, 3)
    (folder / "metrics.jsonl").write_text("")
    assert "metrics.jsonl has 0 bytes but the checkpoint expects" in refused(capsys, "train", f"--resume={folder}")


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "manifest"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(config, whole, tmp_path, capsys, damage):
    folder = tmp_path / "run"
    cut_short(config, folder, 3)
    newest = folder / "checkpoints" / "step-000003"
    file = newest / ("manifest.json" if damage == "manifest" else "engine.safetensors")
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data[: len(data) // 2] if damage in ("cut", "manifest") else data)
    assert main(["train", f"--resume={folder}"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert f"checkpoint {newest} is not sound" in output
    assert "resuming from step 2" in output
    assert outcome(folder) == outcome(whole)
    assert (folder / "checkpoints" / "unsound-step-000003").is_dir()


def test_a_run_with_no_sound_checkpoint_is_refused(config, tmp_path, capsys):
    folder = tmp_path / "run"
    cut_short(config, folder, 3)
    for file in folder.glob("checkpoints/*/state.json"):
        file.unlink()
    output = refused(capsys, "train", f"--resume={folder}")
    assert "it lacks state.json, nor is any other; remove" in output


def test_the_last_checkpoints_and_that_of_the_best_step_stay(whole):
    kept = {p.name for p in (whole / "checkpoints").iterdir()}
    best = json.loads((whole / "summary.json").read_text())["kept_step"]
    assert kept == {"step-000004", "step-000005", f"step-{best:06d}"}


def test_a_changed_setting_is_refused_with_the_difference_unless_it_is_named(config, tmp_path, capsys):
    folder = tmp_path / "run"
    cut_short(config, folder, 3)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    changed = ["train", f"--resume={folder}", "--optimizer.learning-rate=0.01", "--steps=7"]
    output = refused(capsys, *changed)
    assert "optimizer.learning_rate 0.02 -> 0.01, steps 5 -> 7" in output
    assert "--allow optimizer.learning_rate,steps" in output
    assert "optimizer.learning_rate 0.02 -> 0.01)" in refused(capsys, *changed, "--allow=steps")
    assert "names 'stepz'" in refused(capsys, *changed, "--allow=stepz")
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"} == before
    assert main([*changed, "--allow=steps,optimizer"]) == 0
    assert json.loads((folder / "config.json").read_text())["steps"] == 7
    assert [row["step"] for row in metrics(folder) if row["kind"] == "train"] == list(range(7))


DATED = (  # as Llama 3.2, with thoughts to turn on and off as Qwen3
    "{{ strftime_now('%d %b %Y') }}{% for m in messages %} {{ m['content'] }}{% endfor %}"
    "{{ ' now' if enable_thinking is defined and not enable_thinking else ' think' }}"
)


@pytest.fixture
def dated(tmp_path):
    (tmp_path / "dated").mkdir()
    config = settings(tmp_path / "dated", steps=3)
    (tmp_path / "dated" / "model" / "chat_template.jinja").write_text(DATED)
    return config


def move_clock(monkeypatch, days):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2026, 2, 27, 23, 59) + datetime.timedelta(days=days)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def asked(folder):
    """The prompts of a run, as the model read them."""
    tables = [load_run(folder).read(kind, ["prompt_tokens"]) for kind in ("rollouts", "evals")]
    return {make_tokenizer().decode(ids) for table in tables for ids in table["prompt_tokens"].to_pylist()}


def test_a_run_resumed_on_another_day_draws_the_same_prompts(dated, tmp_path, monkeypatch, capsys):
    on = '--prompt.template-args={"enable_thinking": true}'
    move_clock(monkeypatch, 0)
    assert main(["train", str(dated), f"--output={tmp_path / 'whole'}", on]) == 0
    cut_short(dated, tmp_path / "run", 1, on)
    move_clock(monkeypatch, 2)
    assert "began with other settings" in refused(capsys, "train", str(dated), f"--output={tmp_path / 'run'}")
    assert main(["train", f"--resume={tmp_path / 'run'}"]) == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert all(text.startswith("01 Jan 2025 Type") and text.endswith(" think") for text in asked(tmp_path / "run"))
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["prompt"]
    assert kept == {"template_args": {"enable_thinking": True}, "day": "2025-01-01"}


def test_evaluation_and_generation_ask_with_the_arguments_that_are_given(dated, tmp_path, capsys):
    model = tmp_path / "dated" / "model"
    for source in (
        ["generate", f"--model={model}", "--max-tokens=2", "hello"],
        ["eval", f"--model={model}", "--task=toy"],
    ):
        assert main([*source, "--template-args=enable_thinking=true"]) == 0
        assert "does not read 'thinking'" in refused(capsys, *source, "--template-args=thinking=true")


def test_the_day_can_be_chosen_and_a_run_from_before_there_was_one_resumes(dated, tmp_path):
    cut_short(dated, tmp_path / "run", 1, "--prompt.day=2031-12-09")
    assert all(text.startswith("09 Dec 2031") for text in asked(tmp_path / "run"))
    cut_short(dated, tmp_path / "old", 1)
    checkpoints = Checkpoints(tmp_path / "old" / "checkpoints")
    found = checkpoints.latest().checkpoint
    state = {**found.state, "config": {k: v for k, v in found.state["config"].items() if k != "prompt"}}
    checkpoints.write(found.step, state, lambda new: shutil.copytree(found.path, new, dirs_exist_ok=True))
    assert main(["train", f"--resume={tmp_path / 'old'}"]) == 0


def test_an_argument_that_the_template_does_not_read_is_refused_before_anything_is_written(dated, tmp_path, capsys):
    wrong = ["train", str(dated), f"--output={tmp_path / 'run'}", "--prompt.template-args=enable_thinkng=false"]
    assert "does not read 'enable_thinkng' of template_args; did you mean 'enable_thinking'?" in refused(capsys, *wrong)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_reported_as_finished_and_can_be_trained_further(config, whole, tmp_path, capsys):
    assert "is finished, with 5 steps" in refused(capsys, "train", str(config), f"--output={whole}")
    assert "steps is 4 and the run in" in refused(capsys, "train", f"--resume={whole}", "--steps=4", "--allow=steps")
    folder = shutil.copytree(whole, tmp_path / "run")
    assert main(["train", f"--resume={folder}", "--steps=6", "--allow=steps"]) == 0
    rows = {name: [r for r in metrics(place) if r["kind"] == "train"] for name, place in (("5", whole), ("6", folder))}
    assert rows["6"][:5] == rows["5"]
    assert [row["step"] for row in rows["6"]] == list(range(6))


def test_another_platform_is_reported(config, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    cut_short(config, folder, 3)
    true = assembly.versions
    monkeypatch.setattr(assembly, "versions", lambda *args: {**true(*args), "mlx": "0.99.0"})
    assert main(["train", f"--resume={folder}"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "-> 0.99.0): from here on bits may differ from an uninterrupted run" in output


def test_a_second_process_on_a_run_folder_is_refused(config, tmp_path, capsys):
    folder = tmp_path / "run"
    cut_short(config, folder, 1)
    code = "import sys, pathlib; from textpolicy._system.lock import RunLock\n"
    code += f"with RunLock(pathlib.Path({str(folder)!r})): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        assert f"process {other.pid} is using the run in" in refused(capsys, "train", f"--resume={folder}")
        other.kill()
    with RunLock(folder):  # that of a dead process is free
        pass


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert "is not a run folder" in refused(capsys, "train", f"--resume={tmp_path}")
    assert list(tmp_path.iterdir()) == []


def test_resume_without_a_folder_and_with_two(capsys):
    assert "--resume" in refused(capsys, "train", "--resume")
    assert "needs a run to resume" in refused(capsys, "train", "--allow=steps")


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_where_it_can_resume(config, whole, tmp_path, capfd, monkeypatch, number, code):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        true = run_module.Run.on_step

        def on_step(self, step, row, episodes):
            true(self, step, row, episodes)
            if step == 1:
                os.kill(os.getpid(), number)

        patch.setattr(run_module.Run, "on_step", on_step)
        assert main(["train", str(config), f"--output={folder}"]) == code
    _, err = capfd.readouterr()
    output = err.splitlines()
    assert output[0].startswith("textpolicy: finishing this step, then stopping")
    assert output[1].startswith(
        f"textpolicy: stopped by {number.name} after 2 of 5 steps; resume with: textpolicy train"
    )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert main(["train", f"--resume={folder}"]) == 0
    assert outcome(folder) == outcome(whole)


IMPATIENT = """
import os, signal, sys
sys.path.insert(0, {chaos!r})
import pytest, toy_run
from textpolicy.run.training_run import Run
from textpolicy.cli.main import main
toy_run.quickly(pytest.MonkeyPatch())
true = Run.on_step
def on_step(self, step, row, episodes):
    true(self, step, row, episodes)
    if step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
        while self.signal.number is None:  # equal signals that wait are one
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        print("still here")
Run.on_step = on_step
main(["train", {config!r}, "--output={folder}"])
"""


def test_a_second_signal_ends_the_process_at_once_and_damages_nothing(config, whole, tmp_path):
    folder = tmp_path / "run"
    chaos = os.path.dirname(sys.modules["toy_run"].__file__)
    script = IMPATIENT.format(chaos=chaos, config=str(config), folder=folder)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert "press Ctrl-C again to stop now" in done.stderr
    assert "still here" not in done.stdout
    assert main(["train", f"--resume={folder}"]) == 0
    assert outcome(folder) == outcome(whole)


def test_the_shared_random_streams_are_restored():
    seed_streams(7)
    random.gauss(0, 1)
    np.random.standard_normal()
    state = json.loads(json.dumps(streams()))
    drawn = [random.gauss(0, 1), random.random(), *np.random.standard_normal(700)]
    restore_streams(state)
    assert [random.gauss(0, 1), random.random(), *np.random.standard_normal(700)] == drawn


def test_a_program_adds_sinks_metrics_and_a_task_without_held_out_problems(config, tmp_path):
    """Nothing is evaluated then, the last adapter is kept, and a resumed run begins the program where it stands."""
    seen = []

    class Watch:
        def step(self, step, row, episodes):
            seen.append(("step", step, row["twice"], len(episodes)))

        def evaluated(self, *_):
            raise AssertionError

        def close(self):
            seen.append("close")

    extension = run_module.Extension(
        task=replace(toy_task(), validation=(), test=()),
        begin=lambda parts, folder, done: seen.append((parts.title, folder.name, done)),
        on_sampled=lambda step, episodes: {"sampled_before": float(len(episodes))},
        on_row=lambda step, row, episodes: {"twice": 2.0 * row["sampled_before"]},
        on_end=lambda done: seen.append(("end", done)),
    )
    changed = check_config({**read_values(config), "output": tmp_path / "run", "steps": 2}, "here")
    run_module.run(changed, sinks=[Watch()], extension=extension)
    title = f"sepa on toy with {changed.model}"
    steps = [("step", 0, 32.0, 16), ("step", 1, 32.0, 16)]
    assert seen == [(title, "run", 0), *steps, ("end", 2), "close"]
    assert [row["twice"] for row in metrics(tmp_path / "run")] == [32.0, 32.0]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["test_after"], summary["validation"], summary["kept_step"]) == (None, [], 2)
    run_module.run(changed.model_copy(update={"steps": 3}), ["steps"], extension=extension)
    assert seen[5:] == [(title, "run", 2), ("end", 3)]


def test_a_run_with_compiled_passes_resumes_with_the_shapes_that_it_knew(config, tmp_path):
    compiled = "--machine.compile=on"
    assert main(["train", str(config), f"--output={tmp_path / 'whole'}", compiled]) == 0
    cut_short(config, tmp_path / "run", 3, compiled)
    assert main(["train", f"--resume={tmp_path / 'run'}"]) == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


# ---- the base of a run, and where it lies


def retold(folder):
    path = folder / "chat_template.jinja"
    path.write_text("Q: " + path.read_text())


def other_weights(folder):
    size = len(make_tokenizer())
    save_file(make_weights(size, seed=1), folder / "model.safetensors", metadata={"format": "mlx"})


def another_end(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 256]}))


def another_pad(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "a"}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (retold, "chat template"),
        (other_weights, "weights"),
        (another_end, "config"),
        (another_pad, "tokenizer"),
        (lambda folder: (retold(folder), other_weights(folder)), "chat template, weights"),
    ],
)
def test_a_base_that_changed_under_a_run_is_refused_by_its_parts_unless_allowed(tmp_path, capsys, change, named):
    config, run = settings(tmp_path, steps=3), tmp_path / "run"
    cut_short(config, run, 1)
    change(model := tmp_path / "model")
    said = refused(capsys, "train", "--resume", str(run))
    assert f"(model {model} as it was -> {model} with another {named});" in said
    assert "allow the change with: --allow model" in said
    assert main(["train", "--resume", str(run), "--allow", "model"]) == 0
    log = (run / "log.txt").read_text()
    assert all(f"model {part} " in log for part in named.split(", "))


def test_a_base_that_only_moved_is_the_same_base(config, whole, tmp_path, capsys):
    own = settings(tmp_path)
    cut_short(own, tmp_path / "run", 1)
    shutil.move(tmp_path / "model", tmp_path / "elsewhere")
    assert main(["train", "--resume", str(tmp_path / "run"), "--model", str(tmp_path / "elsewhere")]) == 0
    assert outcome(tmp_path / "run")["metrics"] == outcome(whole)["metrics"]


def test_a_run_knows_its_base_in_its_versions_and_checkpoints(whole):
    versions = json.loads((whole / "versions.json").read_text())
    parts = {name for name in versions if name.startswith("model ")}
    assert parts == {"model config", "model tokenizer", "model chat template", "model weights"}
    saved = Checkpoints(whole / "checkpoints").latest().checkpoint.state["versions"]
    assert {name: saved[name] for name in parts} == {name: versions[name] for name in parts}


OWN_TASK = """
from toy_run import toy_task


def task():
    return toy_task()
"""


def test_a_run_begun_with_relative_paths_is_found_from_anywhere(tmp_path, monkeypatch, capsys, caplog):
    config, grams = settings(tmp_path, steps=3), tmp_path / "grams.json"
    (tmp_path / "mine.py").write_text(OWN_TASK)
    grams.write_text(json.dumps(["let me"]))
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    flags = [
        "--model=../model",
        "--task=../mine.py:task",
        "--algorithm.name=hicra",
        "--algorithm.grams=../grams.json",
    ]
    text = config.read_text()
    config.write_text(text[: text.index("[algorithm]")] + text[text.index("[adapter]") :])
    cut_short(config, tmp_path / "run", 1, *flags)
    monkeypatch.chdir("/")
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["model"] == str(tmp_path / "model")
    assert saved["task"] == f"{tmp_path / 'mine.py'}:task"
    assert saved["algorithm"]["grams"] == str(grams)
    capsys.readouterr()
    assert main(["generate", "--run", str(tmp_path / "run"), "Type 3", "--max-tokens", "4"]) == 0
    assert main(["eval", "--run", str(tmp_path / "run"), "--show", "0"]) == 0
    assert main(["export", str(tmp_path / "run"), "--to", "mlx"]) == 0
    assert not caplog.messages
    retold(tmp_path / "model")
    assert main(["eval", "--run", str(tmp_path / "run"), "--show", "0"]) == 0
    [said] = caplog.messages
    assert said.endswith(f"was trained on {tmp_path / 'model'} with another chat template than it has now")


@pytest.mark.cpu
def test_a_run_that_resumes_uses_the_blas_threads_that_it_had(config, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(blas, "set_blas_threads", used.append)
    cut_short(config, tmp_path / "run", 1)
    assert used == []
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert used == [blas.blas_threads()]


def test_names_that_are_no_paths_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()
    for name in ("smollm2-135m", "Qwen/Qwen3-0.6B"):
        assert assembly.with_full_paths(check_config({"model": name}, "")).model == name
    (tmp_path / "Qwen" / "Qwen3-0.6B").mkdir(parents=True)
    assert assembly.with_full_paths(check_config({"model": name}, "")).model == str(tmp_path / name)
    served = check_config({"model": name, "engine": "tinker"}, "")
    assert assembly.with_full_paths(served).model == name
